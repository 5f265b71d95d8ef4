"""What a task costs, measured where it runs and gathered where the run is.

A run hands each call over with a slip: which run and stage it belongs to, which of how many calls it is, and when it
was handed over. The task returns its usage beside its result: counters of its own (`rise_ops.counters`), so that
tasks beside it in the same process are not counted twice; attempts that failed before count, too. The run takes it out
again and hands it to whoever gathers. What a cached result says of its cost was paid by another run, and is not
counted. Times of waiting compare the clocks of two machines, where a task runs on another.
"""

from __future__ import annotations

import inspect
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from prefect.context import TaskRunContext

from rise_ops.counters import Counters, counting
from rise_ops.logs import current_fields, log_fields
from rise_ops.metrics import amounts
from tasks.run_logs import arrange_logs

Json = dict[str, Any]
Slip = dict[str, Any]

SLIP = "slip"
"""The parameter of every task that takes the slip."""
USAGE = "usage"
"""Where a result says what it cost."""

_logger = logging.getLogger(__name__)
_first: ContextVar[tuple[str, float, Counters] | None] = ContextVar("first", default=None)
"""Task run, start of its first attempt, and the counters of all its attempts, which share a context."""
_gatherer: ContextVar[Callable[[Json], None] | None] = ContextVar("gatherer", default=None)


@contextmanager
def gathering(gather: Callable[[Json], None]) -> Iterator[None]:
    """`gather` is called with the usage of every task of this flow run while the context lasts."""
    token = _gatherer.set(gather)
    try:
        yield
    finally:
        _gatherer.reset(token)


def slips(count: int) -> list[Slip]:
    """For as many calls that are handed over now."""
    fields, now = current_fields(), time.time()
    common = {"run_id": fields["run_id"], "stage": fields["stage"], "of": count, "handed": now}
    return [{**common, "position": position} for position in range(1, count + 1)]


def settled(result: Json, *, cached: bool) -> Json:
    """A task's result without its usage, with `cached`."""
    gather, usage = _gatherer.get(), result.get(USAGE)
    if gather is not None and usage is not None and not cached:
        gather(usage)
    return {**{name: value for name, value in result.items() if name != USAGE}, "cached": cached}


def metered(task: str, function: Callable[..., Json]) -> Callable[..., Json]:
    """The function of a task with one more parameter, `slip`; without a slip it only logs."""

    # pickled by value with the task: it may refer to what can be imported, and to nothing else
    @wraps(function)
    def run(*arguments: Any, slip: Slip | None = None, **parameters: Any) -> Json:
        return _run(task, function, arguments, parameters, slip)

    signature = inspect.signature(function)
    extra = inspect.Parameter(SLIP, inspect.Parameter.KEYWORD_ONLY, default=None)
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), extra])
    return run


def _run(
    task: str, function: Callable[..., Json], arguments: Sequence[Any], parameters: Json, slip: Slip | None
) -> Json:
    arrange_logs()
    about, clock = slip or {}, time.perf_counter()
    attempt, started, counters = _attempt()
    run_id = about.get("run_id") or parameters.get("run_id")
    with log_fields(run_id=run_id, stage=about.get("stage"), task=task), counting(counters):
        result = function(*arguments, **parameters)
        seconds = time.perf_counter() - clock
        counted = counters.values()
        _logger.info("%s done in %.1f s: %s", task, seconds, amounts(counted, seconds))
    if slip is None:
        return result
    usage = {
        "stage": about.get("stage"),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "started": round(started, 3),
        "seconds": round(seconds, 3),
        "waited": round(max(0.0, started - about["handed"]), 3),
        "task_retries": attempt - 1,
        **counted,
    }
    return {**result, USAGE: usage}


def _attempt() -> tuple[int, float, Counters]:
    """Number of this attempt at the task run at work, when the first one began, and the counters of all."""
    context = TaskRunContext.get()
    if context is None:
        return 1, time.time(), Counters()
    name, first = str(context.task_run.id), _first.get()
    if first is None or first[0] != name:
        first = name, time.time(), Counters()
        _first.set(first)
    return max(1, context.task_run.run_count), first[1], first[2]
