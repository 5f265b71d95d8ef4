"""Signatures from hidden states and the LM head: the RISE estimator (arXiv 2604.16197).

For every position `t` that predicts a token `y = y_{t+1}` which counts:

    z = W h_t (+ bias, × logit scale, soft-capped)      s = z / temperature
    r = p − onehot(y) on the kept support of s          (`rise_ops.support`)
    ĥ, r̂, ĝ = CountSketches of h_t, r and Wᵀ r, each of unit length (norm floored at eps)
    φ = [weight_rh Σ_t r̂ ⊗ ĥ, weight_gh Σ_t ĝ ⊗ ĥ, weight_rg Σ_t r̂ ⊗ ĝ], row-major, of unit length

Only the configured channels are there, in the configured order. The LM-head gradient of position t is exactly
`r_t h_tᵀ`, so `⟨φ(a), φ(b)⟩` estimates how training on `a` moves the loss of `b`.

CountSketch is linear, so `ĝ` is a weighted sum of rows of `M = CS_g(W)`, computed once. Logits are computed for
counted positions only, a bounded slice at a time; `s`, softmax and sketches are float32 whatever the weights
are (`rise_ops.residual_sketch`). Runs on the device of the unembedding. Does not run the model: see `rise_ops.trunk`.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue

import torch

from rise_ops.config import SketchConfig
from rise_ops.errors import ModelError
from rise_ops.residual_sketch import DEFAULT_LOGIT_BYTES, ResidualSketcher, Way
from rise_ops.sketch import SketchTables
from rise_ops.threads import arithmetic_pool
from rise_ops.unembedding import Unembedding

__all__ = ["DEFAULT_LOGIT_BYTES", "ReadoutHead"]

_FACTORS: dict[str, tuple[str, str]] = {"rh": ("r", "h"), "gh": ("g", "h"), "rg": ("r", "g")}


class ReadoutHead:
    """The LM head of a model, ready to turn hidden states into signatures.

    Parameters
    ----------
    unembedding
        [V, D] LM-head weight, any floating dtype, on the device to compute on; or shards of it [V_s, D] in the
        vocabulary's order, possibly on several devices. Each is multiplied where it lies, and only the largest logits
        of each row travel to the first one's device, where the rest is computed. That has a sketch of the whole
        weight, float32 [V, dim_g], where the channels need it.
    config
        What to sketch.
    bias
        [V] LM-head bias.
    tables
        Sketch tables; drawn from `config.seed` unless given (an index brings its own).
    logit_scale
        Factor on the logits (Cohere; Granite divides).
    soft_cap
        Final soft-capping `cap · tanh(z / cap)` (Gemma 2).
    max_logit_bytes
        Memory for logits at a time, on each device. The result does not depend on it beyond rounding.
    way
        How support and sketches of residuals are computed, see `rise_ops.residual_sketch`; by default the fastest.

    Raises
    ------
    ModelError
        Shards, bias or tables do not fit each other or the configuration.
    """

    def __init__(
        self,
        unembedding: torch.Tensor | Sequence[torch.Tensor],
        config: SketchConfig,
        *,
        bias: torch.Tensor | None = None,
        tables: SketchTables | None = None,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
        max_logit_bytes: int = DEFAULT_LOGIT_BYTES,
        way: Way | None = None,
    ) -> None:
        self.config = config
        self._unembedding = Unembedding(unembedding, bias=bias, logit_scale=logit_scale, soft_cap=soft_cap)
        self.vocab_size, self.hidden_dim = self._unembedding.vocab_size, self._unembedding.hidden_dim
        self.device = self._unembedding.device
        if tables is None:
            tables = SketchTables.from_config(config, hidden_dim=self.hidden_dim, vocab_size=self.vocab_size)
        _check_tables(tables, config, hidden_dim=self.hidden_dim, vocab_size=self.vocab_size)
        self.tables = tables
        self._names = sorted({name for channel in config.channels for name in _FACTORS[channel]})
        self.residuals = ResidualSketcher(
            self._unembedding, tables, config, names=self._names, max_logit_bytes=max_logit_bytes, way=way
        )
        """What sketches residuals."""
        self._h_matrix = tables.h.matrix(device=self.device) if "h" in self._names else None

    def __repr__(self) -> str:
        return f"ReadoutHead(vocab_size={self.vocab_size}, hidden_dim={self.hidden_dim}, {self.config!r})"

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the model, in float32: [N, D] → [N, V]; written into `out` [≥ N, V] where given.

        All columns of all rows, whatever `max_logit_bytes` is.
        """
        return self._unembedding.logits(hidden, out=out)

    @torch.inference_mode()
    def signatures(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | Sequence[int],
        *,
        loss_start: torch.Tensor | Sequence[int] | int | None = None,
    ) -> torch.Tensor:
        """One signature per chunk.

        Parameters
        ----------
        hidden
            [B, L, D] hidden states that enter the LM head.
        token_ids
            int [B, L]; what stands behind a chunk's length is ignored.
        lengths
            [B] tokens of each chunk. Pass it and `loss_start` on the CPU to spare a device synchronisation.
        loss_start
            First index that counts as predicted, for all chunks or each; earlier positions are masked.

        Returns
        -------
        torch.Tensor
            float32 [B, dim] of unit length; zero for a chunk without a counted position.

        Raises
        ------
        ModelError
            Hidden states and token ids do not agree in number, or a length does not fit them.
        """
        summed = self._summed(self._factors(hidden, token_ids, lengths, loss_start))
        return summed.div_(self._norms(summed))

    @torch.inference_mode()
    def contributions(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | Sequence[int],
        vectors: torch.Tensor,
        *,
        loss_start: torch.Tensor | Sequence[int] | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How much each position adds to the inner products of the chunks' signatures with some vectors.

        The signature is a sum over positions divided by its norm, so `⟨φ, q⟩` is the sum over positions of

            (Σ over channels of weight · leftₜᵀ Q rightₜ) / norm        Q: the channel's part of q, as a matrix

        which needs no outer product of a position.

        Parameters
        ----------
        hidden, token_ids, lengths, loss_start
            As for `signatures`.
        vectors
            [K, dim]; the same for all chunks.

        Returns
        -------
        tuple
            float32 [B, K, L], entry t for what position t predicts, the token t + 1, zero where it does not count;
            and the signatures, float32 [B, dim].

        Raises
        ------
        ModelError
            As `signatures`, or the vectors are of another width.
        """
        if vectors.dim() != 2 or vectors.shape[1] != self.config.dim:
            raise ModelError(f"vectors of shape {list(vectors.shape)} do not fit signatures of width {self.config.dim}")
        factors = self._factors(hidden, token_ids, lengths, loss_start)
        summed = self._summed(factors)
        norms = self._norms(summed)
        batch, width = token_ids.shape
        found = torch.zeros(batch, vectors.shape[0], width, device=self.device)
        for number, vector in enumerate(vectors.to(self.device, torch.float32)):
            start = 0
            for channel in self.config.channels:
                left, right = (factors[name] for name in _FACTORS[channel])
                rows, columns = left.shape[2], right.shape[2]
                matrix = vector[start : start + rows * columns].view(rows, columns)
                weight = float(getattr(self.config, f"weight_{channel}"))
                found[:, number].add_(((left @ matrix) * right).sum(2), alpha=weight)
                start += rows * columns
        return found.div_(norms[:, None]), summed.div_(norms)

    def _factors(
        self,
        hidden: torch.Tensor,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | Sequence[int],
        loss_start: torch.Tensor | Sequence[int] | int | None,
    ) -> dict[str, torch.Tensor]:
        """Unit-length sketches [B, L, width] of every position; zero where it does not count."""
        batch, width = self._check(hidden, token_ids)
        positions = _counted_positions(lengths, loss_start, batch=batch, width=width).to(self.device)
        flat_hidden = hidden.reshape(batch * width, self.hidden_dim).to(self.device)
        flat_ids = token_ids.reshape(-1).to(self.device, torch.int64)
        widths = self.tables.widths
        factors = {name: torch.zeros(batch * width, widths[name], device=self.device) for name in self._names}
        rows, threads = self.residuals.slices_of(positions.numel())
        parts = positions.split(rows)
        buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(min(threads, len(parts))):
            buffers.put(self.residuals.buffer(rows))

        @torch.inference_mode()
        def sketch(part: torch.Tensor) -> None:
            states, targets = flat_hidden[part], flat_ids[part + 1]
            if self._h_matrix is not None:
                factors["h"][part] = self._unit(states.float() @ self._h_matrix)
            buffer = buffers.get()
            try:
                self.residuals.sketch(states, targets, part, factors=factors, buffer=buffer)
            finally:
                buffers.put(buffer)

        for _ in map(sketch, parts) if buffers.qsize() == 1 else arithmetic_pool(threads).map(sketch, parts):
            pass
        return {name: factor.view(batch, width, -1) for name, factor in factors.items()}

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        norms: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norms.clamp_min(self.config.eps)

    def _norms(self, x: torch.Tensor) -> torch.Tensor:
        """Lengths of rows, [B, 1], floored."""
        norms: torch.Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return norms.clamp_min(self.config.eps)

    def _summed(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Σ over positions of the weighted outer products, [B, dim]."""
        config = self.config
        batch = next(iter(factors.values())).shape[0]
        out = torch.empty(batch, config.dim, device=self.device)
        start = 0
        for channel in config.channels:
            left, right = (factors[name] for name in _FACTORS[channel])
            part = torch.bmm(left.transpose(1, 2), right).flatten(1)
            torch.mul(part, float(getattr(config, f"weight_{channel}")), out=out[:, start : start + part.shape[1]])
            start += part.shape[1]
        return out

    def _check(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> tuple[int, int]:
        if hidden.dim() != 3 or hidden.shape[:2] != token_ids.shape or hidden.shape[2] != self.hidden_dim:
            raise ModelError(
                f"hidden states of shape {list(hidden.shape)} do not match token ids of shape "
                f"{list(token_ids.shape)} and width {self.hidden_dim}; one hidden state per token is needed"
            )
        return int(token_ids.shape[0]), int(token_ids.shape[1])


def _counted_positions(
    lengths: torch.Tensor | Sequence[int],
    loss_start: torch.Tensor | Sequence[int] | int | None,
    *,
    batch: int,
    width: int,
) -> torch.Tensor:
    """Flat indices b·L + t of the positions whose prediction counts, ascending, on the CPU."""
    counts = torch.as_tensor(lengths, dtype=torch.int64, device="cpu").reshape(-1)
    if counts.numel() != batch or bool((counts > width).any()) or bool((counts < 0).any()):
        raise ModelError(f"lengths {counts.tolist()[:8]} do not fit {batch} chunks of up to {width} tokens")
    first = torch.zeros(1, dtype=torch.int64)
    if loss_start is not None:
        first = (torch.as_tensor(loss_start, dtype=torch.int64, device="cpu") - 1).clamp_min(0).reshape(-1, 1)
    if first.shape[0] not in (1, batch):
        raise ModelError(f"loss_start has {first.shape[0]} entries for {batch} chunks")
    slots = torch.arange(width)
    counted = (slots >= first) & (slots < counts[:, None] - 1)
    return counted.flatten().nonzero().squeeze(1)


def _check_tables(tables: SketchTables, config: SketchConfig, *, hidden_dim: int, vocab_size: int) -> None:
    have = {name: (getattr(tables, name).n_in, width) for name, width in tables.widths.items()}
    want = {"h": (hidden_dim, config.dim_h), "g": (hidden_dim, config.dim_g), "r": (vocab_size, config.dim_r)}
    for name, shape in want.items():
        if have[name] != shape:
            raise ModelError(
                f"sketch table {name} maps {have[name][0]} to {have[name][1]}, the model and configuration need "
                f"{shape[0]} to {shape[1]}; use the model that the tables were made for, or draw new ones"
            )
