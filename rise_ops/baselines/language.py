"""What methods that ask the model have in common: token ids with what counts, losses, gradients.

The loss of a text is the mean cross-entropy of its predicted tokens at temperature 1, cut at the method's
`max_tokens`; of a query with a prompt only the tokens after the prompt count. Unlike RISE, these methods do not cut
long rows into windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.baselines.base import Query
from rise_ops.chunking import plan_batches
from rise_ops.model_shape import ModelShape
from rise_ops.trunk import Trunk

BATCH_TOKENS = 2_048
"""Padded tokens of a micro-batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """A text as the model reads it."""

    ids: npt.NDArray[np.int64]
    start: int
    """First index that counts as predicted; at least 1."""

    @property
    def counted(self) -> int:
        """Predicted tokens."""
        return max(0, len(self.ids) - self.start)


def tokenized(trunk: Trunk, queries: Sequence[Query], *, max_tokens: int) -> list[Tokens]:
    """Token ids, cut at `max_tokens` and at what the model can read; of a cut prompt at least one token counts."""
    limit = min(max_tokens, trunk.max_positions or max_tokens)
    found = trunk.encode([each.text for each in queries], offsets=any(each.prompt for each in queries))
    result = []
    for each, encoded in zip(queries, found, strict=True):
        ids, start = encoded.ids[:limit].astype(np.int64), 1
        if each.prompt:
            start = max(1, min(trunk.prompt_length(encoded, each.prompt), len(ids) - 1))
        result.append(Tokens(ids, start))
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Some texts side by side, padded on the right."""

    places: list[int]
    """Which texts these are."""
    ids: torch.Tensor
    """int64 [B, L]."""
    lengths: list[int]
    counts: torch.Tensor
    """bool [B, L − 1]: whether the token after each position counts."""


def batches(trunk: Trunk, texts: Sequence[Tokens], *, max_tokens: int = BATCH_TOKENS) -> Iterator[Batch]:
    """Length-sorted micro-batches of those texts that predict something, on the model's device."""
    usable = [place for place, each in enumerate(texts) if each.counted > 0]
    lengths = [len(texts[place].ids) for place in usable]
    for plan in plan_batches(lengths, max_tokens=max_tokens, max_chunks=max_tokens):
        places = [usable[slot] for slot in plan]
        own = [texts[place] for place in places]
        longest = max(len(each.ids) for each in own)
        ids, counts = torch.zeros(len(own), longest, dtype=torch.int64), torch.zeros(len(own), longest - 1).bool()
        for slot, each in enumerate(own):
            ids[slot, : len(each.ids)] = torch.from_numpy(each.ids)
            counts[slot, each.start - 1 : len(each.ids) - 1] = True
        yield Batch(places, ids.to(trunk.device), [len(each.ids) for each in own], counts.to(trunk.device))


def token_losses(trunk: Trunk, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each counted token, float32 [B, L − 1]; 0 elsewhere. Differentiable."""
    logits = trunk.model(input_ids=batch.ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    return losses.view_as(batch.counts) * batch.counts


@torch.no_grad()
def mean_losses(trunk: Trunk, texts: Sequence[Tokens]) -> npt.NDArray[np.float64]:
    """Mean cross-entropy of the counted tokens of each text, in nats; NaN where nothing is predicted."""
    found = np.full(len(texts), np.nan)
    for batch in batches(trunk, texts):
        sums = token_losses(trunk, batch).sum(dim=1, dtype=torch.float64)
        found[batch.places] = (sums / batch.counts.sum(dim=1)).cpu().numpy()
    return found


@contextmanager
def differentiable(trunk: Trunk, *, embeddings_only: bool = False) -> Iterator[None]:
    """Within it, gradients are computed: of all parameters, or no further than the token embeddings.

    The process' other users of the model find it as it was.
    """
    wanted = list(trunk.model.parameters())
    if embeddings_only:
        wanted = [trunk.model.get_input_embeddings().weight]
    before = [each.requires_grad for each in wanted]
    try:
        for each in wanted:
            each.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for each, was in zip(wanted, before, strict=True):
            each.requires_grad_(was)
            each.grad = None


def backward_bytes(shape: ModelShape, tokens: int) -> int:
    """Working memory of a forward and a backward pass over so many tokens, in float32, without parameters' gradients.

    Of each token and layer what is kept for the backward pass, and logits with their softmax and gradient.
    """
    return 4 * tokens * (shape.layers * (16 * shape.hidden_dim + 4 * shape.inner_dim) + 4 * shape.vocab_size)
