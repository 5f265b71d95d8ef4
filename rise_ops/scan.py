"""One pass over an index: every row against every query.

Influence of row x on query q is φ(x)·φ(q) with unit signatures. Blocks are read chunk by chunk, one chunk
ahead of the arithmetic; a chunk is widened from float16 to float32 in small tiles that stay in cache, and
one GEMM a tile scores all queries. Memory is a few chunks plus `queries · dim` floats, whatever the index's
size.

Ties are broken by position (block, then row), so results do not depend on tiles or batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord, Float16Array, iter_signatures, read_counts, read_records
from rise_ops.progress import Progress, silent
from rise_ops.store import Store

Float32Array = npt.NDArray[np.float32]
T = TypeVar("T")

TILE_ROWS = 128
"""Rows widened and multiplied at a time: fewer cost threads that wait for each other, more leave the cache."""
BLOCK_SHIFT = 32
"""A row's ordinal is its block's position, shifted by this, plus its row."""
_AHEAD = 2


def iter_scores(store: Store, identity: str, records: Sequence[BlockRecord], queries: Float32Array,
                ) -> Iterator[Float32Array]:  # fmt: skip
    """Scores of each block's rows, [rows, queries] float32, in the order of `records`.

    Parameters
    ----------
    queries
        Unit signatures of the queries, [queries, dim].

    Raises
    ------
    IntegrityError
        A stored chunk is missing or damaged.
    """
    steady_heap()
    scorer = _Scorer(queries)
    chunks = _ahead((record, chunk) for record in records for chunk in iter_signatures(store, identity, record))
    for record in records:
        scores = np.empty((record.rows, len(queries)), dtype=np.float32)
        start = 0
        while start < record.rows:
            _, chunk = next(chunks)
            scorer.score(chunk, out=scores[start : start + len(chunk)])
            start += len(chunk)
        yield scores


class _Scorer:
    """Scores of chunks against the same queries, in buffers that are used again: fresh memory is slow."""

    def __init__(self, queries: Float32Array) -> None:
        self._queries = torch.from_numpy(np.ascontiguousarray(queries))
        self._half = torch.empty((TILE_ROWS, queries.shape[1]), dtype=torch.float16)
        self._tile = torch.empty((TILE_ROWS, queries.shape[1]), dtype=torch.float32)

    def score(self, chunk: Float16Array, *, out: Float32Array) -> None:
        """`out[rows, queries] = chunk[rows, dim] @ queries[queries, dim].T` in float32."""
        result = torch.from_numpy(out)
        for start in range(0, len(chunk), TILE_ROWS):
            rows = min(TILE_ROWS, len(chunk) - start)
            np.copyto(self._half[:rows].numpy(), chunk[start : start + rows])  # torch takes no read-only memory
            self._tile[:rows].copy_(self._half[:rows])
            torch.matmul(self._tile[:rows], self._queries.T, out=result[start : start + rows])


@dataclass(frozen=True, slots=True)
class ScoredBlock:
    """Scores of one block's rows."""

    record: BlockRecord
    position: int
    """Of the block, in the corpus' order of blocks."""
    scores: Float32Array
    """[rows, queries]; without meaning where `chunks` is 0."""
    tokens: npt.NDArray[np.int32]
    chunks: npt.NDArray[np.int32]


def score_blocks(store: Store, identity: str, block_ids: Sequence[str], queries: Float32Array, *, first_block: int = 0,
                 extremes: Extremes | None = None, progress: Progress = silent) -> Iterator[ScoredBlock]:  # fmt: skip
    """Score blocks one by one, feeding `extremes` with the rows that have a signature; `progress` counts rows."""
    records = list(read_records(store, identity, block_ids).values())
    done = 0
    for offset, scores in enumerate(iter_scores(store, identity, records, queries)):
        record, position = records[offset], first_block + offset
        tokens, chunks = read_counts(store, identity, record)
        if extremes is not None:
            usable = np.flatnonzero(chunks > 0)
            extremes.add(scores[usable], (position << BLOCK_SHIFT) + usable.astype(np.int64))
        done += record.rows
        progress(done, None)
        yield ScoredBlock(record, position, scores, tokens, chunks)


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
        self.top, self.top_rows = _smallest(self.k, -self.top, self.top_rows, -columns, rows, sign=-1)
        low = self.k if self.k_bottom is None else self.k_bottom
        self.bottom, self.bottom_rows = _smallest(low, self.bottom, self.bottom_rows, columns, rows, sign=1)


def _smallest(k: int, kept: Float32Array, kept_rows: npt.NDArray[np.int64], new: Float32Array,
              new_rows: npt.NDArray[np.int64], *, sign: int,
              ) -> tuple[Float32Array, npt.NDArray[np.int64]]:  # fmt: skip
    if kept.shape[1] == k:  # most rows are no candidate for any query: sorting them would cost more than the scores
        candidates = (new < kept[:, -1:]).any(axis=0)
        new, new_rows = new[:, candidates], new_rows[:, candidates]
    keys = np.concatenate([kept, new], axis=1)
    rows = np.concatenate([kept_rows, new_rows], axis=1)
    # stable: what was kept stands first and has lower ordinals, so ties keep their order
    order = np.argsort(keys, axis=1, kind="stable")[:, :k]
    return sign * np.take_along_axis(keys, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _ahead(items: Iterable[T]) -> Iterator[T]:
    """Iterate with a thread that reads up to two items ahead."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        pending: list[Future[list[T]]] = [pool.submit(lambda: list(islice(iterator, 1))) for _ in range(_AHEAD)]
        while True:
            item = pending.pop(0).result()
            if not item:
                return
            pending.append(pool.submit(lambda: list(islice(iterator, 1))))
            yield item[0]
