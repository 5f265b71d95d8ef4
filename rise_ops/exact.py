"""Influence without sketches: what signatures estimate, computed exactly for some hundred rows.

With the factors of `rise_ops.head` before they are sketched (per position t: hidden state h_t, residual r_t,
back-projected residual g_t = Wᵀ r_t; each scaled to unit length: ĥ, r̂, ĝ), the inner product of two chunks is

    ⟨Φ_a, Φ_b⟩ = Σ_{t∈a, s∈b} w_rh² ⟨r̂_t, r̂_s⟩⟨ĥ_t, ĥ_s⟩ + w_gh² ⟨ĝ_t, ĝ_s⟩⟨ĥ_t, ĥ_s⟩ + w_rg² ⟨r̂_t, r̂_s⟩⟨ĝ_t, ĝ_s⟩

Chunks are scaled to unit length, a row is the mean of its chunks, scaled to unit length: the cosine of two such rows
is the limit of the signatures' inner product for infinite widths (`kernel`). `gradient` is the cosine of the LM-head
gradients themselves, Σ_t r_t h_tᵀ over all positions of a row, nothing scaled before: that of the training loss where
the configuration keeps the whole support (`top_k` of the vocabulary, no `adaptive_support`) at temperature 1.

Costs positions(rows) · positions(queries) · hidden width: a ruler for the sketch, not a way to score a corpus.
Residuals are sparse (`rise_ops.support`); queries' factors are held, rows stream by. Products of positions are float32,
their sums float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import embedding_bag, pad

from rise_ops.chunking import Chunk, plan_batches
from rise_ops.config import SketchConfig
from rise_ops.errors import SourceError
from rise_ops.progress import Progress, silent
from rise_ops.support import residuals
from rise_ops.trunk import Trunk

Kind = Literal["kernel", "gradient"]
Float64Array = npt.NDArray[np.float64]

_BATCH_TOKENS = 2_048
_PAIRS = 2**23
_ROWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class HiddenChunks:
    """Chunks of one micro-batch with what the model says of them."""

    chunks: Sequence[Chunk]
    """Their rows are indices into the texts."""
    ids: torch.Tensor
    """int64 [B, L], padded on the right."""
    hidden: torch.Tensor
    """float32 [B, L, D] states that enter the LM head."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each chunk."""
        return [len(chunk) for chunk in self.chunks]

    @property
    def loss_starts(self) -> list[int]:
        """First index of each chunk that counts as predicted."""
        return [chunk.loss_start for chunk in self.chunks]


@dataclass(frozen=True, slots=True, eq=False)
class SparseRows:
    """A matrix by its rows' entries."""

    starts: torch.Tensor
    """int64 [n + 1]: where each row's entries start."""
    columns: torch.Tensor
    """int64 [entries]."""
    values: torch.Tensor
    """float32 [entries]."""
    width: int
    """Columns of the matrix."""

    def rows(self) -> torch.Tensor:
        """Row of each entry."""
        return torch.repeat_interleave(self.starts.diff())

    def matmul(self, dense: torch.Tensor) -> torch.Tensor:
        """[n, width] · [width, m]."""
        return embedding_bag(
            self.columns, dense, self.starts, mode="sum", per_sample_weights=self.values, include_last_offset=True
        )

    def slice(self, first: int, last: int) -> SparseRows:
        """Some consecutive rows."""
        entries = slice(int(self.starts[first]), int(self.starts[last]))
        starts = self.starts[first : last + 1] - self.starts[first]
        return SparseRows(starts, self.columns[entries], self.values[entries], self.width)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Factors of the counted positions of some rows, by row, chunk and place."""

    hidden: torch.Tensor
    """[n, D] h_t."""
    back: torch.Tensor
    """[n, D] Wᵀ r_t."""
    residual: SparseRows
    """[n, V] r_t."""
    chunk_starts: npt.NDArray[np.int64]
    """First position of each chunk."""
    row_starts: npt.NDArray[np.int64]
    """First chunk of each row."""


def text_chunks(
    trunk: Trunk, texts: Sequence[str], prompts: Sequence[str | None] | None = None
) -> Iterator[HiddenChunks]:
    """Hidden states of all chunks of texts, as signatures see them; longest chunks first.

    Parameters
    ----------
    prompts
        As queries have them: where one is given, only what follows it counts.

    Raises
    ------
    SourceError
        A text has fewer than two tokens.
    """
    encoded = trunk.encode(texts, offsets=True)
    found = [trunk.query_chunks(row, each, prompts[row] if prompts else None) for row, each in enumerate(encoded)]
    for text, own in zip(texts, found, strict=True):
        if not own:
            raise SourceError(f"{text[:80]!r} has fewer than 2 tokens, so nothing predicts it; remove it")
    todo = [chunk for own in found for chunk in own]
    for batch in plan_batches([len(chunk) for chunk in todo], max_tokens=_BATCH_TOKENS, max_chunks=_BATCH_TOKENS):
        chunks = [todo[index] for index in batch]
        ids = torch.zeros(len(chunks), len(chunks[0]), dtype=torch.int64)
        for slot, chunk in enumerate(chunks):
            ids[slot, : len(chunk)] = torch.from_numpy(
                encoded[chunk.row].ids[chunk.start : chunk.stop].astype(np.int64)
            )
        yield HiddenChunks(chunks, ids, trunk.hidden_states(ids, [len(chunk) for chunk in chunks]).float())


@torch.inference_mode()
def read_factors(trunk: Trunk, sketch: SketchConfig, batches: Sequence[HiddenChunks]) -> Factors:
    """Factors of the chunks of whole rows; rows in ascending order."""
    weight = trunk.unembedding.float()
    order, parts = [], []
    for batch in batches:
        for slot, chunk in enumerate(batch.chunks):
            places = torch.arange(max(0, chunk.loss_start - 1), len(chunk) - 1)
            order.append((chunk.row, chunk.start))
            hidden, targets = (
                batch.hidden[slot, places].to(weight.device),
                batch.ids[slot, places + 1].to(weight.device),
            )
            parts.append((hidden, _residual(trunk.logits(hidden).div_(sketch.temperature), targets, sketch)))
    ranked = sorted(range(len(order)), key=lambda index: order[index])
    hidden = torch.cat([parts[index][0] for index in ranked])
    residual = _stack([parts[index][1] for index in ranked])
    sizes = np.array([len(parts[index][0]) for index in ranked])
    rows = np.array([order[index][0] for index in ranked])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return Factors(hidden, residual.matmul(weight), residual, starts, np.flatnonzero(np.diff(rows, prepend=-1)))


def _residual(scaled: torch.Tensor, targets: torch.Tensor, sketch: SketchConfig) -> SparseRows:
    """Residuals of some positions."""
    rows, columns, values = [], [], []
    for part in residuals(scaled, targets, sketch):
        rows.append(part.entry_rows if part.rows is None else part.rows[part.entry_rows])
        columns.append(part.tokens)
        values.append(part.values)
    order = torch.cat(rows).argsort(stable=True)
    starts = torch.cat(rows).bincount(minlength=len(targets)).cumsum(0)
    return SparseRows(pad(starts, (1, 0)), torch.cat(columns)[order], torch.cat(values)[order], scaled.shape[1])


def _stack(parts: Sequence[SparseRows]) -> SparseRows:
    counts = torch.cat([part.starts.diff() for part in parts])
    columns, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("columns", "values"))
    return SparseRows(pad(counts.cumsum(0), (1, 0)), columns, values, parts[0].width)


def exact_scores(trunk: Trunk, sketch: SketchConfig, texts: Sequence[str], queries: Sequence[str],
                 prompts: Sequence[str | None] | None = None, *, kind: Kind = "kernel",
                 progress: Progress = silent) -> Float64Array:  # fmt: skip
    """Influence of texts on queries without sketches, [texts, queries] in [−1, 1].

    Parameters
    ----------
    trunk
        The model.
    sketch
        Temperature, support, channels and their weights; widths and seed do not count.
    prompts
        Of the queries.
    kind
        `kernel`: what signatures estimate. `gradient`: the cosine of the plain LM-head gradients.
    progress
        Counts texts.

    Raises
    ------
    SourceError
        A text has fewer than two tokens.
    """
    ruler = Ruler(sketch, read_factors(trunk, sketch, list(text_chunks(trunk, queries, prompts))), kind=kind)
    scores = np.empty((len(texts), len(queries)))
    for start in range(0, len(texts), _ROWS):
        part = texts[start : start + _ROWS]
        scores[start : start + len(part)] = ruler.score(read_factors(trunk, sketch, list(text_chunks(trunk, part))))
        progress(start + len(part), len(texts))
    return scores


class Ruler:
    """Exact influence on some queries.

    Parameters
    ----------
    sketch
        Its channels and weights are used.
    queries
        Their factors.
    kind
        As in `exact_scores`.
    """

    def __init__(self, sketch: SketchConfig, queries: Factors, *, kind: Kind = "kernel") -> None:
        self._kind = kind
        weights = (
            {"rh": 1.0} if kind == "gradient" else {name: getattr(sketch, f"weight_{name}") for name in sketch.channels}
        )
        self._weights = {name: float(weight) ** 2 for name, weight in weights.items()}
        self._eps = sketch.eps
        self._queries = self._scaled(queries)
        self._own = self._scales(self._queries)

    @torch.inference_mode()
    def score(self, rows: Factors) -> Float64Array:
        """[rows, queries]."""
        scaled = self._scaled(rows)
        products = self._products(scaled, self._queries) * self._scales(scaled)[:, None] * self._own
        summed = np.add.reduceat(products, rows.row_starts, axis=0)
        return np.asarray(np.add.reduceat(summed, self._queries.row_starts, axis=1))

    def _scaled(self, factors: Factors) -> Factors:
        """Each factor of each position scaled to unit length; as it is for gradients."""
        if self._kind == "gradient":
            return factors
        residual, rows = factors.residual, factors.residual.rows()
        norms = residual.values.new_zeros(len(residual.starts) - 1).index_add_(0, rows, residual.values.square()).sqrt()
        unit = replace(residual, values=residual.values / norms.clamp_min(self._eps)[rows])
        hidden, back = (
            each / torch.linalg.vector_norm(each, dim=1, keepdim=True).clamp_min(self._eps)
            for each in (factors.hidden, factors.back)
        )
        return Factors(hidden, back, unit, factors.chunk_starts, factors.row_starts)

    def _scales(self, factors: Factors) -> Float64Array:
        """What a chunk's products are multiplied by, so that rows have unit length."""
        bounds = [*factors.row_starts.tolist(), len(factors.chunk_starts)]
        scales = np.ones(len(factors.chunk_starts))
        for start, stop in pairwise(bounds):
            own = _part(factors, start, stop)
            products = self._products(own, own)
            chunks = np.ones(stop - start) if self._kind == "gradient" else _inverse_root(np.diag(products), self._eps)
            scales[start:stop] = chunks * _inverse_root(chunks @ products @ chunks, self._eps)
        return scales

    def _products(self, left: Factors, right: Factors) -> Float64Array:
        """Σ over positions of the products of factors, [chunks of left, chunks of right]."""
        sums = np.empty((len(left.hidden), len(right.chunk_starts)))
        for start, stop in _blocks(right, max(1, _PAIRS // len(left.hidden))):
            part = _part(right, start, stop)
            inner = {"h": left.hidden @ part.hidden.T}
            if {"rh", "rg"} & self._weights.keys():
                inner["r"] = _sparse_products(left.residual, part.residual)
            if {"gh", "rg"} & self._weights.keys():
                inner["g"] = left.back @ part.back.T
            whole = sum(weight * inner[name[0]] * inner[name[1]] for name, weight in self._weights.items())
            table = torch.as_tensor(whole).cpu().numpy()
            sums[:, start:stop] = np.add.reduceat(table, part.chunk_starts, axis=1, dtype=np.float64)
        return np.asarray(np.add.reduceat(sums, left.chunk_starts, axis=0))


def _inverse_root(squares: Any, floor: float) -> Any:
    return 1.0 / np.maximum(np.sqrt(np.maximum(squares, 0.0)), floor)


def _blocks(factors: Factors, positions: int) -> Iterator[tuple[int, int]]:
    """Runs of chunks of at most so many positions, or of one chunk."""
    bounds = [*factors.chunk_starts.tolist(), len(factors.hidden)]
    start = 0
    for stop in range(1, len(bounds)):
        if stop == len(bounds) - 1 or bounds[stop + 1] - bounds[start] > positions:
            yield start, stop
            start = stop


def _part(factors: Factors, start: int, stop: int) -> Factors:
    """Some consecutive chunks, as one row."""
    bounds = [*factors.chunk_starts.tolist(), len(factors.hidden)]
    first, last = bounds[start], bounds[stop]
    return Factors(
        factors.hidden[first:last],
        factors.back[first:last],
        factors.residual.slice(first, last),
        factors.chunk_starts[start:stop] - first,
        np.zeros(1, np.int64),
    )


def _sparse_products(left: SparseRows, right: SparseRows) -> torch.Tensor:
    """left · rightᵀ, dense: by the columns that `right` has at all."""
    columns, places = right.columns.unique(return_inverse=True)
    dense = right.values.new_zeros(len(columns), len(right.starts) - 1)
    dense.index_put_((places, right.rows()), right.values, accumulate=True)
    slots = places.new_full((left.width,), -1)
    slots[columns] = torch.arange(len(columns), device=slots.device)
    own = slots[left.columns]
    kept = own >= 0
    counts = left.rows()[kept].bincount(minlength=len(left.starts) - 1)
    shared = SparseRows(pad(counts.cumsum(0), (1, 0)), own[kept], left.values[kept], len(columns))
    return shared.matmul(dense)
