"""Rows in an order, when they need not fit in memory: an exact external sort on local disk.

Rows are named by their place in the corpus, from 0. Each leaves a record of fixed length in a file: 64 bits that are
smaller for a row that comes first, 32 bits that break ties, its place, and what goes with it. A file with more records
than fit is split by 16 bits of the key into files of consecutive keys, and those that are still too large by the next
16 bits, down to the place, which no two rows share. File after file is then sorted in memory. What is decided on the
rows in their order is written to one file a range of places, so that it can be read back in the order of the corpus.

No result depends on how much memory there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KEY = np.dtype([("key", "<u8"), ("tie", "<u4"), ("row", "<u8")])
"""What every record begins with."""
FATE = np.dtype([("row", "<u8"), ("rank", "<u4"), ("code", "<u2")])
"""What becomes of a row: its place in the order (0: none), and a code."""
PIECE_ROWS = 1 << 16
"""Records that are looked at together."""
_DIGITS = (*(("key", shift) for shift in (48, 32, 16, 0)), ("tie", 16), ("tie", 0),
           *(("row", shift) for shift in (48, 32, 16, 0)))  # fmt: skip
_FANOUT = 64
_NO_VALUE = np.uint32(0xFFFFFFFF)
_SIGN = np.uint32(0x80000000)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Records = npt.NDArray[Any]


def ordered(values: npt.NDArray[np.float32], valued: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Integers in the reverse order of the values; -0.0 equals 0.0, NaN is above all, no value below all."""
    plain = np.where(np.isnan(values), np.float32(np.nan), values) + np.float32(0.0)
    bits = np.ascontiguousarray(plain, dtype=np.float32).view(np.uint32)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return np.where(valued, ~ascending, _NO_VALUE).astype(np.uint32)


def by_value(records: Records, values: npt.NDArray[np.float32], valued: npt.NDArray[np.bool_],
             ties: npt.NDArray[np.uint64]) -> None:  # fmt: skip
    """Fill in keys that put records in the order of values, the highest first, then of `ties`."""
    records["key"] = ordered(values, valued).astype(np.uint64) << _HALF | ties >> _HALF
    records["tie"] = ties & _LOW


def has_value(records: Records) -> npt.NDArray[np.bool_]:
    """Which records of `by_value` have a value."""
    return np.asarray(records["key"] >> _HALF != _NO_VALUE)


def values_of(records: Records) -> npt.NDArray[np.float32]:
    """The values that `by_value` was given; without meaning where there was none."""
    ascending = ~(records["key"] >> _HALF).astype(np.uint32)
    bits = np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending)
    return np.ascontiguousarray(bits, dtype=np.uint32).view(np.float32)


def ties_of(records: Records) -> npt.NDArray[np.uint64]:
    """The ties that `by_value` was given."""
    return np.asarray((records["key"] & _LOW) << _HALF | records["tie"].astype(np.uint64))


class Sorter:
    """Takes records in any order and gives them back in the order of key, tie and row.

    Parameters
    ----------
    path
        A local file for them, and others beside it whose names begin so; as many bytes as the records have, and
        again what is split.
    dtype
        Of the records; begins as KEY.
    capacity
        Records that are sorted in memory at a time.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], *, capacity: int) -> None:
        self._path, self._dtype, self._capacity = path, dtype, max(1, capacity)
        self._path.touch()

    def add(self, records: Records) -> None:
        """More records."""
        append(self._path, records)

    def runs(self) -> Iterator[Records]:
        """All records in order, PIECE_ROWS at a time at most; they can be had once."""
        return self._sorted(self._path, 0)

    def _sorted(self, path: Path, depth: int) -> Iterator[Records]:
        total = path.stat().st_size // self._dtype.itemsize
        if total <= self._capacity:
            records = np.fromfile(path, self._dtype)
            path.unlink()
            order = np.lexsort((records["row"], records["tie"], records["key"]))
            for start in range(0, total, PIECE_ROWS):
                yield records[order[start : start + PIECE_ROWS]]
            return
        counts = np.zeros(1 << 16, np.int64)
        for records in self._pieces(path):
            counts += np.bincount(_digit(records, depth), minlength=1 << 16)
        children = _children(counts, max(self._capacity, -(-total // _FANOUT)))
        files = {number: path.with_name(f"{path.name}-{number}") for number in np.unique(children[counts > 0]).tolist()}
        self._split(path, depth, children, files)
        path.unlink()
        for number, file in files.items():
            digits = np.count_nonzero(counts[children == number])
            yield from self._sorted(file, depth if digits > 1 else depth + 1)

    def _split(self, path: Path, depth: int, children: npt.NDArray[np.int64], files: Mapping[int, Path]) -> None:
        opened = {number: file.open("wb") for number, file in files.items()}
        try:
            for records in self._pieces(path):
                target = children[_digit(records, depth)]
                for number in np.unique(target).tolist():
                    records[target == number].tofile(opened[number])
        finally:
            for file in opened.values():
                file.close()

    def _pieces(self, path: Path) -> Iterator[Records]:
        return read_records(path, self._dtype, rows=min(self._capacity, PIECE_ROWS))


def _children(counts: npt.NDArray[np.int64], share: int) -> npt.NDArray[np.int64]:
    """Which file each digit goes to: consecutive digits together while they hold at most `share` records."""
    children = np.zeros(len(counts), np.int64)
    number = held = 0
    for digit in np.flatnonzero(counts).tolist():
        count = int(counts[digit])
        if held and held + count > share:
            number, held = number + 1, 0
        children[digit] = number
        held += count
    return children


def _digit(records: Records, depth: int) -> npt.NDArray[np.int64]:
    name, shift = _DIGITS[depth]
    column = records[name]
    digits: npt.NDArray[np.int64] = ((column >> column.dtype.type(shift)) & column.dtype.type(0xFFFF)).astype(np.int64)
    return digits


def append(path: Path, records: Records) -> None:
    """Records at the end of a file."""
    with path.open("ab") as file:
        records.tofile(file)


def read_records(path: Path, dtype: np.dtype[Any], *, rows: int = 0) -> Iterator[Records]:
    """The records of a file in order, `rows` at a time; by default PIECE_ROWS."""
    with path.open("rb") as file:
        while len(records := np.fromfile(file, dtype, rows or PIECE_ROWS)):
            yield records


class Fates:
    """Takes what was decided on rows in any order, each row once, and gives it back in the order of their places.

    Parameters
    ----------
    folder
        Local folder for the files; 14 bytes a row.
    capacity
        Rows in memory at a time.
    """

    def __init__(self, folder: Path, *, capacity: int) -> None:
        self._folder = folder
        self._capacity = max(1, capacity)
        self._range = 0
        self._ready = np.empty(0, FATE)

    def add(self, rows: npt.NDArray[np.uint64], ranks: npt.NDArray[np.integer[Any]],
            codes: npt.NDArray[np.integer[Any]]) -> None:  # fmt: skip
        """What was decided on some rows."""
        fates = np.empty(len(rows), FATE)
        fates["row"], fates["rank"], fates["code"] = rows, ranks, codes
        ranges = rows // np.uint64(self._capacity)
        for number in np.unique(ranges).tolist():
            append(self._file(number), fates[ranges == np.uint64(number)])

    def take(self, count: int) -> Records:
        """Fates of the next rows, by place."""
        while len(self._ready) < count:
            found = np.fromfile(self._file(self._range), FATE)
            found = found[np.argsort(found["row"])]
            # what is left of a range is a view of it: only where two ranges meet are rows copied
            self._ready = np.concatenate([self._ready, found]) if len(self._ready) else found
            self._range += 1
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _file(self, number: int) -> Path:
        return self._folder / f"fates-{number}"


def write_records(path: Path, pieces: Iterable[Records]) -> None:
    """A file of records; empty where there are none."""
    with path.open("wb") as file:
        for records in pieces:
            records.tofile(file)
