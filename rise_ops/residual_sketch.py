"""From hidden states and next tokens to the sketches of residuals, a bounded slice of logits at a time.

How the support and the sketches of a position are computed is the way:

- numba: one compiled pass over its logits, on a CPU (`rise_ops.fused`).
- triton: kernels, on a GPU (`rise_ops.kernels`). What they find for the first positions is held against tensor
  operations; where it differs, or they cannot be compiled, a warning is logged, and tensor operations are used from
  then on.
- torch: tensor operations, anywhere (`rise_ops.support`): the reference of the other two.

A slice is so many positions that their logits are within the limit. Where whole rows of logits would be too few at a
time, or where the weight comes in shards, it is also a slice of the vocabulary (`rise_ops.unembedding`), and the
support comes from the largest entries of each; numba takes whole rows only, so that torch takes its place there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from rise_ops.config import SketchConfig
from rise_ops.sketch import SketchTables, column_codes
from rise_ops.support import Candidates, Residuals, residuals, residuals_of, top_entries, undecided
from rise_ops.unembedding import Top, Unembedding

DEFAULT_LOGIT_BYTES = 64 * 2**20
_LOGIT_COPIES = 3
"""How often a slice of logits exists at once, at most: itself, its undecided rows, and the soft-cap or groups."""
_SLICE_ROWS = 384
"""Positions of a slice beyond which its logits only leave the caches of a CPU."""
_FEWEST_ROWS = {"numba": 4, "torch": 256, "triton": 256}
"""Whole rows of logits below which slices of the vocabulary are taken: each product reads all of the weight."""
_SPLIT_ROWS = 256
_NARROWEST = 2048
"""Columns of a slice below which rather fewer rows are taken."""
_CANDIDATE_BYTES = 48
"""Of each of the `top_k` candidates of a row: value and token, those before, those of a slice, and both."""
_PROVING_ROWS = 256
_APART = 0.0141
"""Distance of vectors of unit length whose cosine is 0.9999."""

_logger = logging.getLogger(__name__)

Way = Literal["numba", "torch", "triton"]
Sketches = dict[str, torch.Tensor]
"""float32 [N, width] by name: r, g."""


class ResidualSketcher:
    """Sketches of the residuals under one LM head.

    Parameters
    ----------
    unembedding
        The LM head.
    tables, config
        What to sketch, and how.
    names
        Sketches that are wanted, of r and g; others are no matter.
    max_logit_bytes
        Memory for logits at a time, on each device.
    way
        How to compute; by default numba on a CPU, triton where it can be, else torch.
    """

    def __init__(
        self,
        unembedding: Unembedding,
        tables: SketchTables,
        config: SketchConfig,
        *,
        names: Sequence[str],
        max_logit_bytes: int,
        way: Way | None = None,
    ) -> None:
        self.config = config
        self._unembedding = unembedding
        self._limit = max_logit_bytes
        self._top_k = min(config.top_k, unembedding.vocab_size)
        self.way: Way = way or _fastest(unembedding.device, config)
        self.split = unembedding.shards > 1 or self._whole_rows() < _FEWEST_ROWS[self.way]
        """Whether slices of the vocabulary are taken."""
        if self.split and self.way == "numba":
            self.way = "torch"
        self._trusted = self.way != "triton"
        device = unembedding.device
        self._with_r = "r" in names
        self._buckets = tables.r.buckets.to(device)
        self._signs = tables.r.signs.to(device, torch.float32)
        self._codes = torch.from_numpy(column_codes(tables.r)).to(device)
        with torch.inference_mode():
            self.projected = unembedding.projected(tables.g.matrix(device=device)) if "g" in names else None
            """float32 [V, dim_g]: sketches of the weight's rows; None where g is not wanted."""

    def _whole_rows(self) -> int:
        """Rows of whole logits that are within the limit."""
        if self.way == "numba":  # by each of the threads
            return self._limit // (torch.get_num_threads() * 4 * self._unembedding.vocab_size)
        return self._limit // (_LOGIT_COPIES * 4 * self._unembedding.vocab_size)

    def shape(self) -> tuple[int, int]:
        """Positions and vocabulary entries whose logits are computed at a time.

        Of what is split, at least `top_k` entries of one position, whatever the limit is.
        """
        if not self.split:
            rows = self._whole_rows()
            return max(1, min(rows, _SLICE_ROWS) if self.way == "numba" else rows), self._unembedding.vocab_size
        column, longest, beside = _LOGIT_COPIES * 4, self._unembedding.longest, _CANDIDATE_BYTES * self._top_k
        rows = self._limit // (column * longest + beside)
        if rows < _SPLIT_ROWS:
            rows = max(1, min(_SPLIT_ROWS, self._limit // (column * min(_NARROWEST, longest) + beside)))
        width = (self._limit // rows - beside) // column
        return rows, min(longest, max(width, self._top_k))

    def slices_of(self, positions: int) -> tuple[int, int]:
        """In how many positions at a time, and by how many threads, so many positions are sketched."""
        threads = torch.get_num_threads() if self.way == "numba" else 1
        return min(self.shape()[0], max(1, -(-positions // threads))), threads

    def buffer(self, rows: int) -> torch.Tensor:
        """Memory for the logits of a slice of so many positions; one for each thread."""
        shape = (0, 0) if self.split else (rows, self._unembedding.vocab_size)
        return torch.empty(*shape, device=self._unembedding.device)

    def sketch(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        *,
        factors: Sketches,
        buffer: torch.Tensor,
    ) -> None:
        """Write the sketches of some positions, of unit length.

        Parameters
        ----------
        hidden
            [N, D] states.
        targets, positions
            int64 [N] next tokens, and the rows of `factors` that are written.
        factors
            float32 [P, width] by name.
        buffer
            From `buffer`.
        """
        if self.way == "numba":
            self._sketch_numba(hidden, targets, positions, factors, buffer)
            return
        if not self._trusted and targets.numel():
            self._prove(hidden[:_PROVING_ROWS], targets[:_PROVING_ROWS], buffer)
        if self.way == "triton":
            for name, sketches in self._by_kernels(hidden, targets, buffer).items():
                factors[name][positions] = sketches
            return
        for found in self._residuals(hidden, targets, buffer):
            rows = slice(None) if found.rows is None else found.rows
            for name, sketches in self.by_tensors(found, targets[rows]).items():
                factors[name][positions[rows]] = sketches

    def _sketch_numba(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        factors: Sketches,
        buffer: torch.Tensor,
    ) -> None:
        from rise_ops import fused

        scaled = self._unembedding.scaled(hidden, self.config.temperature, out=buffer)
        nothing = np.empty((self._unembedding.vocab_size, 0), np.float32)
        fused.sketch_residuals(
            scaled.numpy(),
            targets.numpy(),
            positions.numpy(),
            codes=self._codes.numpy(),
            projected=nothing if self.projected is None else self.projected.numpy(),
            out_r=factors["r"].numpy() if self._with_r else nothing,
            out_g=factors["g"].numpy() if self.projected is not None else nothing,
            config=self.config,
        )

    def _candidates(
        self, hidden: torch.Tensor, targets: torch.Tensor, count: int, *, top: Top = top_entries
    ) -> Candidates:
        """The largest scaled logits of each row, by slices of the vocabulary."""
        return self._unembedding.candidates(
            hidden, targets, count=count, temperature=self.config.temperature, width=self.shape()[1], top=top
        )

    def _residuals(self, hidden: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor) -> Iterable[Residuals]:
        if self.split:
            return [residuals_of(self._candidates(hidden, targets, self._top_k), targets, self.config)]
        return residuals(self._unembedding.scaled(hidden, self.config.temperature, out=buffer), targets, self.config)

    def by_tensors(self, found: Residuals, targets: torch.Tensor) -> Sketches:
        """Sketches of residuals, of unit length, by tensor operations."""
        sketches = {}
        if self._with_r:
            sketches["r"] = self._unit(self._sketch_r(found, targets))
        if self.projected is not None:
            sketches["g"] = self._unit(self._sketch_g(found, self.projected))
        return sketches

    def _by_kernels(self, hidden: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor) -> Sketches:
        from rise_ops import kernels

        if self.split:
            found = self._candidates(hidden, targets, self._top_k, top=kernels.top_entries)
        else:
            scaled = self._unembedding.scaled(hidden, self.config.temperature, out=buffer)
            own = scaled.gather(1, targets[:, None]).squeeze(1)
            found = Candidates(*kernels.top_entries(scaled, self._top_k), own)
        codes = self._codes if self._with_r else None
        return kernels.sketches(found, targets, codes=codes, projected=self.projected, config=self.config)

    def _prove(self, hidden: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor) -> None:
        """Hold kernels against tensor operations on some positions; go on with these if they differ."""
        more = min(self._top_k + 1, self._unembedding.vocab_size)
        decided = ~undecided(self._candidates(hidden, targets, more), targets, self.config)
        if not bool(decided.any()):
            return
        fault = self._fault(hidden, targets, buffer, decided)
        self._trusted = True
        if fault:
            self.way = "torch"
            _logger.warning(
                "Triton kernels on %s: %s; going on with tensor operations", self._unembedding.device, fault
            )

    def _fault(
        self, hidden: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor, decided: torch.Tensor
    ) -> str | None:
        """What is wrong with the kernels, if anything is."""
        from rise_ops import kernels

        try:
            by_kernels = self._by_kernels(hidden, targets, buffer)
        except torch.OutOfMemoryError:
            raise
        except kernels.FAILURES as error:
            return f"cannot run ({type(error).__name__}: {error})"
        for found in self._residuals(hidden, targets, buffer):
            rows = slice(None) if found.rows is None else found.rows
            for name, expected in self.by_tensors(found, targets[rows]).items():
                given, checked = by_kernels[name][rows], decided[rows]
                same = (given - expected).norm(dim=1) <= _APART
                same |= given.isnan().all(dim=1) & expected.isnan().all(dim=1)
                if not bool(same[checked].all()):
                    wrong = int((~same[checked]).sum())
                    return f"the sketches {name} of {wrong} of {int(checked.sum())} positions are wrong"
        return None

    def _sketch_r(self, found: Residuals, targets: torch.Tensor) -> torch.Tensor:
        """CountSketch of residuals, as `Σ_{v≠y} r_v (s_v e_b(v) − s_y e_b(y))`.

        Where v and y share bucket and sign the bracket is exactly zero. Summed one by one, `r_v` and `r_y ≈ −r_v`
        would leave rounding noise, which the scaling to unit length blows up.
        """
        rows, width = found.counts.numel(), self.config.dim_r
        buckets, signs = self._buckets[found.tokens], self._signs[found.tokens]
        target_buckets, target_signs = self._buckets[targets], self._signs[targets]
        same = (buckets == target_buckets[found.entry_rows]) & (signs == target_signs[found.entry_rows])
        others = found.values.masked_fill(same, 0)  # `same` holds for y itself, too
        flat = torch.zeros(rows * width, device=others.device)
        flat.scatter_add_(0, found.entry_rows * width + buckets, others * signs)
        sums = torch.zeros(rows, device=others.device).scatter_add_(0, found.entry_rows, others)
        sketch = flat.view(rows, width)
        return sketch.scatter_add_(1, target_buckets[:, None], (-target_signs * sums)[:, None])

    def _sketch_g(self, found: Residuals, projected: torch.Tensor) -> torch.Tensor:
        starts = found.counts.cumsum(0) - found.counts
        summed: torch.Tensor = functional.embedding_bag(
            found.tokens, projected, starts, mode="sum", per_sample_weights=found.values
        )
        return summed

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norms.clamp_min(self.config.eps)


def _fastest(device: torch.device, config: SketchConfig) -> Way:
    if device.type == "cpu":
        return "numba"
    if device.type != "cuda" or find_spec("triton") is None:
        return "torch"
    from rise_ops import kernels

    return "triton" if kernels.fit(config) else "torch"
