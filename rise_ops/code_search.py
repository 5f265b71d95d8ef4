"""Search over SimHash codes, and rescoring of what it finds from the float index.

A query stays a float vector: its rotated coordinates are rounded to 8-bit integers, each query with its own step
(max|z| / 127, so the rounding adds less than 1 % to the standard error of the estimate), and multiplied with the bits
of the codes, unpacked to 0 and 1, in an integer matrix product with 32-bit sums: exact, so results do not depend on
tiles or order. Where a processor has no instruction for that, PyTorch's product takes 23 times as long as one in
float32 (AMD EPYC with AVX2, 100 queries), whose sums are the same integers, exactly, below 2²⁴. `Σ sign·z = 2 Σ bit·z −
Σ z` turns bits into signs. What comes out estimates the score without bias (`rise_ops.simhash`). Codes are read ahead
by several threads.

Counting bits (and, popcount) takes eight passes for each query, one for each bit of its integers, where a product
takes one for all: about the same time for one query, a multiple for ten. Queries of one bit a coordinate would take
one pass each, but their estimate is neither unbiased nor linear.

With `rescore` the best `rescore · k` rows of each query are read from the float index, a range of bytes each, and
ranked by their exact scores, as `rise_ops.search` computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rise_ops.codes import read_codes, read_simhash
from rise_ops.config import SimHashConfig
from rise_ops.errors import MissingObjectError, ModelError
from rise_ops.heap import steady_heap
from rise_ops.index import read_rows
from rise_ops.logs import each_block
from rise_ops.memory import CODE_TILE_ROWS, CodesMemory, codes_memory
from rise_ops.products import multiplies_int8
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, Float32Array
from rise_ops.search import Best, Found, Indices, Mask, Searched, Wanted, exact_scores
from rise_ops.simhash import Codes, scale
from rise_ops.store import Store
from rise_ops.threads import ContextPool, arithmetic_pool

_ROW_MASK = (1 << BLOCK_SHIFT) - 1
_ROWS_AT_ONCE = 64
_EXACT_IN_FLOAT32 = 2**24


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
        self._device = torch.device(device)
        on_cpu = self._device.type == "cpu"
        self._in_float = on_cpu and not multiplies_int8() and 127 * bits < _EXACT_IN_FLOAT32
        width = queries if on_cpu else -(-queries // 8) * 8  # tensor cores want multiples of 8
        padded = np.zeros((width, bits), np.int8)
        np.rint(projected / step[:, None], out=padded[:queries], casting="unsafe")
        rounded = torch.from_numpy(padded).to(self._device)
        self._queries = (rounded.float() if self._in_float else rounded).t()
        self._sums = padded[:queries].sum(axis=1, dtype=np.int32)
        self._factor = (step * scale(bits)).astype(np.float32)

    def score(self, codes: Codes) -> Float32Array:
        """Estimates of the scores, [rows, bits/8] → float32 [rows, queries]."""
        rows = CODE_TILE_ROWS // 5 if self._in_float else CODE_TILE_ROWS  # five bytes a bit
        tiles = [codes[start : start + rows] for start in range(0, len(codes), rows)]
        found = [self._multiply(self._unpack(tile))[: len(tile)] for tile in tiles]
        return np.concatenate(found) if found else np.empty((0, len(self._sums)), np.float32)

    def _unpack(self, codes: Codes) -> torch.Tensor:
        """One number for each bit, 0 or 1, [rows, bits]; zeros below, because integer products want more rows."""
        if self._in_float:
            return torch.from_numpy(np.unpackbits(codes, axis=1)).float()
        rows, padded = len(codes), max(32, -(-len(codes) // 8) * 8)
        if self._device.type == "cpu":
            bits = np.unpackbits(codes, axis=1).view(np.int8)
            return torch.from_numpy(bits if padded == rows else np.pad(bits, ((0, padded - rows), (0, 0))))
        return unpacked(torch.from_numpy(np.pad(codes, ((0, padded - rows), (0, 0)))).to(self._device))

    def _multiply(self, bits: torch.Tensor) -> Float32Array:
        """Estimates of the scores of unpacked codes, [rows, bits] → float32 [rows, queries]."""
        sums: torch.Tensor = torch.mm(bits, self._queries) if self._in_float else torch._int_mm(bits, self._queries)
        signed = sums.cpu().numpy()[:, : len(self._sums)]
        np.multiply(signed, 2, out=signed)
        np.subtract(signed, self._sums, out=signed)
        return np.asarray(np.multiply(signed, self._factor, dtype=np.float32, casting="unsafe"))


def unpacked(codes: torch.Tensor) -> torch.Tensor:
    """One int8 for each bit, on the device where the codes are: [rows, bits/8] uint8 → [rows, bits]."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return ((codes[:, :, None] >> shifts) & 1).view(torch.int8).flatten(1)


def search_codes(store: Store, identity: str, blocks: Sequence[str], queries: Float32Array, config: SimHashConfig, *,
                 k: int, k_bottom: int = 0, rescore: int = 4, wanted: Wanted | None = None, memory: int = 2**30,
                 device: torch.device | str = "cpu", progress: Progress = silent) -> tuple[Found, Found]:  # fmt: skip
    """`search.search` over codes.

    Parameters
    ----------
    rescore
        So many times k rows are scored from the float index; 0: estimates are returned as scores.
    memory
        Bytes that the search may take.

    Raises
    ------
    ModelError
        The index has no such codes.
    LimitError
        So many queries do not fit in `memory`.
    IntegrityError
        Codes of a block are missing or damaged.
    """
    try:
        simhash = read_simhash(store, identity, config, dim=queries.shape[1])
    except MissingObjectError:
        raise ModelError(
            f"index {identity[:12]} has no codes of {config.bits:,} bits with seed {config.seed}; run `curate compress`"
        ) from None
    wider = max(1, rescore)
    plan = codes_memory(memory, queries=len(queries), dim=queries.shape[1], bits=config.bits,
                        kept=wider * (k + k_bottom), threads=torch.get_num_threads())  # fmt: skip
    steady_heap()
    searched = Searched(store, identity, blocks, wanted)
    scorer = CodeScorer(simhash.project(queries), device=device)
    ends = [Best(k * wider, len(queries), searched, sign=-1), Best(k_bottom * wider, len(queries), searched, sign=1)]
    done = 0
    tiles = _scored(store, identity, searched, config, simhash.identity, plan, scorer)
    for number, rows, scores in each_block(tiles, lambda tile: searched.records[tile[0]].block_id):
        for end in ends:
            end.add(scores, (number << BLOCK_SHIFT) + rows)
        done += len(rows)
        progress(done, None)
    if not rescore:
        return ends[0].found(), ends[1].found()
    top = _rescored(store, identity, searched, ends[0].rows, queries, k, sign=-1)
    return top, _rescored(store, identity, searched, ends[1].rows, queries, k_bottom, sign=1)


def _scored(store: Store, identity: str, searched: Searched, config: SimHashConfig, rotation: str, plan: CodesMemory,
            scorer: CodeScorer) -> Iterator[tuple[int, Indices, Float32Array]]:  # fmt: skip
    """Number of the block, rows, and their estimates, [rows, queries].

    Threads take a tile each, with one thread of BLAS: several on one product wait for each other at every tile, which
    costs a multiple where cores are not idle.
    """
    threads = torch.get_num_threads()

    def read(number: int) -> tuple[int, Mask, Codes | None]:
        mask = searched.rows(number)
        return (
            number,
            mask,
            read_codes(store, identity, searched.records[number].block_id, config, rotation=rotation)
            if mask.any()
            else None,
        )

    def tiles(pool: ContextPool) -> Iterator[tuple[int, Indices, Codes]]:
        # blocks of codes are small: several are asked for at a time, or latency would rule
        for number, mask, codes in pool.ahead(read, range(len(searched.records)), plan.blocks):
            if codes is not None:
                rows = np.flatnonzero(mask)
                for start in range(0, len(rows), CODE_TILE_ROWS):
                    yield number, rows[start : start + CODE_TILE_ROWS], codes[rows[start : start + CODE_TILE_ROWS]]

    workers = arithmetic_pool(threads)
    with ContextPool(plan.blocks) as readers:
        yield from workers.ahead(lambda tile: (*tile[:2], scorer.score(tile[2])), tiles(readers), threads + 1)


def _rescored(store: Store, identity: str, searched: Searched, rows: Indices, queries: Float32Array,
              k: int, *, sign: int) -> Found:  # fmt: skip
    """The k best of some rows of each query, [queries, rows], by their exact scores."""
    best = Best(k, len(queries), searched, sign=sign)
    asked, places = np.nonzero(rows >= 0)
    named = rows[asked, places]
    order = np.argsort(named, kind="stable")
    asked, named = asked[order], named[order]
    distinct = np.unique(named)
    for start in range(0, len(distinct), _ROWS_AT_ONCE):  # each row is read once, whoever asks for it
        some = distinct[start : start + _ROWS_AT_ONCE]
        signatures = read_rows(
            store, identity, [(searched.records[row >> BLOCK_SHIFT], row & _ROW_MASK) for row in some.tolist()]
        )
        mine = slice(*np.searchsorted(named, [some[0], some[-1] + 1]).tolist())
        for query in np.unique(asked[mine]).tolist():
            own = np.searchsorted(some, named[mine][asked[mine] == query])
            best.add_to(query, exact_scores(signatures, own, queries[query]), some[own])
    return best.found()
