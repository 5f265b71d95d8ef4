"""Splitting work into tasks: coarse enough that scheduling is free, fine enough to resume and to share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

MAX_TASKS = 256
"""Tasks of one stage, at most: hundreds, not hundreds of thousands."""


def split(items: Sequence[T], sizes: Sequence[int], *, target: int) -> Iterator[list[T]]:
    """Runs of consecutive items of about `target` in total size, at most MAX_TASKS of them.

    Parameters
    ----------
    sizes
        Size of each item, in any unit.
    target
        Size of a batch in that unit; grown where it would give too many batches.
    """
    limit = max(target, -(-sum(sizes) // MAX_TASKS))
    batch: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch
