"""Search over SimHash codes, and rescoring of what it finds from the float index.

A query stays a float vector: its rotated coordinates are rounded to 8-bit integers, each query with its own step
(max|z| / 127, so the rounding adds less than 1 % to the standard error of the estimate), and multiplied with the bits
of the codes, unpacked to 0 and 1, in an integer matrix product with 32-bit sums: exact, so results do not depend on
tiles or order. `Σ sign·z = 2 Σ bit·z − Σ z` turns bits into signs. What comes out estimates the score without bias
(`rise_ops.simhash`).

With `rescore` the best `rescore · k` rows of each query are read from the float index, a range of bytes each, and
ranked by their exact scores, as `rise_ops.search` computes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.codes import read_codes, read_simhash
from rise_ops.config import SimHashConfig
from rise_ops.errors import MissingObjectError, ModelError
from rise_ops.index import read_rows
from rise_ops.logs import each_block
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, Float32Array
from rise_ops.search import Best, Found, Searched, Wanted, exact_scores, pick
from rise_ops.simhash import Codes, scale
from rise_ops.store import Store

TILE_ROWS = 1_024
_ROW_MASK = (1 << BLOCK_SHIFT) - 1
_PAIRS_AT_ONCE = 64


class CodeScorer:
    """Estimated scores of codes against the same queries.

    Parameters
    ----------
    projected
        Rotated queries, float32 [queries, bits] (`SimHash.project`).
    device
        Where the products are computed; on CUDA by the tensor cores.
    """

    def __init__(self, projected: Float32Array, *, device: torch.device | str = "cpu") -> None:
        queries, bits = projected.shape
        step = np.maximum(np.abs(projected).max(axis=1), 1e-30) / 127
        rounded = np.rint(projected / step[:, None]).astype(np.int8)
        padded = np.zeros((-(-queries // 8) * 8, bits), np.int8)  # integer products want multiples of 8
        padded[:queries] = rounded
        self._device = torch.device(device)
        self._queries = torch.from_numpy(padded).to(self._device).t()
        self._sums = rounded.sum(axis=1, dtype=np.int64)
        self._factor = (step * scale(bits)).astype(np.float32)
        self._count = queries

    def score(self, codes: Codes) -> Float32Array:
        """Estimates of the scores, [rows, bits/8] → float32 [rows, queries]."""
        found = np.empty((len(codes), self._count), np.float32)
        for start in range(0, len(codes), TILE_ROWS):
            tile = codes[start : start + TILE_ROWS]
            bits = np.zeros((max(32, -(-len(tile) // 8) * 8), 8 * codes.shape[1]), np.int8)
            bits[: len(tile)] = np.unpackbits(tile, axis=1).view(np.int8)
            product = torch._int_mm(torch.from_numpy(bits).to(self._device), self._queries).cpu().numpy()
            signed = 2 * product[: len(tile), : self._count] - self._sums
            found[start : start + len(tile)] = signed * self._factor
        return found


def search_codes(store: Store, identity: str, blocks: Sequence[str], queries: Float32Array, config: SimHashConfig, *,
                 k: int, k_bottom: int = 0, rescore: int = 4, wanted: Wanted | None = None,
                 device: torch.device | str = "cpu", progress: Progress = silent) -> tuple[Found, Found]:  # fmt: skip
    """`search.search` over codes.

    Parameters
    ----------
    rescore
        So many times k rows are scored from the float index; 0: estimates are returned as scores.

    Raises
    ------
    ModelError
        The index has no such codes.
    IntegrityError
        Codes of a block are missing or damaged.
    """
    try:
        simhash = read_simhash(store, identity, config, dim=queries.shape[1])
    except MissingObjectError:
        raise ModelError(
            f"index {identity[:12]} has no codes of {config.bits:,} bits with seed {config.seed}; run `curate compress`"
        ) from None
    searched = pick(store, identity, blocks, wanted)
    scorer = CodeScorer(simhash.project(queries), device=device)
    wider = max(1, rescore)
    ends = [Best(k * wider, len(queries), searched, sign=-1), Best(k_bottom * wider, len(queries), searched, sign=1)]
    done = 0
    for number, record in each_block(enumerate(searched.records), lambda item: item[1].block_id):
        codes = read_codes(store, identity, record.block_id, config)
        for start in range(0, len(codes), TILE_ROWS):
            usable = start + np.flatnonzero(searched.rows[number][start : start + TILE_ROWS])
            scores = scorer.score(codes[usable])
            for end in ends:
                end.add(scores, (number << BLOCK_SHIFT) + usable)
        done += len(codes)
        progress(done, None)
    if not rescore:
        return ends[0].found(), ends[1].found()
    top = _rescored(store, identity, searched, ends[0].rows, queries, k, sign=-1)
    return top, _rescored(store, identity, searched, ends[1].rows, queries, k_bottom, sign=1)


def _rescored(store: Store, identity: str, searched: Searched, rows: npt.NDArray[np.int64], queries: Float32Array,
              k: int, *, sign: int) -> Found:  # fmt: skip
    """The k best of some rows of each query, [queries, rows], by their exact scores."""
    best = Best(k, len(queries), searched, sign=sign)
    if not rows.size:
        return best.found()
    asked, places = np.nonzero(rows >= 0)
    named = rows[asked, places]
    order = np.argsort(named, kind="stable")
    asked, named = asked[order], named[order]
    distinct = np.unique(named)
    for start in range(0, len(distinct), _PAIRS_AT_ONCE):
        some = distinct[start : start + _PAIRS_AT_ONCE]
        signatures = _fetched(store, identity, searched, some)
        mine = slice(*np.searchsorted(named, [some[0], some[-1] + 1]).tolist())
        for query in np.unique(asked[mine]).tolist():
            own = np.searchsorted(some, named[mine][asked[mine] == query])
            exact = exact_scores(signatures[own], np.broadcast_to(queries[query], (len(own), queries.shape[1])))
            best.add_to(query, exact, some[own])
    return best.found()


def _fetched(store: Store, identity: str, searched: Searched, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
    blocks = rows >> BLOCK_SHIFT
    parts = [
        read_rows(store, identity, searched.records[number], rows[blocks == number] & _ROW_MASK)
        for number in np.unique(blocks).tolist()
    ]
    return np.concatenate(parts)
