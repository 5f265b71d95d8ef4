"""Threads that work for whoever started them: counters, log fields and a Prefect run are theirs, too."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, partial
from itertools import islice
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


def read_ahead(items: Iterable[T], count: int) -> Generator[T, None, None]:
    """Iterate with a thread that reads ahead, so that `count` items are held at most, the last one included."""
    iterator = iter(items)
    with ContextPool(1) as pool:
        pending: list[Future[list[T]]] = [pool.submit(_next, iterator) for _ in range(count)]
        while True:
            item = pending.pop(0).result()
            if not item:
                return
            yield item.pop()
            pending.append(pool.submit(_next, iterator))


def _next(iterator: Iterator[T]) -> list[T]:
    return list(islice(iterator, 1))


@cache
def arithmetic_pool(threads: int) -> ContextPool:
    """Threads in which PyTorch computes with one thread each; they stay for later calls.

    Where work can be split, several products at a time cost less than one by all threads: nobody waits for the others,
    and none of PyTorch's own threads burns a core while it waits for the next product.
    """
    import torch

    own = torch.get_num_threads()
    pool = ContextPool(threads, thread_name_prefix="arithmetic", initializer=_compute_alone)
    all_there = threading.Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_there.wait)
    all_there.wait()
    torch.set_num_threads(own)  # their calls also counted for threads that start later
    return pool


def _compute_alone() -> None:
    import torch

    torch.get_num_threads()  # the first question of a thread, or its first operation, sets what others have set last
    torch.set_num_threads(1)
