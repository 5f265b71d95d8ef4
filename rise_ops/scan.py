"""One pass over an index: every row against every query.

Influence of row x on query q is φ(x)·φ(q) with unit signatures. As many threads as PyTorch may use take a chunk each.
Rows are widened to float32 in the registers (`rise_ops.products`). On a disk they are read where the system has them:
copying them would take longer than all else together. Memory is a few chunks with their scores and `queries · dim`
floats, whatever the index's size (`rise_ops.memory.ScanMemory`).

The score of a row depends on nothing but the row, the query and the processor, and ties are broken by position (block,
then row), so results depend neither on memory nor on threads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord, Float16Array, map_chunk, read_chunk, read_counts, read_records
from rise_ops.logs import each_block
from rise_ops.memory import TILE_ROWS, ScanMemory
from rise_ops.products import aligned, checked_products, inner_products
from rise_ops.progress import Progress, silent
from rise_ops.store import Store
from rise_ops.threads import arithmetic_pool, read_ahead

Float32Array = npt.NDArray[np.float32]

BLOCK_SHIFT = 32
"""A row's ordinal is its block's position, shifted by this, plus its row."""
DEFAULT_MEMORY = ScanMemory(chunks=3, piece_rows=8 * TILE_ROWS)
_MERGE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Scores of some consecutive rows of a block."""

    record: BlockRecord
    position: int
    """Of the block, in the order of the blocks that are scored."""
    start: int
    """First row, in the block."""
    scores: Float32Array
    """[rows, queries]; without meaning where `chunks` is 0. Overwritten when the next rows come."""
    tokens: npt.NDArray[np.int32]
    chunks: npt.NDArray[np.int32]


def iter_scores(store: Store, identity: str, records: Sequence[BlockRecord], queries: Float32Array, *,
                memory: ScanMemory = DEFAULT_MEMORY) -> Iterator[tuple[int, int, Float32Array]]:  # fmt: skip
    """Scores of all rows in pieces: the record's number, the first row, [rows, queries] float32.

    Parameters
    ----------
    queries
        Unit signatures of the queries, [queries, dim].
    memory
        How much is read ahead and looked at at a time. The scores are overwritten by those of later pieces.

    Raises
    ------
    IntegrityError
        A stored chunk is missing or damaged.
    """
    for number, start, scores, _ in _Scan(store, identity, queries, memory=memory).pieces(enumerate(records)):
        yield number, start, scores


def iter_pieces(store: Store, identity: str, records: Iterable[tuple[int, BlockRecord]], queries: Float32Array, *,
                memory: ScanMemory = DEFAULT_MEMORY,
                ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
    """`iter_scores` of numbered records, with the signatures of each piece, [rows, dim] float16."""
    yield from _Scan(store, identity, queries, memory=memory).pieces(records)


class _Room:
    """Memory for scores that is used again: fresh memory takes longer than what is written there."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)

    def of(self, rows: int, columns: int) -> Float32Array:
        """[rows, columns]; what is there is left of the last use."""
        if self._values.size < rows * columns:
            self._values = np.empty(rows * columns, np.float32)
        return self._values[: rows * columns].reshape(rows, columns)


class _Scan:
    """Threads that read, check and score a chunk each.

    On a disk a chunk is scored and checked where the system has it; over a network it is fetched.
    """

    def __init__(self, store: Store, identity: str, queries: Float32Array, *, memory: ScanMemory) -> None:
        self._store, self._identity, self._queries = store, identity, aligned(queries)
        self._piece_rows, self._at_once = memory.piece_rows, memory.chunks
        self._rooms = [_Room() for _ in range(memory.chunks)]
        # requests wait for the network, not for a core
        self._pool = arithmetic_pool(torch.get_num_threads() if store.is_local else memory.chunks)

    def pieces(self, records: Iterable[tuple[int, BlockRecord]],
               ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
        """Pieces of numbered records, in their order: number, first row, scores, and rows.

        Records are asked for in a thread of their own, so what they cost is hidden behind the arithmetic.
        """
        steady_heap()
        items = (
            (number, record, chunk, self._rooms.pop())
            for number, record in read_ahead(records, 2)
            for chunk in range(-(-record.rows // record.chunk_rows))
        )
        for number, first, scores, rows, room in self._pool.ahead(self._chunk, items, self._at_once):
            for start in range(0, len(scores), self._piece_rows):
                piece = slice(start, start + self._piece_rows)
                yield number, first + start, scores[piece], rows[piece]
            self._rooms.append(room)

    def _chunk(self, item: tuple[int, BlockRecord, int, _Room],
               ) -> tuple[int, int, Float32Array, Float16Array, _Room]:  # fmt: skip
        number, record, chunk, room = item
        if self._store.is_local:
            rows, check = map_chunk(self._store, self._identity, record, chunk)
            scores = room.of(len(rows), len(self._queries))
            check(checked_products(rows, self._queries, scores))
        else:
            rows = read_chunk(self._store, self._identity, record, chunk)
            scores = room.of(len(rows), len(self._queries))
            inner_products(rows, self._queries, scores)
        return number, chunk * record.chunk_rows, scores, rows, room


def score_blocks(store: Store, identity: str, block_ids: Sequence[str], queries: Float32Array, *,
                 extremes: Extremes | None = None, ranked: int | None = None,
                 memory: ScanMemory = DEFAULT_MEMORY, progress: Progress = silent,
                 ) -> Iterator[ScoredRows]:  # fmt: skip
    """Score blocks one by one, feeding `extremes` with the rows that have a signature; `progress` counts rows.

    `ranked`: so many of the first queries are for `extremes`; all where None.
    """
    records = list(read_records(store, identity, block_ids).values())
    counts: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None = None
    done = 0
    pieces = iter_scores(store, identity, records, queries, memory=memory)
    for position, start, scores in each_block(pieces, lambda piece: records[piece[0]].block_id):
        record = records[position]
        if start == 0 or counts is None:
            counts = read_counts(store, identity, record)
        tokens, chunks = (column[start : start + len(scores)] for column in counts)
        if extremes is not None:
            usable = np.flatnonzero(chunks > 0)
            ordinals = (position << BLOCK_SHIFT) + start + usable.astype(np.int64)
            own = scores[:, :ranked]
            extremes.add(own if len(usable) == len(scores) else own[usable], ordinals)
        yield ScoredRows(record, position, start, scores, tokens, chunks)
        done += len(scores)
        progress(done, None)


@dataclass(slots=True)
class Extremes:
    """The highest and lowest scored rows of each query, kept while scores stream by.

    A row is named by its ordinal (BLOCK_SHIFT); of equal scores the lower ordinal wins.
    """

    k: int
    """Rows kept at the top."""
    k_bottom: int | None = None
    """Rows kept at the bottom; by default as many."""
    top: Float32Array = field(init=False)
    top_rows: npt.NDArray[np.int64] = field(init=False)
    bottom: Float32Array = field(init=False)
    bottom_rows: npt.NDArray[np.int64] = field(init=False)
    _empty: bool = field(default=True, init=False)

    def add(self, scores: Float32Array, ordinals: npt.NDArray[np.int64]) -> None:
        """Take in scores [rows, queries] of rows [rows]; calls must come in ascending order of ordinals."""
        columns = np.ascontiguousarray(scores.T)
        rows = np.broadcast_to(ordinals, columns.shape)
        if self._empty:
            nothing = np.empty((len(columns), 0))
            self.top = self.bottom = nothing.astype(np.float32)
            self.top_rows = self.bottom_rows = nothing.astype(np.int64)
            self._empty = False
        self.top, self.top_rows = smallest(self.k, self.top, self.top_rows, columns, rows, sign=-1)
        low = self.k if self.k_bottom is None else self.k_bottom
        self.bottom, self.bottom_rows = smallest(low, self.bottom, self.bottom_rows, columns, rows, sign=1)


def smallest(k: int, kept: Float32Array, kept_rows: npt.NDArray[np.int64], new: Float32Array,
             new_rows: npt.NDArray[np.int64], *, sign: int) -> tuple[Float32Array, npt.NDArray[np.int64]]:  # fmt: skip
    """The k smallest of `sign · score` for each query (row of the arrays), in order, and whose they are.

    Of equal ones those kept before come first, so rows must come in ascending order of ordinals. Some queries are
    merged at a time, so that memory is that of the result.
    """
    if kept.shape[1] == k:  # most rows are no candidate for any query: sorting them would cost more than the scores
        candidates = (sign * new < sign * kept[:, -1:]).any(axis=0)
        new, new_rows = new[:, candidates], new_rows[:, candidates]
        if not new.shape[1]:
            return kept, kept_rows
    queries, width = len(kept), kept.shape[1] + new.shape[1]
    best = np.empty((queries, min(k, width)), np.float32)
    best_rows = np.empty(best.shape, np.int64)
    step = max(1, _MERGE_BYTES // max(1, 32 * width))
    for part in (slice(start, start + step) for start in range(0, queries, step)):
        scores = np.concatenate([kept[part], new[part]], axis=1)
        rows = np.concatenate([kept_rows[part], new_rows[part]], axis=1)
        # stable: what was kept stands first and has lower ordinals, so ties keep their order
        order = np.argsort(sign * scores, axis=1, kind="stable")[:, :k]
        best[part] = np.take_along_axis(scores, order, axis=1)
        best_rows[part] = np.take_along_axis(rows, order, axis=1)
    return best, best_rows
