"""Projected gradients of linear modules, after TrackStar (Chang et al., 2024, arXiv 2410.17413).

For each linear module of the trunk with weight gradient G = Σ_t g_t a_tᵀ (g_t: gradient at its output, a_t: its input
at position t), the projection P_outᵀ G P_in is a matrix of `projection` squared numbers. It is the sum over positions
of (P_outᵀ g_t)(P_inᵀ a_t)ᵀ, so a batch of texts takes one backward pass, and no whole gradient is made. P are Gaussian.
The modules' matrices are one vector, scaled to unit length. (The paper's projections are wider.)

With `precondition`, each module's part is multiplied by R^(−1/2), with R the second moment of the rows' parts, of unit
length and as they are stored, plus a tenth of its mean diagonal (the paper's Hessian approximation, without the task's
own part), and scaled to unit length again. There is no optimizer whose second moments could divide the gradients, so
that correction is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.baselines.base import Float32Array, Need, Query, Rows, Setting, VectorMethod
from rise_ops.baselines.language import BATCH_TOKENS, backward_bytes, batches, differentiable, token_losses, tokenized
from rise_ops.compare_config import TrackStarMethod
from rise_ops.errors import ModelError
from rise_ops.model_shape import linear_modules
from rise_ops.progress import Progress, silent

_DAMPING = 0.1
_FLOOR = 1e-12


class TrackStar(VectorMethod):
    """Projected and preconditioned gradients of linear modules."""

    paper = "arXiv 2410.17413"
    draws = True
    differentiates = True

    def __init__(self, setting: Setting, config: TrackStarMethod) -> None:
        super().__init__(setting)
        self._config = config
        self._roots: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Numbers of a row: those of all modules."""
        return len(self.setting.shape.modules) * self._config.projection**2

    def need(self) -> Need:
        """A backward pass over a batch, projections, and the second moments of each module."""
        shape, size = self.setting.shape, self._config.projection
        tokens = max(self._config.max_tokens, BATCH_TOKENS)
        projections = sum(4 * size * (out + inside) for out, inside in shape.modules)
        projected = 4 * 2 * size * tokens * len(shape.modules)
        moments = 3 * 8 * len(shape.modules) * size**4 if self._config.precondition else 0
        embeddings = 2 * 4 * shape.vocab_size * shape.hidden_dim  # whose gradient is made on the way
        need = backward_bytes(shape, tokens) + projections + projected + moments + embeddings + self.vector_bytes()
        return Need(need, f"a backward pass over {tokens:,} tokens, projections of {len(shape.modules):,} modules")

    def load(self) -> None:
        """The model, and a pair of projections for each module."""
        super().load()
        generator, size = torch.Generator().manual_seed(self.setting.seed), self._config.projection
        self._modules = [
            (module, *(torch.randn(side, size, generator=generator).to(self.trunk.device) / size**0.5
                       for side in (out, inside)))
            for module, out, inside in linear_modules(self.trunk.model)
        ]  # fmt: skip

    def row_vectors(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Unit vectors, float16; zeros for a row of fewer than two tokens."""
        return self._projected([Query(text) for text in texts]).cpu().numpy().astype(np.float16)

    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Unit vectors, preconditioned as the rows are."""
        return self._preconditioned(self._projected(queries)).cpu().numpy()

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Vectors of all rows; where asked for, preconditioned in a second pass over them."""
        stored = super().build(rows, progress=progress)
        if self._config.precondition:
            self._roots = self._inverse_roots()
            start = 0
            for tile in self.tiles():
                done = self._preconditioned(torch.from_numpy(tile).to(self.trunk.device))
                self._index.write(start, done.cpu().numpy().astype(np.float16))
                start += len(tile)
        return stored

    def _projected(self, queries: Sequence[Query]) -> torch.Tensor:
        """Unit vectors float32 [texts, width]."""
        texts = tokenized(self.trunk, queries, max_tokens=self._config.max_tokens)
        found = torch.zeros(len(texts), self.width, device=self.trunk.device)
        with differentiable(self.trunk, embeddings_only=True):
            for batch in batches(self.trunk, texts):
                with self._watched(len(batch.places)) as parts:
                    losses = token_losses(self.trunk, batch)
                    (losses.sum(dim=1) / batch.counts.sum(dim=1)).sum().backward()
                found[batch.places] = torch.nn.functional.normalize(parts.flatten(1), dim=1)
        self.trunk.model.zero_grad(set_to_none=True)
        return found

    @contextmanager
    def _watched(self, texts: int) -> Iterator[torch.Tensor]:
        """Within it, backward passes add projected gradients to [texts, modules, projection, projection]."""
        size = self._config.projection
        parts = torch.zeros(texts, len(self._modules), size, size, device=self.trunk.device)
        hooks = [
            module.register_forward_hook(_watcher(parts[:, number], left, right))
            for number, (module, left, right) in enumerate(self._modules)
        ]
        try:
            yield parts
        finally:
            for hook in hooks:
                hook.remove()

    def _inverse_roots(self) -> torch.Tensor:
        """R^(−1/2) of each module, float32 [modules, projection², projection²]."""
        modules, size = len(self._modules), self._config.projection**2
        moments = torch.zeros(modules, size, size, dtype=torch.float64, device=self.trunk.device)
        for tile in self.tiles():
            parts = torch.from_numpy(tile).to(self.trunk.device).view(len(tile), modules, size).transpose(0, 1)
            moments += parts.transpose(1, 2) @ parts
        moments /= max(1, len(self._index))
        damping = _DAMPING * moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(_FLOOR)
        values, vectors = torch.linalg.eigh(moments)
        roots = (values.clamp_min(0) + damping[:, None]).rsqrt()
        found: torch.Tensor = ((vectors * roots[:, None, :]) @ vectors.transpose(1, 2)).float()
        return found

    def _preconditioned(self, vectors: torch.Tensor) -> torch.Tensor:
        if self._roots is None:
            return vectors
        parts = vectors.view(len(vectors), len(self._modules), -1).transpose(0, 1)
        return torch.nn.functional.normalize((parts @ self._roots).transpose(0, 1).flatten(1), dim=1)


def _watcher(part: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Any:
    """A forward hook: what enters a module is projected, and multiplied with the gradient that comes back to it."""

    def forward(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        entered = inputs[0].detach()
        if entered.dim() != 3 or len(entered) != len(part):
            raise ModelError(
                f"trackstar cannot tell texts apart in {type(module).__name__} modules whose inputs have the shape "
                f"{list(entered.shape)}; leave this method out for this model"
            )
        inner = entered.float() @ right

        def backward(back: torch.Tensor) -> None:
            part.add_((back.float() @ left).transpose(1, 2) @ inner)

        output.register_hook(backward)

    return forward
