"""Near-duplicates: of rows whose signatures are nearly parallel only the best one stays.

From the best row down, a row goes if a better row that itself stays is at the cosine or above, and its leader is the
best such row. So of a chain a ~ b ~ c, where c is too far from a, b goes for a and c stays. Candidates come from
bands of sign codes (`rise_ops.bands`), which find a pair at the cosine with the stated recall; whether a row goes is
decided by the cosine of the stored float16 signatures, products exact and summed in 64 bits. So no row goes that
should not, and a few that should may stay. Byte-identical signatures are always found.

One pass over the chunks leaves 2,048 bits and a digest of each row that takes part. Rows are then decided in batches
in the order of priority. Each band has a hash table of chains that hold the rows that stayed; a batch walks them,
and what codes call near is fetched from the store, row by row, and compared. A huge cluster costs one comparison a
row: rows that went are in no chain, and identical ones share the fate of the first.

Neither the order of blocks, but for row numbers and ties of priority, nor chunks, batches or memory change the
result. Columns of 0.5 to 1.5 KiB a row (the index: 48) are in memory as far as they fit, else in files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.bands import CODE_BITS, SAMPLE_ROWS, Bands, band_keys, differing_bits, plan_bands
from rise_ops.chains import Chains
from rise_ops.errors import LimitError
from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord
from rise_ops.index_rows import IndexRows, row_digests
from rise_ops.memory import CODE_ROWS, duplicates_memory
from rise_ops.progress import Progress, silent
from rise_ops.scratch import Column, Scratch
from rise_ops.simhash import SimHash
from rise_ops.store import Store

NOT_ELIGIBLE = np.uint64(2**64 - 1)
"""Priority of a row that takes no part: it neither goes nor makes others go."""
SEED = 7_919
"""Of the rotation."""
_BATCH_ROWS = 2_048
_PIECE_ROWS = 1 << 20
_CODES_AT_ONCE = 1 << 15
_PENDING_PAIRS = 1 << 20
_HELD = 4  # rows for each pair that is compared at a time
_PLACE = np.uint64(0xFFFFFFFF)
_NONE = 2**31 - 1

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
FloatArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class NearDuplicates:
    """Which rows go, and for which. Rows are numbered from 0 over all blocks, in order."""

    leaders: Int64Array
    """[rows]: the row that stays for this one, −1 where it stays itself or takes no part."""
    cosines: npt.NDArray[np.float32]
    """[rows]: cosine to the leader; 0 where there is none."""
    bands: Bands | None = None
    """How candidates were found; None where fewer than two rows took part."""
    rows: int = 0
    """Rows that took part."""
    removed: int = 0
    candidates: int = 0
    """Pairs whose codes were compared."""
    compared: int = 0
    """Pairs whose cosine was computed."""


def find_near_duplicates(store: Store, identity: str, blocks: Sequence[str] | Sequence[BlockRecord],
                         priority: UInt64Array, *, cosine: float, recall: float, memory: int, folder: Path,
                         progress: Progress = silent) -> Int64Array:  # fmt: skip
    """`NearDuplicates.leaders` of `near_duplicates`."""
    found = near_duplicates(
        store, identity, blocks, priority, cosine=cosine, recall=recall, memory=memory, folder=folder,
        progress=progress,
    )  # fmt: skip
    return found.leaders


def near_duplicates(store: Store, identity: str, blocks: Sequence[str] | Sequence[BlockRecord], priority: UInt64Array,
                    *, cosine: float, recall: float, memory: int, folder: Path, progress: Progress = silent,
                    ) -> NearDuplicates:  # fmt: skip
    """Find the rows that go because a better one is nearly the same.

    Parameters
    ----------
    store, identity, blocks
        The index, and its blocks in order, each once: ids or records.
    priority
        Of each row, smaller for a better one; the first of equal ones is better. NOT_ELIGIBLE takes no part, nor
        does a row without a signature.
    cosine
        From which rows are duplicates, in (0, 1].
    recall
        Part of the pairs at this cosine that are candidates, at least, in (0, 1).
    memory
        Bytes.
    folder
        Local folder for what does not fit; it must stay as long as the result is used.
    progress
        Is told rows that were read and decided, of twice all rows.

    Raises
    ------
    LimitError
        `memory` is too small for signatures of this width.
    IntegrityError
        The index is damaged.
    """
    steady_heap()
    index = IndexRows(store, identity, blocks)
    if len(priority) != index.rows:
        raise ValueError(f"{len(priority)} priorities for {index.rows} rows")
    plan = duplicates_memory(memory, dim=index.dim)
    _logger.info("%s", plan.plan.text)
    scratch = Scratch(folder, plan.columns)
    leaders = scratch.column("duplicates-leaders", (index.rows,), np.int64)
    for start in range(0, index.rows, _PIECE_ROWS):
        leaders.write(start, np.full(min(_PIECE_ROWS, index.rows - start), -1))
    cosines = scratch.column("duplicates-cosines", (index.rows,), np.float32)
    found = NearDuplicates(leaders.array, cosines.array)
    taking_part = _eligible(index, priority)
    found.rows = int(taking_part.sum())
    if found.rows >= _NONE:
        raise LimitError(f"near_duplicates can compare {_NONE:,} rows, not {found.rows:,}; raise the threshold before")
    if found.rows < 2:
        return found
    order = scratch.column("duplicates-order", (found.rows,), np.int64)
    _sort(priority, taking_part, order)
    coded = _Coded.of(index, taking_part, order, scratch, chunks=plan.chunks, progress=progress)
    found.bands = plan_bands(cosine, recall, rows=found.rows, sample=coded.sample())
    _logger.info("near_duplicates: %s", found.bands)
    decisions = _Decisions(order, leaders, cosines)
    search = _Search(index, decisions, coded, scratch, found, cosine=cosine, pairs=plan.pairs)
    for start in range(0, found.rows, _BATCH_ROWS):
        search.decide(start, min(start + _BATCH_ROWS, found.rows))
        progress(index.rows + min(start + _BATCH_ROWS, found.rows) * index.rows // found.rows, 2 * index.rows)
    return found


def _eligible(index: IndexRows, priority: UInt64Array) -> BoolArray:
    """Rows that take part, [rows]."""
    found = np.zeros(index.rows, np.bool_)
    for start, signed in index.signed():
        found[start : start + len(signed)] = signed & (priority[start : start + len(signed)] != NOT_ELIGIBLE)
    return found


def _sort(priority: UInt64Array, taking_part: BoolArray, order: Column) -> None:
    """Write the rows that take part in the order of priority, equal ones as they stand; a range at a time.

    Memory is that of a range, of some _PIECE_ROWS rows, and of all rows of one priority.
    """
    sample = np.sort(priority[:: max(1, len(priority) >> 16)])
    bounds = np.unique(sample[:: max(1, len(sample) * _PIECE_ROWS // max(1, len(priority)))])
    at = 0
    for low, high in pairwise([0, *bounds[1:].tolist(), int(NOT_ELIGIBLE)]):
        parts = []
        for start in range(0, len(priority), _PIECE_ROWS):
            piece = priority[start : start + _PIECE_ROWS]
            inside = taking_part[start : start + _PIECE_ROWS] & (piece >= low) & (piece < high)
            parts.append(start + np.flatnonzero(inside))
        rows = np.concatenate(parts)
        order.write(at, rows[np.argsort(priority[rows], kind="stable")])
        at += len(rows)


@dataclass(frozen=True, slots=True)
class _Coded:
    """What one pass over the index leaves of each row, by its place in the order of priority."""

    codes: Column
    """[rows, words] uint64."""
    digests: Column
    """[rows, 2] uint64."""
    whole: Column
    """Whether the signature has a length, [rows]."""

    @classmethod
    def of(cls, index: IndexRows, taking_part: BoolArray, order: Column, scratch: Scratch, *, chunks: int,
           progress: Progress) -> _Coded:  # fmt: skip
        """Read the chunks with rows that take part."""
        rows = len(order)
        places = scratch.column("duplicates-places", (index.rows,), np.int64)
        for start in range(0, rows, _PIECE_ROWS):
            some = order.read(start, start + _PIECE_ROWS)
            places.put(some, np.arange(start, start + len(some)))
        codes = scratch.column("duplicates-codes", (rows, CODE_BITS // 64), np.uint64)
        coded = cls(
            codes,
            scratch.column("duplicates-digests", (rows, 2), np.uint64),
            scratch.column("duplicates-whole", (rows,), np.bool_),
        )
        hasher = SimHash.from_seed(index.dim, CODE_BITS, SEED)
        for first, chunk in index.chunks(taking_part, at_once=chunks):
            here = np.flatnonzero(taking_part[first : first + len(chunk)])
            for start in range(0, len(here), CODE_ROWS):
                some = here[start : start + CODE_ROWS]
                coded._add(places.take(first + some), chunk[some], hasher)
            progress(first + len(chunk), 2 * index.rows)
            del chunk
        return coded

    def _add(self, places: Int64Array, signatures: npt.NDArray[np.float16], hasher: SimHash) -> None:
        wide = signatures.astype(np.float32)
        squares = np.einsum("ij,ij->i", wide, wide)
        self.whole.put(places, np.isfinite(squares) & (squares > 0))
        self.codes.put(places, hasher.codes(wide).view(np.uint64))
        self.digests.put(places, row_digests(signatures))

    def sample(self) -> npt.NDArray[np.uint8]:
        """Codes of some rows, evenly spaced in the order, [rows, bytes]."""
        places = np.unique(np.linspace(0, len(self.codes) - 1, SAMPLE_ROWS).astype(np.int64))
        return np.asarray(self.codes.take(places[self.whole.take(places)]).view(np.uint8))


@dataclass(frozen=True, slots=True)
class _Decisions:
    """Which rows go, and for which."""

    order: Column
    """Row numbers by place in the order of priority."""
    leaders: Column
    """Row numbers by row, −1 where it stays."""
    cosines: Column
    """By row."""

    def go(self, places: Int64Array, leaders: Int64Array, cosines: FloatArray) -> None:
        """Places go for other places, which stay."""
        rows = self.order.take(places)
        self.leaders.put(rows, self.order.take(leaders))
        self.cosines.put(rows, cosines)

    def follow(self, places: Int64Array, same: Int64Array) -> None:
        """Places go for identical ones on which was decided, or as these did."""
        rows, others = self.order.take(places), self.order.take(same)
        leaders = self.leaders.take(others)
        stays = leaders < 0
        self.leaders.put(rows, np.where(stays, others, leaders))
        self.cosines.put(rows, np.where(stays, 1, self.cosines.take(others)))


class _Search:
    """Decides on rows, which are named by their places in the order of priority, from the best one down."""

    def __init__(self, index: IndexRows, decisions: _Decisions, coded: _Coded, scratch: Scratch,
                 found: NearDuplicates, *, cosine: float, pairs: int) -> None:  # fmt: skip
        assert found.bands is not None
        self._index, self._decisions, self._coded, self._found = index, decisions, coded, found
        self._bands = found.bands
        self._cosine, self._pairs = cosine, pairs
        self._kept = Chains(scratch, "duplicates-bands", tables=self._bands.bands, rows=found.rows)
        self._seen = Chains(scratch, "duplicates-seen", tables=1, rows=found.rows)
        self._held: dict[int, npt.NDArray[np.float16]] = {}

    def decide(self, start: int, stop: int) -> None:
        """Decide on the next places."""
        places = np.arange(start, stop)
        digests = self._coded.digests.read(start, stop)
        whole = self._coded.whole.read(start, stop)
        first = start + _first_equal(digests)
        seen = self._seen_before(digests)
        new = (seen < 0) & (first == places)
        fresh = places[whole & new]
        leaders, cosines = self._leaders(fresh)
        goes = leaders >= 0
        self._decisions.go(fresh[goes], leaders[goes], cosines[goes])
        self._seen.add(0, digests[fresh - start, 0], fresh)
        again = whole & ~new
        self._decisions.follow(places[again], np.where(seen >= 0, seen, first)[again])
        self._found.removed += int(goes.sum() + again.sum())

    def _seen_before(self, digests: UInt64Array) -> Int64Array:
        """Earlier places with the same digests, −1 where there is none."""
        same = np.full(len(digests), -1, np.int64)
        for asking, places in self._seen.walk(0, digests[:, 0]):
            equal = (self._coded.digests.take(places) == digests[asking]).all(axis=1)
            same[asking[equal]] = places[equal]
        return same

    def _leaders(self, places: Int64Array) -> tuple[Int64Array, FloatArray]:
        """Leaders of new places, −1 where they stay, and the cosines; those that stay are added to the tables."""
        codes = self._coded.codes.take(places)
        keys = band_keys(codes.view(np.uint8), self._bands)
        leaders, cosines = self._among_kept(places, codes, keys)
        left = np.flatnonzero(leaders < 0)
        leaders[left], cosines[left] = self._among_each_other(places[left], codes[left], keys[left])
        stay = leaders < 0
        for band in range(self._bands.bands):
            self._kept.add(band, keys[stay, band], places[stay])
        return leaders, cosines

    def _among_kept(self, places: Int64Array, codes: UInt64Array, keys: UInt64Array) -> tuple[Int64Array, FloatArray]:
        """The best of the rows that stayed in earlier batches, for each place."""
        leaders, cosines = np.full(len(places), _NONE, np.int64), np.zeros(len(places))
        pending, held = [], 0
        for band in range(self._bands.bands):
            for asking, kept in self._kept.walk(band, keys[:, band]):
                near = self._near(codes, asking, kept)
                pending.append((asking[near].astype(np.uint64) << np.uint64(32)) | kept[near].astype(np.uint64))
                held += len(near)
                if held > _PENDING_PAIRS:
                    self._settle(pending, places, leaders, cosines)
                    pending, held = [], 0
        self._settle(pending, places, leaders, cosines)
        leaders[leaders == _NONE] = -1
        return leaders, cosines

    def _near(self, codes: UInt64Array, asking: Int64Array, kept: Int64Array) -> Int64Array:
        """Positions of the pairs whose codes are near."""
        self._found.candidates += len(asking)
        near = np.arange(len(asking))
        for bits, most in self._bands.near:
            words = bits // 64
            differing = differing_bits(codes[asking[near], :words], self._coded.codes.take(kept[near], words))
            near = near[differing <= most]
        return near

    def _settle(self, pending: list[UInt64Array], places: Int64Array, leaders: Int64Array, cosines: FloatArray) -> None:
        """Compare pairs (position << 32 | kept place) with the best ones first; fill in leaders that are better."""
        pairs = np.unique(np.concatenate(pending)) if pending else np.empty(0, np.uint64)
        while len(pairs):
            asking, kept = (pairs >> np.uint64(32)).astype(np.int64), (pairs & _PLACE).astype(np.int64)
            better = kept < leaders[asking]
            pairs, asking, kept = pairs[better], asking[better], kept[better]
            first = np.ones(len(pairs), np.bool_)
            first[1:] = asking[1:] != asking[:-1]
            near, cosine = self._compare(places[asking[first]], kept[first])
            hit = asking[first][near]
            leaders[hit], cosines[hit] = kept[first][near], cosine[near]
            pairs = pairs[~first]

    def _among_each_other(self, places: Int64Array, codes: UInt64Array, keys: UInt64Array,
                          ) -> tuple[Int64Array, FloatArray]:  # fmt: skip
        """Leaders within a batch, given that no row of an earlier one is."""
        leaders, cosines = np.full(len(places), -1, np.int64), np.zeros(len(places))
        candidates = self._candidates(codes, keys)
        self._hold(places[candidates.any(axis=0) | candidates.any(axis=1)][: _HELD * self._pairs])
        for leader in np.flatnonzero(candidates.any(axis=1)).tolist():
            if leaders[leader] >= 0:
                continue
            others = np.flatnonzero(candidates[leader] & (leaders < 0))
            near, cosine = self._compare(np.full(len(others), places[leader]), places[others])
            leaders[others[near]], cosines[others[near]] = places[leader], cosine[near]
        self._held.clear()
        return leaders, cosines

    def _candidates(self, codes: UInt64Array, keys: UInt64Array) -> BoolArray:
        """Whether a pair within a batch is near by its codes, [better, worse]."""
        found = np.zeros((len(keys), len(keys)), np.bool_)
        for band in range(self._bands.bands):
            order = np.argsort(keys[:, band], kind="stable")
            ordered = keys[order, band]
            for apart in range(1, len(order)):
                same = np.flatnonzero(ordered[apart:] == ordered[:-apart])
                if not len(same):
                    break
                found[order[same], order[same + apart]] = True
        better, worse = np.nonzero(found)
        self._found.candidates += len(better)
        for start in range(0, len(better), _CODES_AT_ONCE):
            one, other = better[start : start + _CODES_AT_ONCE], worse[start : start + _CODES_AT_ONCE]
            for bits, most in self._bands.near:
                far = differing_bits(codes[one, : bits // 64], codes[other, : bits // 64]) > most
                found[one[far], other[far]] = False
        return found

    def _compare(self, left: Int64Array, right: Int64Array) -> tuple[BoolArray, FloatArray]:
        """Whether pairs of places are duplicates, and their cosines, from the stored signatures."""
        near, cosines = np.empty(len(left), np.bool_), np.empty(len(left))
        for start in range(0, len(left), self._pairs):
            some = slice(start, start + self._pairs)
            both, at = np.unique(np.concatenate([left[some], right[some]]), return_inverse=True)
            rows = self._fetch(both).astype(np.float32)
            squares = _dots(rows, rows)
            one, other = np.split(at, 2)
            dots, scales = _dots(rows[one], rows[other]), np.sqrt(squares[one] * squares[other])
            near[some], cosines[some] = dots >= self._cosine * scales, dots / scales
        self._found.compared += len(left)
        return near, cosines

    def _hold(self, places: Int64Array) -> None:
        """Fetch signatures together that are asked for one after the other: a request may take long."""
        self._held = dict(zip(places.tolist(), self._fetch(places), strict=True))

    def _fetch(self, places: Int64Array) -> npt.NDArray[np.float16]:
        """Signatures, [places, dim]."""
        names = places.tolist()
        found = np.empty((len(names), self._index.dim), np.float16)
        missing = np.array([number for number, name in enumerate(names) if name not in self._held], np.int64)
        asked = places[missing]
        found[missing] = self._index.fetch(self._decisions.order.take(asked), self._coded.digests.take(asked))
        for number, name in enumerate(names):
            if name in self._held:
                found[number] = self._held[name]
        return found


def _first_equal(digests: UInt64Array) -> Int64Array:
    """The first row with the same digests, for each."""
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[group], np.int64)


def _dots(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Inner products, row by row: a product of two float16 numbers is exact in 32 bits, the sum is of 64."""
    return np.asarray((left * right).sum(axis=1, dtype=np.float64))
