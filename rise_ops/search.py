"""Exact search: the rows of highest and lowest influence on each query, the same whatever order they come in.

One pass over the index answers all queries. float32 products find candidates: a row whose product is within twice
the largest rounding error (n·2⁻²⁴ for unit vectors of n entries; Higham, 2002, section 3.1) of the k-th best so far
may be among the best. The scores of candidates are computed anew in float64, in an order of summation that only the
length decides (`exact_scores`), and rounded to float32. Rows of equal score are ordered by the id of their block,
which is its content, and then by row. So scores and order do not depend on the order of the blocks, on tiles, threads,
memory or the BLAS.

`wanted` restricts a search to some rows: those of a source, or with a label. A block without any is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.index import BlockRecord, Float16Array, read_counts, read_records
from rise_ops.logs import each_block
from rise_ops.memory import ScanMemory
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, DEFAULT_MEMORY, Float32Array, iter_pieces
from rise_ops.store import Store

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Wanted = Callable[[str], Mask]
"""From a block's id: which of its rows are searched, [rows], or [1] for all of them alike; rows behind it are not."""

_PAIRS_AT_ONCE = 16
_ROW_MASK = (1 << BLOCK_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class Found:
    """The best rows of each query at one end, best first."""

    scores: Float32Array
    """[queries, k]; fewer where fewer rows were searched."""
    rows: Indices
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
    searched = Searched(store, identity, blocks, wanted)
    # a little more: float16 leaves signatures not quite of unit length, and limits are rounded, too
    margin = 2.1 * (queries.shape[1] + 4) * 2.0**-24 * float(np.linalg.norm(queries, axis=1).max(initial=1.0))
    ends = [Best(k, len(queries), searched, sign=-1), Best(k_bottom, len(queries), searched, sign=1)]
    masks: dict[int, Mask] = {}

    def picked() -> Iterator[tuple[int, BlockRecord]]:
        for number, record in enumerate(searched.records):
            rows = searched.rows(number)
            if rows.any():
                masks[number] = rows
                yield number, record

    done = 0
    pieces = iter_pieces(store, identity, picked(), queries, memory=memory)
    for number, start, scores, signatures in each_block(pieces, lambda piece: searched.records[piece[0]].block_id):
        stop = start + len(scores)
        usable = np.flatnonzero(masks[number][start:stop])

        def exact(query: int, rows: Indices, own: Float16Array = signatures, at: Indices = usable) -> Float32Array:
            return exact_scores(own, at[rows], queries[query])

        for end in ends:
            end.add(scores if len(usable) == len(scores) else scores[usable],
                    (number << BLOCK_SHIFT) + start + usable, exact=exact, margin=margin)  # fmt: skip
        if stop == searched.records[number].rows:
            del masks[number]
        done += len(scores)
        progress(done, None)
    return ends[0].found(), ends[1].found()


class Searched:
    """The blocks that are looked at, and which of their rows.

    Parameters
    ----------
    store, identity
        The index.
    blocks
        Ids, each once.
    wanted
        Rows; all where None.

    Raises
    ------
    IntegrityError
        A block is not in the index.
    """

    def __init__(self, store: Store, identity: str, blocks: Sequence[str], wanted: Wanted | None) -> None:
        self._store, self._identity, self._wanted = store, identity, wanted
        self.records = list(read_records(store, identity, blocks).values())
        self._places = np.empty(len(self.records), np.int64)
        order = sorted(range(len(self.records)), key=lambda number: self.records[number].block_id)
        self._places[order] = np.arange(len(order))

    def rows(self, number: int) -> Mask:
        """The wanted rows of a block that have a signature, [rows]."""
        record = self.records[number]
        found = np.zeros(record.rows, bool)
        mask = np.ones(1, bool) if self._wanted is None else self._wanted(record.block_id)
        if mask.any():
            signed = read_counts(self._store, self._identity, record)[1] > 0
            width = record.rows if len(mask) == 1 else len(mask)
            found[:width] = signed[:width] & mask
        return found

    def order(self, ordinals: Indices) -> Indices:
        """Numbers by which rows of equal score are ordered: block id, then row."""
        return np.asarray((self._places[ordinals >> BLOCK_SHIFT] << BLOCK_SHIFT) | (ordinals & _ROW_MASK), np.int64)


def exact_scores(signatures: Float16Array, rows: Indices, query: Float32Array) -> Float32Array:
    """Inner products of some of the signatures with a query, [rows] float32.

    Products are exact in float64 (11 and 24 bits); they are added by folding the upper half onto the lower one until
    one number is left, and rounded once.
    """
    wide = query.astype(np.float64)
    found = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):  # so many stay in cache
        some = signatures[rows[start : start + _PAIRS_AT_ONCE]]
        sums = torch.from_numpy(some).float().numpy() * wide  # NumPy's own conversion of float16 is slow
        width = sums.shape[1]
        while width > 1:
            half = (width + 1) // 2
            sums[:, : width - half] += sums[:, half:width]
            width = half
        found[start : start + len(some)] = sums[:, 0]
    return found


class Best:
    """The k best rows of each query, in a stated order.

    Parameters
    ----------
    sign
        −1: the highest scores are best; 1: the lowest.
    """

    def __init__(self, k: int, queries: int, searched: Searched, *, sign: int) -> None:
        self._k, self._searched, self._sign = k, searched, sign
        self._scores = np.full((queries, k), np.inf, np.float32)  # times sign; inf: none yet
        self._rows = np.full((queries, k), -1, np.int64)

    def add(self, scores: Float32Array, ordinals: Indices, *, margin: float = 0.0,
            exact: Callable[[int, Indices], Float32Array] | None = None) -> None:  # fmt: skip
        """Take in float32 scores [rows, queries].

        Parameters
        ----------
        ordinals
            [rows]: number of the block, shifted by BLOCK_SHIFT, plus row.
        margin
            Twice what a score may be wrong by.
        exact
            Exact scores of a query and some rows, by their places in `scores`; where None, scores are exact.
        """
        if not self._k or not len(scores):
            return
        best = scores.max(axis=0) if self._sign < 0 else scores.min(axis=0)
        limits = self._scores[:, -1] + np.float32(margin)
        for query in np.flatnonzero(self._sign * best <= limits).tolist():  # soon, few have a candidate
            column = self._sign * scores[:, query]
            limit = limits[query]
            if len(column) > self._k:
                limit = min(limit, np.partition(column, self._k - 1)[self._k - 1] + np.float32(margin))
            near = np.flatnonzero(column <= limit)
            found = scores[near, query] if exact is None else exact(query, near)
            self.add_to(query, found, ordinals[near])

    def add_to(self, query: int, scores: Float32Array, rows: Indices) -> None:
        """Take in exact scores of some rows, by their ordinals, for one query."""
        held = self._rows[query] >= 0
        scores = np.concatenate([self._scores[query][held], self._sign * scores])
        rows = np.concatenate([self._rows[query][held], rows])
        best = np.lexsort((self._searched.order(rows), scores))[: self._k]
        self._scores[query, : len(best)], self._rows[query, : len(best)] = scores[best], rows[best]

    @property
    def rows(self) -> Indices:
        """Ordinals of the best rows, [queries, k]; −1 where there are fewer."""
        return self._rows

    def found(self) -> Found:
        """The result."""
        width = int((self._rows >= 0).sum(axis=1).max(initial=0))
        return Found(self._sign * self._scores[:, :width], self._rows[:, :width])
