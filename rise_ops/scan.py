"""One pass over an index: every row against every query.

Influence of row x on query q is φ(x)·φ(q) with unit signatures. As many threads as PyTorch may use take a chunk each:
a thread reads a piece, takes its checksum, and scores a tile of rows as soon as it is there, so that a row is fetched
from memory once. Rows are widened to float32 in the registers (`rise_ops.products`), or, where BLAS is faster, in
panels of PANEL_COLUMNS columns, which stay in the cache and are multiplied with that part of the queries. Memory is a
few chunks with their scores and `queries · dim` floats, whatever the index's size (`rise_ops.memory.ScanMemory`).

Tiles are the same whatever the memory and the threads, and ties are broken by position (block, then row), so results
depend on none of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord, Float16Array, chunk_pieces, read_chunk, read_counts, read_records
from rise_ops.logs import each_block
from rise_ops.memory import PANEL_COLUMNS, TILE_ROWS, ScanMemory
from rise_ops.progress import Progress, silent
from rise_ops.store import Store
from rise_ops.threads import arithmetic_pool, read_ahead

Float32Array = npt.NDArray[np.float32]

BLOCK_SHIFT = 32
"""A row's ordinal is its block's position, shifted by this, plus its row."""
DEFAULT_MEMORY = ScanMemory(chunks=3, piece_rows=8 * TILE_ROWS)
_MERGE_BYTES = 8 * 2**20
_TILE_BYTES = 2**21


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
    scan = _Scan(store, identity, queries, memory=memory, keep_rows=False)
    for number, start, scores, _ in scan.pieces(enumerate(records)):
        yield number, start, scores


def iter_pieces(store: Store, identity: str, records: Iterable[tuple[int, BlockRecord]], queries: Float32Array, *,
                memory: ScanMemory = DEFAULT_MEMORY,
                ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
    """`iter_scores` of numbered records, with the signatures of each piece, [rows, dim] float16, overwritten, too."""
    yield from _Scan(store, identity, queries, memory=memory, keep_rows=True).pieces(records)


class _Room:
    """Memory that is used again: fresh memory is slower than a disk's cache."""

    def __init__(self, dtype: type[np.floating[Any]]) -> None:
        self._values: npt.NDArray[Any] = np.empty(0, dtype)

    def of(self, rows: int, columns: int) -> npt.NDArray[Any]:
        """[rows, columns]; what is there is left of the last use."""
        if self._values.size < rows * columns:
            self._values = np.empty(rows * columns, self._values.dtype)
        return self._values[: rows * columns].reshape(rows, columns)


class _Scan:
    """Threads that read, check and score a chunk each.

    From a disk a chunk comes in small pieces, and a tile is scored as soon as its last piece is there, all of it in the
    processor's caches; unless the rows are wanted, the next tile overwrites it. Over a network a chunk comes whole.

    Parameters
    ----------
    keep_rows
        Whether signatures are wanted, not scores alone.
    """

    def __init__(self, store: Store, identity: str, queries: Float32Array, *, memory: ScanMemory, keep_rows: bool,
                 ) -> None:  # fmt: skip
        self._store, self._identity = store, identity
        self._scorer = _Scorer(queries)
        self._piece_rows, self._at_once = memory.piece_rows, memory.chunks
        self._keep_rows, self._own = keep_rows, threading.local()
        self._rooms = [(_Room(np.float16), _Room(np.float32)) for _ in range(memory.chunks)]
        # requests wait for the network, not for a core
        self._pool = arithmetic_pool(torch.get_num_threads() if store.is_local else memory.chunks)

    def pieces(self, records: Iterable[tuple[int, BlockRecord]],
               ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
        """Pieces of numbered records, in their order: number, first row, scores, and rows where these are kept.

        Records are asked for in a thread of their own, so what they cost is hidden behind the arithmetic.
        """
        steady_heap()
        items = (
            (number, record, chunk, self._rooms.pop())
            for number, record in read_ahead(records, 2)
            for chunk in range(-(-record.rows // record.chunk_rows))
        )
        for number, first, scores, rows, rooms in self._pool.ahead(self._chunk, items, self._at_once):
            for start in range(0, len(scores), self._piece_rows):
                piece = slice(start, start + self._piece_rows)
                yield number, first + start, scores[piece], rows[piece]
            self._rooms.append(rooms)

    def _chunk(self, item: tuple[int, BlockRecord, int, tuple[_Room, _Room]],
               ) -> tuple[int, int, Float32Array, Float16Array, tuple[_Room, _Room]]:  # fmt: skip
        number, record, chunk, rooms = item
        count = min(record.chunk_rows, record.rows - chunk * record.chunk_rows)
        scores = rooms[1].of(count, len(self._scorer.queries))
        if self._store.is_local:
            rows = self._from_disk(record, chunk, scores, rooms[0])
        else:
            rows = read_chunk(self._store, self._identity, record, chunk)
            for tile in self._scorer.tiles(rows.shape):
                self._scorer.score(rows[tile], out=scores[tile])
        return number, chunk * record.chunk_rows, scores, rows, rooms

    def _from_disk(self, record: BlockRecord, chunk: int, scores: Float32Array, room: _Room) -> Float16Array:
        tiles = self._scorer.tiles((len(scores), record.dim))
        if not self._keep_rows:
            room = self._own.__dict__.setdefault("room", _Room(np.float16))
        held = record.chunk_rows if self._keep_rows else tiles[0].stop
        into = room.of(held, record.dim)
        number = 0
        for done in chunk_pieces(self._store, self._identity, record, chunk, into=into):
            while number < len(tiles) and done >= 2 * record.dim * tiles[number].stop:
                tile = tiles[number]
                at = tile.start % held
                self._scorer.score(into[at : at + tile.stop - tile.start], out=scores[tile])
                number += 1
        return into[: len(scores)]


class _Scorer:
    """Scores of tiles against the same queries, as this processor is fastest."""

    def __init__(self, queries: Float32Array) -> None:
        from rise_ops import products

        self.queries = np.ascontiguousarray(queries)
        self._own = threading.local()
        self._inner = products.inner_products if products.are_faster(len(queries)) else None

    def tiles(self, shape: tuple[int, ...]) -> list[slice]:
        """Rows of rows [rows, dim] that are scored at a time."""
        rows, dim = shape
        tile = TILE_ROWS if self._inner is None else min(TILE_ROWS, max(4, _TILE_BYTES // (8 * dim) * 4))
        return [slice(start, min(start + tile, rows)) for start in range(0, rows, tile)]

    def score(self, rows: Float16Array, *, out: Float32Array) -> None:
        """`out[rows, queries] = rows[rows, dim] @ queries[queries, dim].T`, float32, for the rows of a tile."""
        if self._inner is not None:
            self._inner(rows, self.queries, out)
            return
        if not hasattr(self._own, "panel"):
            self._own.panel = torch.empty(TILE_ROWS * PANEL_COLUMNS)
        tile, product = torch.from_numpy(rows), torch.from_numpy(out)
        parts = torch.from_numpy(self.queries).split(PANEL_COLUMNS, dim=1)
        for number, (part, queries) in enumerate(zip(tile.split(PANEL_COLUMNS, dim=1), parts, strict=True)):
            wide = self._own.panel[: part.numel()].view(part.shape).copy_(part)
            torch.addmm(product, wide, queries.T, beta=min(number, 1), out=product)


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
