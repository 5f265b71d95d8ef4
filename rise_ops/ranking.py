"""Ranks of rows that need not fit in memory: an exact external sort on local disk.

Rows are named by their place in the corpus, from 0. Each leaves a key of 24 bytes in a file: its value, mapped
to an integer that is smaller for a larger value (no value comes last), eight bytes of its doc_id, its place, its
tokens. A file with more keys than fit is split by 16 bits of the key into files of consecutive keys, and those
that are still too large by the next 16 bits, down to the place, which no two rows share. File after file is then
sorted in memory; ranks and sums of tokens run on from one to the next. The fates that follow are written to one
file a range of places, so that they can be read back in the order of the corpus.

No result depends on how much memory there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

KEY = np.dtype([("value", "<u4"), ("tie", "<u8"), ("row", "<u8"), ("tokens", "<i4")])
FATE = np.dtype([("row", "<u8"), ("rank", "<u4"), ("code", "u1")])
_DIGITS = (("value", 16), ("value", 0), *((name, shift) for name in ("tie", "row") for shift in (48, 32, 16, 0)))
_FANOUT = 64
_NO_VALUE = np.uint32(0xFFFFFFFF)
_SIGN = np.uint32(0x80000000)

Keys = npt.NDArray[Any]
Judge = Callable[[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.int64], npt.NDArray[np.int64]],
                 npt.NDArray[np.uint8]]  # fmt: skip
"""From values, which of them exist, ranks and running tokens of rows in order: a code for the fate of each."""


@dataclass(slots=True)
class Totals:
    """What a ranking adds up."""

    rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """Rows by code."""
    tokens: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(256, np.int64))
    """Tokens by code."""
    best: tuple[float, int] | None = None
    """Value and tokens of the first row, if it has a value."""


def ordered(values: npt.NDArray[np.float32], valued: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Integers in the reverse order of the values; -0.0 equals 0.0, NaN is above all, no value below all."""
    plain = np.where(np.isnan(values), np.float32(np.nan), values) + np.float32(0.0)
    bits = np.ascontiguousarray(plain, dtype=np.float32).view(np.uint32)
    ascending = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    return np.where(valued, ~ascending, _NO_VALUE).astype(np.uint32)


def _values(keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    ascending = ~keys
    bits = np.where(ascending & _SIGN, ascending ^ _SIGN, ~ascending)
    return np.ascontiguousarray(bits, dtype=np.uint32).view(np.float32)


class Ranking:
    """Takes the rows of a corpus in order, then ranks them, then tells their fates in the same order.

    Parameters
    ----------
    folder
        Local folder for the files; 24 bytes a row, and again what is split.
    capacity
        Rows that are sorted in memory at a time.
    """

    def __init__(self, folder: Path, *, capacity: int) -> None:
        self._folder = folder
        self._capacity = max(1, capacity)
        self._keys = folder / "keys"
        self._keys.touch()
        self.rows = 0
        self._range = 0
        self._ranks, self._codes = np.empty(0, np.uint32), np.empty(0, np.uint8)

    def add(self, values: npt.NDArray[np.float32], valued: npt.NDArray[np.bool_], ties: npt.NDArray[np.uint64],
            tokens: npt.NDArray[np.int32]) -> None:  # fmt: skip
        """The next rows."""
        keys = np.empty(len(values), KEY)
        keys["value"], keys["tie"], keys["tokens"] = ordered(values, valued), ties, tokens
        keys["row"] = np.arange(self.rows, self.rows + len(values), dtype=np.uint64)
        with self._keys.open("ab") as file:
            keys.tofile(file)
        self.rows += len(values)

    def rank(self, judge: Judge) -> Totals:
        """Sort all rows and decide on each."""
        totals = Totals()
        rank, tokens = 0, 0
        for keys in _sorted_runs(self._keys, self._capacity, 0):
            valued = keys["value"] != _NO_VALUE
            values, own = _values(keys["value"]), keys["tokens"].astype(np.int64)
            ranks = np.arange(rank + 1, rank + len(keys) + 1, dtype=np.int64)
            codes = judge(values, valued, ranks, tokens + np.cumsum(own))
            if rank == 0 and valued[0]:
                totals.best = (float(values[0]), int(own[0]))
            rank, tokens = rank + len(keys), tokens + int(own.sum())
            totals.rows += np.bincount(codes, minlength=256)
            for code in np.unique(codes).tolist():
                totals.tokens[code] += int(own[codes == code].sum())
            self._write_fates(keys["row"], np.where(valued, ranks, 0).astype(np.uint32), codes)
        return totals

    def take(self, count: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """Ranks (0: none) and codes of the next rows, in the order in which they came."""
        while len(self._ranks) < count:
            ranks, codes = self._read_range()
            self._ranks, self._codes = np.concatenate([self._ranks, ranks]), np.concatenate([self._codes, codes])
        ranks, codes = self._ranks[:count], self._codes[:count]
        self._ranks, self._codes = self._ranks[count:], self._codes[count:]
        return ranks, codes

    def _read_range(self) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
        """Fates of the next range of places."""
        found = np.fromfile(self._fate_file(self._range), FATE)
        places = (found["row"] - np.uint64(self._range * self._capacity)).astype(np.int64)
        ranks, codes = np.empty(len(found), np.uint32), np.empty(len(found), np.uint8)
        ranks[places], codes[places] = found["rank"], found["code"]
        self._range += 1
        return ranks, codes

    def _write_fates(self, rows: npt.NDArray[np.uint64], ranks: npt.NDArray[np.uint32],
                     codes: npt.NDArray[np.uint8]) -> None:  # fmt: skip
        ranges = (rows // np.uint64(self._capacity)).astype(np.int64)
        for number in np.unique(ranges).tolist():
            here = ranges == number
            fates = np.empty(int(here.sum()), FATE)
            fates["row"], fates["rank"], fates["code"] = rows[here], ranks[here], codes[here]
            with self._fate_file(number).open("ab") as file:
                fates.tofile(file)

    def _fate_file(self, number: int) -> Path:
        return self._folder / f"fates-{number}"


def _sorted_runs(path: Path, capacity: int, depth: int) -> Iterator[Keys]:
    """The keys of a file in order, in runs of at most `capacity`; the file is removed."""
    total = path.stat().st_size // KEY.itemsize
    if total <= capacity:
        keys = np.fromfile(path, KEY)
        path.unlink()
        if len(keys):
            # stable, and a file holds its rows in order: the place needs no comparison
            yield keys[np.lexsort((keys["tie"], keys["value"]))]
        return
    counts = np.zeros(1 << 16, np.int64)
    for keys in _pieces(path, capacity):
        counts += np.bincount(_digit(keys, depth), minlength=1 << 16)
    children = _children(counts, max(capacity, -(-total // _FANOUT)))
    files = {number: path.with_name(f"{path.name}-{number}") for number in np.unique(children[counts > 0]).tolist()}
    _split(path, capacity, depth, children, files)
    path.unlink()
    for number, file in files.items():
        digits = np.count_nonzero(counts[children == number])
        yield from _sorted_runs(file, capacity, depth if digits > 1 else depth + 1)


def _children(counts: npt.NDArray[np.int64], share: int) -> npt.NDArray[np.int64]:
    """Which file each digit goes to: consecutive digits together while they hold at most `share` keys."""
    children = np.zeros(len(counts), np.int64)
    number = held = 0
    for digit in np.flatnonzero(counts).tolist():
        count = int(counts[digit])
        if held and held + count > share:
            number, held = number + 1, 0
        children[digit] = number
        held += count
    return children


def _split(path: Path, capacity: int, depth: int, children: npt.NDArray[np.int64], files: Mapping[int, Path]) -> None:
    opened = {number: file.open("wb") for number, file in files.items()}
    try:
        for keys in _pieces(path, capacity):
            target = children[_digit(keys, depth)]
            for number in np.unique(target).tolist():
                keys[target == number].tofile(opened[number])
    finally:
        for file in opened.values():
            file.close()


def _digit(keys: Keys, depth: int) -> npt.NDArray[np.int64]:
    name, shift = _DIGITS[depth]
    column = keys[name]
    digits: npt.NDArray[np.int64] = ((column >> column.dtype.type(shift)) & column.dtype.type(0xFFFF)).astype(np.int64)
    return digits


def _pieces(path: Path, rows: int) -> Iterator[Keys]:
    with path.open("rb") as file:
        while len(keys := np.fromfile(file, KEY, min(rows, 1 << 20))):
            yield keys
