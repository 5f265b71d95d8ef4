"""One pass over an index: every row against every query.

Influence of row x on query q is φ(x)·φ(q) with unit signatures. Blocks are read chunk by chunk, some chunks
ahead of the arithmetic. Tiles of a chunk are scored by as many threads as PyTorch may use, each on its own: a thread
widens a panel of PANEL_COLUMNS columns from float16 to float32, which stays in its cache, multiplies it with that
part of the queries, and adds. Memory is a few chunks, `queries · dim` floats and the scores of a piece of a block,
whatever the index's size (`rise_ops.memory.ScanMemory`).

Tiles are the same whatever the memory and the threads, and ties are broken by position (block, then row), so results
depend on none of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord, Float16Array, read_chunk, read_counts, read_records
from rise_ops.logs import each_block
from rise_ops.memory import PANEL_COLUMNS, TILE_ROWS, ScanMemory
from rise_ops.progress import Progress, silent
from rise_ops.store import Store
from rise_ops.threads import ContextPool, arithmetic_pool

Float32Array = npt.NDArray[np.float32]
T = TypeVar("T")

BLOCK_SHIFT = 32
"""A row's ordinal is its block's position, shifted by this, plus its row."""
DEFAULT_MEMORY = ScanMemory(chunks=3, piece_rows=8 * TILE_ROWS)
_MERGE_BYTES = 8 * 2**20
_LEAST_AT_ONCE = 3


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
        How much is read ahead and scored at a time. The scores are overwritten by those of the next piece.

    Raises
    ------
    IntegrityError
        A stored chunk is missing or damaged.
    """
    for number, start, scores, _ in iter_pieces(store, identity, enumerate(records), queries, memory=memory):
        yield number, start, scores


def iter_pieces(store: Store, identity: str, records: Iterable[tuple[int, BlockRecord]], queries: Float32Array, *,
                memory: ScanMemory = DEFAULT_MEMORY,
                ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
    """`iter_scores` of numbered records, with the signatures of each piece, [rows, dim] float16, overwritten, too."""
    steady_heap()
    # with memory for it, the next piece is scored while the caller looks at this one
    ahead = 1 if memory.chunks >= _LEAST_AT_ONCE else 0
    scores = cycle([np.empty((memory.piece_rows, len(queries)), dtype=np.float32) for _ in range(1 + ahead)])
    pending: deque[tuple[_Piece, Float32Array, Callable[[], None]]] = deque()
    scorer = _Scorer(queries)
    with closing(_Chunks(store, identity, memory.chunks, held=ahead)) as chunks:
        for piece, buffer in zip(chunks.pieces(records, memory.piece_rows), scores, strict=False):
            out = buffer[: len(piece.rows)]
            pending.append((piece, out, scorer.start(piece.rows, out=out)))
            if len(pending) > ahead:
                yield from _finished(pending, chunks)
        while pending:
            yield from _finished(pending, chunks)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of a block."""

    number: int
    """The record's."""
    start: int
    """First row, in the block."""
    rows: Float16Array
    room: Float16Array | None
    """The chunk's memory, with its last piece."""


def _finished(pending: deque[tuple[_Piece, Float32Array, Callable[[], None]]], chunks: _Chunks,
              ) -> Iterator[tuple[int, int, Float32Array, Float16Array]]:  # fmt: skip
    """The first of the pieces that are scored, when it is."""
    piece, scores, wait = pending.popleft()
    wait()
    yield piece.number, piece.start, scores, piece.rows
    if piece.room is not None:
        chunks.free(piece.room)


class _Chunks:
    """Chunks of an index, read ahead into memory that is used again: fresh memory is slower than a disk's cache.

    Parameters
    ----------
    count
        Chunks in memory at a time.
    held
        How many of these the caller still has when it asks for the next.
    """

    def __init__(self, store: Store, identity: str, count: int, *, held: int) -> None:
        self._store, self._identity = store, identity
        self._free = [np.empty(0, np.float16) for _ in range(count)]
        self._at_once = count - held
        self._pool = ContextPool(self._at_once)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def free(self, room: Float16Array) -> None:
        """Give back a chunk's memory."""
        self._free.append(room)

    def pieces(self, records: Iterable[tuple[int, BlockRecord]], rows: int) -> Iterator[_Piece]:
        """Pieces of numbered records' chunks in their order; the memory of each chunk has to be given back.

        Records are asked for in a thread of their own, so what they cost is hidden behind the arithmetic.
        """
        items = (
            (number, record, chunk, self._free.pop())
            for number, record in read_ahead(records, 2)
            for chunk in range(-(-record.rows // record.chunk_rows))
        )
        for number, first, chunk, room in self._pool.ahead(self._read, items, self._at_once):
            for start in range(0, len(chunk), rows):
                last = start + rows >= len(chunk)
                yield _Piece(number, first + start, chunk[start : start + rows], room if last else None)

    def _read(self, item: tuple[int, BlockRecord, int, Float16Array]) -> tuple[int, int, Float16Array, Float16Array]:
        number, record, chunk, room = item
        size = record.chunk_rows * record.dim
        if room.size < size:
            room = np.empty(size, np.float16)
        into = room[:size].reshape(record.chunk_rows, record.dim)
        found = read_chunk(self._store, self._identity, record, chunk, into=into)
        return number, chunk * record.chunk_rows, found, room


class _Scorer:
    """Scores of chunks against the same queries, in buffers that are used again: fresh memory is slow."""

    def __init__(self, queries: Float32Array) -> None:
        self._queries = torch.from_numpy(np.ascontiguousarray(queries))
        self._own = threading.local()
        self._pool = arithmetic_pool(torch.get_num_threads())

    def start(self, chunk: Float16Array, *, out: Float32Array) -> Callable[[], None]:
        """Begin `out[rows, queries] = chunk[rows, dim] @ queries[queries, dim].T`, float32; call what comes to wait."""
        tiles = zip(torch.from_numpy(chunk).split(TILE_ROWS), torch.from_numpy(out).split(TILE_ROWS), strict=True)
        scored = [self._pool.submit(self._score_tile, *tile) for tile in tiles]

        def wait() -> None:
            for each in scored:
                each.result()

        return wait

    def _score_tile(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        if not hasattr(self._own, "panel"):
            self._own.panel = torch.empty(TILE_ROWS * PANEL_COLUMNS)
        panels = zip(rows.split(PANEL_COLUMNS, dim=1), self._queries.split(PANEL_COLUMNS, dim=1), strict=True)
        for number, (part, queries) in enumerate(panels):
            wide = self._own.panel[: part.numel()].view(part.shape).copy_(part)
            torch.addmm(out, wide, queries.T, beta=min(number, 1), out=out)


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


def read_ahead(items: Iterable[T], count: int) -> Iterator[T]:
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
