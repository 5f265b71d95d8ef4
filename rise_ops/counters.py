"""What the work of a task costs: rows, tokens, bytes and requests, counted where the work is done.

A task counts into counters of its own, so that tasks beside it in the same process do not mix with it. Which
counters these are is a context variable, which `rise_ops.threads` carries into threads. Outside of `counting`
nothing is counted. What Polars reads by itself (`Store.scan_parquet`) and what clients repeat by themselves (an
upload in parts) is not seen here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

Name = Literal[
    "rows",
    "tokens",
    "rejected",
    "requests",
    "retries",
    "store_read_bytes",
    "store_written_bytes",
    "source_read_bytes",
]
"""rows: taken in, computed, scored, ranked or exported; tokens: of computed rows; rejected: rows of sources;
requests: to the store; retries: of requests to the store and to sources."""

NAMES: tuple[Name, ...] = get_args(Name)


class Counters:
    """Numbers that only grow; threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int] = dict.fromkeys(NAMES, 0)

    def add(self, name: Name, amount: int) -> None:
        """Count on."""
        with self._lock:
            self._values[name] += amount

    def values(self) -> dict[str, int]:
        """All of them."""
        with self._lock:
            return dict(self._values)


_current: ContextVar[Counters | None] = ContextVar("counters", default=None)


@contextmanager
def counting(counters: Counters) -> Iterator[None]:
    """What is counted meanwhile, here and in threads that begin here, goes to these counters."""
    token = _current.set(counters)
    try:
        yield
    finally:
        _current.reset(token)


def count(name: Name, amount: int = 1) -> None:
    """Count for the task that is running."""
    counters = _current.get()
    if counters is not None and amount:
        counters.add(name, amount)
