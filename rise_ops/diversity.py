"""An order of rows in which each is far from those before it: greedy k-centre on the cosines of signatures.

The best row comes first, then always the row that is farthest from all before it (Gonzalez, Theoretical Computer
Science 38, 1985; for core-sets of training data Sener and Savarese, ICLR 2018). The first k rows of the order cover
the candidates within twice the smallest radius that any k rows could, in the length of the chord √(2 − 2 cos) or the
angle; both are metrics, and order rows as 1 − cos does. Distances are taken in steps of 2⁻²⁰, and of rows equally
far the better one comes first.

Exact, and still at the speed of matrix products: distances to the nearest row before only shrink. A pool of the
farthest rows is compared with each other, and rows are picked from it while the farthest one there is farther than
any outside was at last (lazy evaluation: Minoux, 1978); then one product brings all rows up to date.

Where this is too much, two things give way, in this order, and `KCenterPlan` says so; it depends on the sizes alone:
beyond `_EXACT_FLOPS` or `_EXACT_BYTES`, distances are those of a projection to 512 dimensions by a random rotation
(Johnson and Lindenstrauss, 1984), whose squared chords are off by √(2/512) = 6 % (standard deviation); beyond
`_MOST_FLOPS` picking ends early, and the rest follows by distance to the rows picked, farthest first, without regard
for each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.heap import steady_heap
from rise_ops.index import BlockRecord, Float16Array
from rise_ops.index_rows import IndexRows
from rise_ops.memory import CODE_ROWS, diversity_memory
from rise_ops.progress import Progress, silent
from rise_ops.simhash import SimHash
from rise_ops.store import Store

WIDTH = 512
"""Dimensions of the projection."""
SEED = 7_907
"""Of its rotation."""
_EXACT_FLOPS = 2**43  # some minutes on a core
_EXACT_BYTES = 8 * 2**30
_MOST_FLOPS = 2**46  # half an hour on a core
_POOL_ENTRIES = 2**23
_TILE_ENTRIES = 2**22
_STEPS = 2**20
_TIE = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
Float32Array = npt.NDArray[np.float32]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KCenterPlan:
    """How an order is made."""

    candidates: int
    count: int
    """Rows that are put in order."""
    width: int
    """Of the vectors that are compared."""
    projected: bool
    """Whether these are projections of the signatures."""
    greedy: int
    """Rows that are picked one after the other; the rest follows by distance to these."""
    pool: int
    """Rows that are compared with each other at a time."""

    @property
    def text(self) -> str:
        """One line for people."""
        how = f"a projection to {self.width:,} dimensions" if self.projected else "the stored signatures"
        rest = f", the others by distance to the first {self.greedy:,}" if self.greedy < self.count else ""
        return f"diversity: {self.count:,} of {self.candidates:,} rows by greedy k-centre on {how}{rest}"


def plan_k_center(candidates: int, count: int, *, dim: int) -> KCenterPlan:
    """How `count` of the candidates are put in order; `dim` is the width of signatures."""
    count = min(count, candidates)
    projected = dim > WIDTH and (
        2 * count * candidates * dim > _EXACT_FLOPS or 2 * candidates * dim > _EXACT_BYTES
    )  # fmt: skip
    width = WIDTH if projected else dim
    greedy = min(count, max(1, _MOST_FLOPS // max(1, 2 * candidates * width)))
    pool = max(1, min(candidates, 2_048, max(64, _POOL_ENTRIES // max(1, width))))
    return KCenterPlan(candidates, count, width, projected, greedy, pool)


def k_center_order(store: Store, identity: str, blocks: Sequence[str] | Sequence[BlockRecord], candidates: Int64Array,
                   count: int, *, memory: int, folder: Path, progress: Progress = silent) -> Int64Array:  # fmt: skip
    """The first `count` candidates in greedy k-centre order, row numbers, beginning with the first one.

    Parameters
    ----------
    store, identity, blocks
        The index, and its blocks in order: ids or records.
    candidates
        Row numbers over all blocks, each once, the best first; rows with a signature.
    memory
        Bytes.
    folder
        Local folder for the vectors that are compared: `2 · width` bytes a candidate.
    progress
        Is told rows that were picked, of `count`.

    Raises
    ------
    LimitError
        `memory` is too small for so many candidates.
    IntegrityError
        The index is damaged.
    """
    steady_heap()
    index = IndexRows(store, identity, blocks)
    if not len(candidates) or count < 1:
        return np.empty(0, np.int64)
    plan = plan_k_center(len(candidates), count, dim=index.dim)
    held = diversity_memory(memory, candidates=len(candidates), dim=index.dim, width=plan.width, pool=plan.pool)
    _logger.info("%s; %s", plan.text, held.plan.text)
    ranks = np.argsort(candidates, kind="stable")  # rank of each candidate, in the order of rows
    path = folder / "diversity-vectors"
    try:
        vectors = _Vectors(path, plan.width, _gather(index, candidates[ranks], path, plan, chunks=held.chunks))
        picked = _pick(vectors, ranks, plan, progress)
    finally:
        path.unlink(missing_ok=True)
    return np.asarray(candidates[ranks[picked]], np.int64)


def _gather(index: IndexRows, rows: Int64Array, path: Path, plan: KCenterPlan, *, chunks: int) -> Float32Array:
    """Write the vectors of ascending rows to a file; returns what scales each to unit length, 0 for none."""
    wanted = np.zeros(index.rows, np.bool_)
    wanted[rows] = True
    rotation = SimHash.from_seed(index.dim, plan.width, SEED) if plan.projected else None
    scales = np.zeros(len(rows), np.float32)
    with path.open("wb") as file:
        for first, chunk in index.chunks(wanted, at_once=chunks):
            begin, end = np.searchsorted(rows, [first, first + len(chunk)])
            for start in range(begin, end, CODE_ROWS):
                some = slice(start, min(start + CODE_ROWS, end))
                vectors = chunk[rows[some] - first]
                if rotation is not None:
                    turned = rotation.project(vectors.astype(np.float32))
                    vectors = (turned * _inverse_lengths(turned)[:, None]).astype(np.float16)
                scales[some] = _inverse_lengths(vectors.astype(np.float32))
                vectors.tofile(file)
            del chunk
    return scales


def _inverse_lengths(vectors: Float32Array) -> Float32Array:
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    usable = np.isfinite(lengths) & (lengths > 0)
    return np.asarray(np.where(usable, 1 / np.where(usable, lengths, 1), 0), np.float32)


class _Vectors:
    """The vectors that are compared, in a file."""

    def __init__(self, path: Path, width: int, scales: Float32Array) -> None:
        self._path, self._width, self.scales = path, width, scales
        self._tile_rows = max(64, min(1_024, _TILE_ENTRIES // width))

    def __len__(self) -> int:
        return len(self.scales)

    def tiles(self) -> Iterator[tuple[slice, Float16Array]]:
        """All of them in order; tiles are the same whatever the memory."""
        with self._path.open("rb") as file:
            for start in range(0, len(self), self._tile_rows):
                rows = slice(start, min(start + self._tile_rows, len(self)))
                tile = np.fromfile(file, np.float16, (rows.stop - rows.start) * self._width)
                yield rows, tile.reshape(-1, self._width)

    def unit(self, rows: Int64Array) -> torch.Tensor:
        """Some of them, of unit length, [rows, width] float32."""
        found = np.empty((len(rows), self._width), np.float32)
        with self._path.open("rb") as file:
            for place, row in enumerate(rows.tolist()):
                file.seek(2 * self._width * row)
                found[place] = np.fromfile(file, np.float16, self._width)
        found *= self.scales[rows, None]
        return torch.from_numpy(np.nan_to_num(found, copy=False))


def _pick(vectors: _Vectors, ranks: Int64Array, plan: KCenterPlan, progress: Progress) -> Int64Array:
    """Positions of the first rows of the order.

    A row's key is its distance, then its rank, in reverse: no two are the same, and the largest is the next pick.
    Its lower half stays; the key of a picked row is 0.
    """
    keys = (np.uint64(2 * _STEPS) << _SHIFT) | (_TIE - ranks.astype(np.uint64))
    picked = [int(np.argmin(ranks))]
    keys[picked] = 0
    fresh = vectors.unit(np.array(picked))
    while len(picked) < plan.greedy:
        _update(vectors, keys, fresh)
        pool, outside = _farthest(keys, plan.pool)
        units = vectors.unit(pool)
        cosines = (units @ units.T).numpy()
        left = keys[pool]
        chosen: list[int] = []
        while len(picked) + len(chosen) < plan.greedy:
            farthest = int(np.argmax(left))
            if left[farthest] <= outside:
                break
            chosen.append(farthest)
            left[farthest] = 0
            left = np.minimum(left, _steps(cosines[farthest]) | (left & _TIE))
        picked += pool[chosen].tolist()
        keys[pool[chosen]] = 0
        fresh = units[chosen]
        progress(len(picked), plan.count)
    if len(picked) < plan.count:
        _update(vectors, keys, fresh)
        rest, _ = _farthest(keys, plan.count - len(picked))
        picked += rest[np.argsort(keys[rest])[::-1]].tolist()
    return np.array(picked, np.int64)


def _update(vectors: _Vectors, keys: UInt64Array, fresh: torch.Tensor) -> None:
    """Shorten the distances of all rows by the rows picked since the last time."""
    for rows, tile in vectors.tiles():
        nearest = (torch.from_numpy(tile).float() @ fresh.T).max(dim=1).values.numpy()
        cosines = np.nan_to_num(nearest * vectors.scales[rows])
        keys[rows] = np.minimum(keys[rows], _steps(cosines) | (keys[rows] & _TIE))


def _steps(cosines: Float32Array) -> UInt64Array:
    """Upper half of keys."""
    return np.rint((1 - np.clip(cosines, -1, 1)) * _STEPS).astype(np.uint64) << _SHIFT


def _farthest(keys: UInt64Array, count: int) -> tuple[Int64Array, np.uint64]:
    """Positions of the largest keys, and the largest of the others."""
    if count >= len(keys):
        return np.arange(len(keys)), np.uint64(0)
    order = np.argpartition(keys, len(keys) - count - 1)
    return order[len(keys) - count :], keys[order[len(keys) - count - 1]]
