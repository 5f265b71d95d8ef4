"""Splitting work into tasks: coarse enough that scheduling is free, fine enough to resume and to share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

MAX_TASKS = 256
"""Tasks of one stage, at most: hundreds, not hundreds of thousands."""


def split(items: Sequence[T], sizes: Sequence[int], *, target: int) -> Iterator[list[T]]:
    """Runs of consecutive items, each less than `target` and one item in total size; at most MAX_TASKS of them.

    Parameters
    ----------
    sizes
        Size of each item, in any unit; none is negative.
    target
        Size of a batch in that unit; grown where it would give too many batches.
    """
    size_of_batch = max(target, -(-sum(sizes) // MAX_TASKS))
    batch: list[T] = []
    start = end = 0
    for item, size in zip(items, sizes, strict=True):
        # an item goes where its beginning falls, as on a ruler: greedy filling could need twice as many batches
        if start >= end:
            if batch:
                yield batch
            batch, end = [], (start // size_of_batch + 1) * size_of_batch
        batch.append(item)
        start += size
    if batch:
        yield batch
