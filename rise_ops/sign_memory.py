"""The memory of computing signatures, by a plain model of it, told before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from rise_ops.chunking import QUERY_TOKENS
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import LimitError
from rise_ops.model_shape import ModelShape
from rise_ops.placement import plan_weights, working_room
from rise_ops.trunk import Trunk, loaded_trunk

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
"""Padded tokens beyond which a larger micro-batch gains nothing."""
_MAX_LOGIT_BYTES = {"cpu": 40 * 2**20, "cuda": 2**30}
"""Beyond which larger slices gain nothing; on a CPU, of each thread."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How a memory budget is spent; all sizes in bytes."""

    memory: int
    """The budget: working memory beside the model's weights."""
    weight_bytes: int
    """The model's weights, not part of the budget."""
    bytes_per_token: int
    """Activations and sketches of one padded token."""
    bytes_per_chunk: int
    """Signature of one chunk in float32 while it is made."""
    tokens: int
    """Padded tokens of a micro-batch, at most."""
    chunks: int
    """Chunks of a micro-batch, at most."""
    logit_bytes: int
    """Logits at a time, at most."""
    pending_rows: int
    """Rows of several chunks that are summed at a time, at most."""

    @property
    def text(self) -> str:
        """As it is logged."""
        return (
            f"signatures: at most {self.tokens:,} tokens in {self.chunks:,} chunks at a time, "
            f"{self.bytes_per_token / 2**10:,.0f} KiB each; {self.logit_bytes / 2**20:,.0f} MiB of logits; sums of "
            f"{self.pending_rows:,} rows; {(self.peak_bytes - self.weight_bytes) / 2**30:,.2f} GiB beside the weights"
        )

    @property
    def peak_bytes(self) -> int:
        """Weights and working memory together, at most; without the result, 2·dim bytes a row."""
        batch = self.tokens * self.bytes_per_token + (self.chunks + self.pending_rows) * self.bytes_per_chunk
        return self.weight_bytes + self.logit_bytes + batch


def plan_memory(trunk: Trunk, sketch: SketchConfig, *, memory: int) -> MemoryPlan:
    """Divide a budget among what signatures with a loaded model take; on GPUs never more than each of them has.

    Raises
    ------
    LimitError
        Not even one chunk fits.
    """
    return _plan(trunk.shape, sketch, trunk.weights, dtype=trunk.dtype, device=trunk.device, memory=memory,
                 name=trunk.name)  # fmt: skip


def plan_ahead(config: ModelConfig, sketch: SketchConfig, *, memory: int) -> MemoryPlan:
    """The same before a model is loaded, or as `plan_memory` if it is.

    Raises
    ------
    LimitError
        The weights do not fit on a device as it is now, or not even one chunk beside them.
    ModelError
        The model or a device is not here.
    """
    trunk = loaded_trunk(config)
    if trunk is not None:
        return plan_memory(trunk, sketch, memory=memory)
    weights = plan_weights(config, working=memory)
    weights.refuse_if_too_large()
    return _plan(weights.shape, sketch, weights.places, dtype=weights.dtype, device=weights.head_device,
                 memory=memory, name=config.name)  # fmt: skip


def _plan(shape: ModelShape, sketch: SketchConfig, weights: Mapping[str, int], *, dtype: torch.dtype,
          device: torch.device, memory: int, name: str) -> MemoryPlan:  # fmt: skip
    room = working_room(memory, weights)
    plan = plan_shape(shape, sketch, dtype=dtype, device=device.type, memory=room, name=name)
    return replace(plan, weight_bytes=sum(weights.values()))  # in more than one type, or more than once


def plan_shape(
    shape: ModelShape, sketch: SketchConfig, *, dtype: torch.dtype, device: str, memory: int, name: str
) -> MemoryPlan:
    """Divide a budget, for a model of these sizes: a quarter for logits, a quarter for pending rows, half for the
    micro-batch.

    Parameters
    ----------
    dtype
        Of all weights.
    device
        cpu or cuda.
    name
        What messages call the model.

    Raises
    ------
    LimitError
        Not even one chunk fits.
    """
    # A layer holds the residual stream, queries, keys, values, the attention's and the inner layer's input and
    # output; states are gathered in float32, next to three sketches and their scaled copies.
    activations = dtype.itemsize * (10 * shape.hidden_dim + 3 * shape.inner_dim)
    per_token = activations + 4 * (2 * shape.hidden_dim + 3 * (sketch.dim_h + sketch.dim_g + sketch.dim_r))
    per_chunk = 3 * 4 * sketch.dim  # outer products, signature, rounded signature
    batch = memory // 2
    smallest = QUERY_TOKENS * per_token + per_chunk
    row_of_logits = 3 * 4 * shape.vocab_size
    if batch < smallest or memory // 4 < max(row_of_logits, per_chunk):
        need = max(2 * smallest, 4 * row_of_logits, 4 * per_chunk)
        raise LimitError(
            f"signatures with model {name} need {need / 2**20:.0f} MiB of working memory, limits.memory allows "
            f"{memory / 2**20:.0f} MiB; raise it, or use a smaller model or sketch"
        )
    tokens = min(_MAX_TOKENS.get(device, _MAX_TOKENS["cuda"]), max(QUERY_TOKENS, batch // 2 // per_token))
    chunks = max(1, min(tokens // 2, (batch - tokens * per_token) // per_chunk))
    logit_bytes = _MAX_LOGIT_BYTES["cpu"] * torch.get_num_threads() if device == "cpu" else _MAX_LOGIT_BYTES["cuda"]
    return MemoryPlan(
        memory=memory,
        weight_bytes=shape.parameters * dtype.itemsize,
        bytes_per_token=per_token,
        bytes_per_chunk=per_chunk,
        tokens=tokens,
        chunks=chunks,
        logit_bytes=min(logit_bytes, memory // 4),
        pending_rows=max(1, memory // 4 // per_chunk),
    )
