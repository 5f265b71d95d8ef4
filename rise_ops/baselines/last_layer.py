"""The gradient of the LM head's weight, whole: what RISE sketches, at temperature 1 and without windows.

G = Σ_t (softmax(z_t) − onehot(y_t)) h_tᵀ over the counted tokens. The score is the cosine of two gradients. For models
that scale or cap their logits the derivative of that is left out. Nothing is stored: as many queries' gradients as fit
in memory are held, and for each such group all rows are read, and their gradients made, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from rise_ops.baselines.base import Float32Array, Method, Need, Query, Rows, Setting
from rise_ops.baselines.hidden_state import forward_need
from rise_ops.baselines.language import Batch, batches, tokenized
from rise_ops.compare_config import LastLayerMethod
from rise_ops.progress import Progress, silent
from rise_ops.scratch import Column

_ROWS = 8
"""Rows whose gradients are multiplied at a time, at most."""
_TILE = 1_024
_FLOOR = 1e-12


class LastLayer(Method):
    """Exact cosines of LM-head gradients."""

    paper = "exact, after arXiv 2604.16197 without its sketch"

    def __init__(self, setting: Setting, config: LastLayerMethod) -> None:
        super().__init__(setting)
        self._config = config
        self._gradient = 4 * setting.shape.vocab_size * setting.shape.hidden_dim

    def need(self) -> Need:
        """Gradients of two rows and of one query, and a forward pass with logits."""
        forward = forward_need(self.setting, self._config.max_tokens, logits=True)
        return Need(3 * self._gradient + forward.bytes, f"three gradients of the LM head, {forward.text}")

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Nothing."""
        return 0

    def scores(self, rows: Rows, queries: Sequence[Query]) -> Iterator[Float32Array]:
        """Cosines; NaN for a row of fewer than two tokens."""
        room = 3 + max(0, self.setting.memory - self.need().bytes) // self._gradient
        at_once = max(1, min(_ROWS, room // 3))
        held = max(1, room - 1 - at_once)
        table = self.setting.scratch.column("last_layer", (len(rows), len(queries)), np.float32)
        buffer = torch.empty(at_once, self._gradient // 4, device=self.trunk.device)
        for first in range(0, len(queries), held):
            self._pass(table, rows, queries[first : first + held], first, buffer)
        for start in range(0, len(rows), _TILE):
            yield table.read(start, start + _TILE)

    @torch.inference_mode()
    def _pass(self, table: Column, rows: Rows, queries: Sequence[Query], first: int, buffer: torch.Tensor) -> None:
        """Scores of all rows for some queries, from number `first` on."""
        wanted = torch.zeros(len(queries), self._gradient // 4, device=self.trunk.device)
        for places, gradients in self._gradients(queries, buffer):
            wanted[places] = gradients
        start = 0
        for texts in rows:
            part = np.full((len(texts), len(queries)), np.nan, np.float32)
            for places, gradients in self._gradients([Query(text) for text in texts], buffer):
                part[places] = (gradients @ wanted.T).cpu().numpy()
            table.array[start : start + len(texts), first : first + len(queries)] = part
            start += len(texts)

    def _gradients(self, queries: Sequence[Query], buffer: torch.Tensor) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(places, unit gradients float32 [texts, V · D]) of some texts, in the buffer until the next ones."""
        texts = tokenized(self.trunk, queries, max_tokens=self._config.max_tokens)
        for batch in batches(self.trunk, texts):
            hidden = self.trunk.hidden_states(batch.ids, batch.lengths)[:, :-1].float()
            for start in range(0, len(batch.places), len(buffer)):
                places = batch.places[start : start + len(buffer)]
                for slot in range(len(places)):
                    self._one(batch, hidden, start + slot, buffer[slot])
                yield places, buffer[: len(places)]

    def _one(self, batch: Batch, hidden: torch.Tensor, slot: int, out: torch.Tensor) -> None:
        """The gradient of one text, flat and of unit length."""
        counted = batch.counts[slot]
        states, targets = hidden[slot, counted], batch.ids[slot, 1:][counted]
        residual = torch.softmax(self.trunk.logits(states), dim=-1)
        residual[torch.arange(len(targets), device=targets.device), targets] -= 1
        torch.mm(residual.T, states, out=out.view(residual.shape[1], states.shape[1]))
        out /= torch.linalg.vector_norm(out).clamp_min(_FLOOR)
