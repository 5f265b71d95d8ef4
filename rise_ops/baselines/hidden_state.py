"""Similarity of representations: the cosine of mean-pooled last hidden states, those that enter the LM head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rise_ops.baselines.base import Float32Array, Need, Query, Setting, VectorMethod
from rise_ops.baselines.language import BATCH_TOKENS, batches, tokenized
from rise_ops.compare_config import HiddenStateMethod


class HiddenState(VectorMethod):
    """The states from which the counted tokens are predicted, averaged."""

    paper = "mean pooling, Reimers and Gurevych, 2019 (arXiv 1908.10084)"

    def __init__(self, setting: Setting, config: HiddenStateMethod) -> None:
        super().__init__(setting)
        self._config = config

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self.setting.shape.hidden_dim

    def need(self) -> Need:
        """One batch through the trunk."""
        return forward_need(self.setting, self._config.max_tokens, logits=False)

    @torch.inference_mode()
    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Unit vectors, zeros for a text that predicts nothing; after a prompt only what predicts the rest counts."""
        texts = tokenized(self.trunk, queries, max_tokens=self._config.max_tokens)
        found = np.zeros((len(texts), self.width), np.float32)
        for batch in batches(self.trunk, texts):
            hidden = self.trunk.hidden_states(batch.ids, batch.lengths)[:, :-1].float()
            mean = (hidden * batch.counts[..., None]).sum(dim=1)
            found[batch.places] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return found


def forward_need(setting: Setting, max_tokens: int, *, logits: bool) -> Need:
    """Working memory of a forward pass over a batch, in float32: activations of a layer, and logits where asked for."""
    tokens = max(max_tokens, BATCH_TOKENS)
    shape = setting.shape
    each = 10 * shape.hidden_dim + 3 * shape.inner_dim + (3 * shape.vocab_size if logits else 0)
    return Need(4 * tokens * each, f"a forward pass over {tokens:,} tokens" + (" with logits" if logits else ""))
