"""Exact search: the rows of highest and lowest influence on each query, the same whatever order they come in.

One pass over the index answers all queries. float32 products find candidates: a row whose product is within twice
the largest rounding error (n·2⁻²⁴ for unit vectors of n entries; Higham, 2002, section 3.1) of the k-th best so far
may be among the best. The scores of candidates are computed anew in float64, row by row in a fixed order of summation,
and rounded to float32. Rows of equal score are ordered by the id of their block, which is its content, and then by row.
So scores and order do not depend on the order of the blocks, on tiles, threads or memory.

`wanted` restricts a search to some rows: those of a source, or with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rise_ops.index import BlockRecord, Float16Array, read_counts, read_records
from rise_ops.logs import each_block
from rise_ops.memory import ScanMemory
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, DEFAULT_MEMORY, Float32Array, iter_pieces
from rise_ops.store import Store

Indices = npt.NDArray[np.int64]
Wanted = Callable[[str], npt.NDArray[np.bool_]]
"""From a block's id: which of its rows are searched, [rows], or [1] for all of them alike; rows behind it are not."""

_PAIRS_AT_ONCE = 64
_ROW_MASK = (1 << BLOCK_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class Found:
    """The best rows of each query at one end, best first."""

    scores: Float32Array
    """[queries, k]; fewer where fewer rows were searched."""
    rows: npt.NDArray[np.int64]
    """[queries, k]: block's position, shifted by BLOCK_SHIFT, plus row."""


def search(store: Store, identity: str, blocks: Sequence[str], queries: Float32Array, *, k: int, k_bottom: int = 0,
           wanted: Wanted | None = None, memory: ScanMemory = DEFAULT_MEMORY,
           progress: Progress = silent) -> tuple[Found, Found]:  # fmt: skip
    """The `k` highest and `k_bottom` lowest scored rows of each query.

    Parameters
    ----------
    queries
        Unit signatures, [queries, dim].
    wanted
        Rows that are searched; all that have a signature where None.
    progress
        Counts rows.

    Raises
    ------
    IntegrityError
        A block or its signatures are missing or damaged.
    """
    searched = pick(store, identity, blocks, wanted)
    margin = 2 * queries.shape[1] * 2.0**-24 * float(np.linalg.norm(queries, axis=1).max(initial=1.0))
    ends = [Best(k, len(queries), searched, sign=-1), Best(k_bottom, len(queries), searched, sign=1)]
    done = 0
    pieces = iter_pieces(store, identity, searched.records, queries, memory=memory)
    for number, start, scores, signatures in each_block(pieces, lambda piece: searched.records[piece[0]].block_id):
        usable = np.flatnonzero(searched.rows[number][start : start + len(scores)])

        def exact(rows: Indices, asked: Indices, own: Float16Array = signatures, at: Indices = usable) -> Float32Array:
            return exact_scores(own[at[rows]], queries[asked])

        for end in ends:
            end.add(scores if len(usable) == len(scores) else scores[usable],
                    (number << BLOCK_SHIFT) + start + usable, exact=exact, margin=margin)  # fmt: skip
        done += len(scores)
        progress(done, None)
    return ends[0].found(), ends[1].found()


@dataclass(frozen=True, slots=True)
class Searched:
    """What is looked at: blocks with at least one such row."""

    records: list[BlockRecord]
    positions: npt.NDArray[np.int64]
    """Of these blocks among all that were given."""
    rows: list[npt.NDArray[np.bool_]]
    """Of each block, [rows]."""
    content: npt.NDArray[np.int64]
    """Rank of each block by its id."""


def pick(store: Store, identity: str, blocks: Sequence[str], wanted: Wanted | None) -> Searched:
    """The wanted rows that have a signature."""
    records, positions, picked = [], [], []
    for position, record in enumerate(read_records(store, identity, blocks).values()):
        rows = read_counts(store, identity, record)[1] > 0
        if wanted is not None:
            mask = wanted(record.block_id)
            rows &= mask if len(mask) in (1, len(rows)) else np.resize(np.append(mask, [False]), len(rows))
        if rows.any():
            records.append(record)
            positions.append(position)
            picked.append(rows)
    content = np.empty(len(records), np.int64)
    content[sorted(range(len(records)), key=lambda number: records[number].block_id)] = np.arange(len(records))
    return Searched(records, np.asarray(positions, np.int64), picked, content)


def exact_scores(rows: Float16Array, queries: Float32Array) -> Float32Array:
    """Inner products of pairs, [pairs, dim] with [pairs, dim], summed in float64 and rounded once."""
    return np.asarray(np.einsum("ij,ij->i", rows.astype(np.float64), queries.astype(np.float64)), np.float32)


class Best:
    """The k best rows of each query. `sign` −1: the highest; 1: the lowest."""

    def __init__(self, k: int, queries: int, searched: Searched, *, sign: int) -> None:
        self._k, self._searched, self._sign = k, searched, sign
        self._scores = np.full((queries, k), np.inf, np.float32)  # times sign; inf: none yet
        self._rows = np.full((queries, k), -1, np.int64)

    def add(self, scores: Float32Array, ordinals: Indices, *, margin: float = 0.0,
            exact: Callable[[Indices, Indices], Float32Array] | None = None) -> None:  # fmt: skip
        """Take in float32 scores [rows, queries].

        Parameters
        ----------
        ordinals
            [rows]: number of the searched block, shifted by BLOCK_SHIFT, plus row.
        margin
            Twice what a score may be wrong by.
        exact
            Exact scores of pairs, from places in `scores`; where None, scores are exact.
        """
        if not self._k or not len(scores):
            return
        signed = self._sign * scores
        limit = self._scores[:, -1]
        if len(scores) > self._k:
            limit = np.minimum(limit, np.partition(signed, self._k - 1, axis=0)[self._k - 1])
        queries, rows = np.nonzero((signed <= limit + np.float32(margin)).T)  # query by query
        found = scores[rows, queries] if exact is None else np.empty(len(rows), np.float32)
        for start in range(0, len(rows) if exact else 0, _PAIRS_AT_ONCE):
            part = slice(start, start + _PAIRS_AT_ONCE)
            found[part] = exact(rows[part], queries[part]) if exact else 0
        bounds = np.searchsorted(queries, np.arange(len(self._scores) + 1))
        for query in np.flatnonzero(np.diff(bounds)).tolist():
            mine = slice(bounds[query], bounds[query + 1])
            self.add_to(query, found[mine], ordinals[rows[mine]])

    def add_to(self, query: int, scores: Float32Array, rows: Indices) -> None:
        """Take in exact scores of some rows, by their ordinals, for one query."""
        held = self._rows[query] >= 0
        scores = np.concatenate([self._scores[query][held], self._sign * scores])
        rows = np.concatenate([self._rows[query][held], rows])
        content = (self._searched.content[rows >> BLOCK_SHIFT] << BLOCK_SHIFT) | (rows & _ROW_MASK)
        best = np.lexsort((content, scores))[: self._k]
        self._scores[query, : len(best)], self._rows[query, : len(best)] = scores[best], rows[best]

    @property
    def rows(self) -> Indices:
        """Ordinals of the best rows, [queries, k]; −1 where there are fewer."""
        return self._rows

    def found(self) -> Found:
        """The result, by the positions that the blocks were given in."""
        width = int((self._rows >= 0).sum(axis=1).max(initial=0))
        scores, rows = self._sign * self._scores[:, :width], self._rows[:, :width]
        return Found(scores, (self._searched.positions[rows >> BLOCK_SHIFT] << BLOCK_SHIFT) | (rows & _ROW_MASK))
