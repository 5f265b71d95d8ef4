"""Hash tables of chains, for many keys at a time: which rows were added under the same key before.

A bucket's chain is a list linked through an array of rows, so a table takes 4 bytes a bucket and 4 a row, whatever
the lengths. Keys share a bucket by chance about once a row; who asks compares what is found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rise_ops.scratch import Scratch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / φ: multiplicative hashing (Knuth, 1973)

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]


class Chains:
    """Some tables of the same rows.

    Parameters
    ----------
    scratch
        Where columns come from.
    name
        Of these.
    tables
        How many.
    rows
        Rows there are; fewer than 2^31.
    """

    def __init__(self, scratch: Scratch, name: str, *, tables: int, rows: int) -> None:
        bits = max(8, (rows - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._buckets, self._rows = 1 << bits, rows
        # row + 1, so that the zeros that columns begin with are ends
        self._first = scratch.column(f"{name}-first", (tables << bits,), np.int32)
        self._next = scratch.column(f"{name}-next", (tables * rows,), np.int32)

    def walk(self, table: int, keys: UInt64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Rows whose keys share a bucket with these, one chain link at a time: positions in `keys`, and rows.

        The last added come first. A position comes once in each step.
        """
        asking = np.arange(len(keys))
        links = self._first.take(self._slots(table, keys))
        while True:
            there = np.flatnonzero(links)
            if not len(there):
                return
            asking, found = asking[there], links[there].astype(np.int64) - 1
            yield asking, found
            links = self._next.take(table * self._rows + found)

    def add(self, table: int, keys: UInt64Array, rows: Int64Array) -> None:
        """Add rows under their keys, the last of a bucket in front."""
        if not len(rows):
            return
        slots = self._slots(table, keys)
        order = np.argsort(slots, kind="stable")
        slots, links = slots[order], rows[order] + 1
        begins = np.ones(len(slots), np.bool_)
        begins[1:] = slots[1:] != slots[:-1]
        after = np.empty(len(slots), np.int32)
        after[begins] = self._first.take(slots[begins])
        after[~begins] = links[:-1][~begins[1:]]
        self._next.put(table * self._rows + links - 1, after)
        ends = np.append(begins[1:], True)
        self._first.put(slots[ends], links[ends])

    def _slots(self, table: int, keys: UInt64Array) -> npt.NDArray[np.int64]:
        with np.errstate(over="ignore"):
            return table * self._buckets + ((keys * _GOLDEN) >> self._shift).astype(np.int64)
