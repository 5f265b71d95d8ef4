"""Threads that work for whoever started them: counters, log fields and a Prefect run are theirs, too."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")


class ContextPool(ThreadPoolExecutor):
    """A ThreadPoolExecutor whose calls see the context variables of the thread that submits them."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule a call in a copy of the present context."""
        return super().submit(partial(copy_context().run, fn, *args, **kwargs))

    def ahead(self, fn: Callable[[S], T], items: Iterable[S], count: int) -> Iterator[T]:
        """The results for items, in their order; `count` of them are worked on or wait at most."""
        pending: deque[Future[T]] = deque()
        for item in items:
            pending.append(self.submit(fn, item))
            if len(pending) == count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
