"""How long a fault that passes is waited for: one budget for every request to a store or a source.

A request is tried up to `tries` times. The pauses between are doubled from `first_pause` up to
`longest_pause` and shortened at random by up to half, so that workers that failed together do not return
together. No try starts later than `retry_seconds` after the first, and each is given up after
`try_seconds`: whatever a server does, a request ends within the sum of the two.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from rise_ops.counters import count
from rise_ops.errors import TransientError

T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Budget:
    """What one request may take; all times in seconds."""

    tries: int
    """Including the first."""
    connect_seconds: float
    """Until there is a connection."""
    try_seconds: float
    """One try, from connecting to the last byte."""
    retry_seconds: float
    """After the first try has begun, no further one begins later than this."""
    first_pause: float
    """Before the second try; doubled before each that follows."""
    longest_pause: float

    @property
    def longest_seconds(self) -> float:
        """Within which every request ends."""
        return self.retry_seconds + self.try_seconds


BUDGET = Budget(
    tries=6, connect_seconds=10.0, try_seconds=60.0, retry_seconds=90.0, first_pause=0.1, longest_pause=10.0
)
"""The budget of all requests: six tries, over after 150 seconds at the latest."""


def pauses() -> Iterator[float | None]:
    """What to wait after each try that fails; None after the last."""
    budget, begun = BUDGET, time.monotonic()
    for done in range(budget.tries - 1):
        pause = min(budget.longest_pause, budget.first_pause * 2**done) * random.uniform(0.5, 1.0)
        if time.monotonic() - begun + pause > budget.retry_seconds:
            break
        yield pause
    yield None


def tell(error: Exception, pause: float) -> None:
    """Log and count that a request failed in passing and is tried again after a pause, in seconds."""
    count("retries")
    _logger.info("%s; trying again in %.1f s", str(error).partition("\n")[0], pause)


def retried(call: Callable[[], T]) -> T:
    """Result of `call`, which is called again within the budget while it raises TransientError.

    Calls may be nested: one that has spent its budget is not repeated by another.
    """
    for pause in pauses():
        try:
            return call()
        except TransientError as error:
            error.spent = error.spent or pause is None
            if error.spent or pause is None:
                raise
            tell(error, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
