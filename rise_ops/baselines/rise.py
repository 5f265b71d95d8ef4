"""RISE itself, as one method among others: signatures of rows and queries, computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.baselines.base import Float32Array, Need, Query, Setting, VectorMethod
from rise_ops.compare_config import RiseMethod
from rise_ops.config import SketchConfig
from rise_ops.errors import ConfigError
from rise_ops.memory import sketch_memory
from rise_ops.signatures import Signer, plan_shape


class Rise(VectorMethod):
    """Sketches of the LM-head gradient by forward passes (`rise_ops.head`).

    Parameters
    ----------
    setting
        Its `seed` is that of the sketch.
    config
        What differs from the configured sketch. A temperature `auto` must have been chosen already.

    Raises
    ------
    ConfigError
        The temperature is still `auto`.
    """

    paper = "arXiv 2604.16197"
    draws = True

    def __init__(self, setting: Setting, config: RiseMethod) -> None:
        super().__init__(setting)
        self.sketch = sketch_of(config, setting.sketch).model_copy(update={"seed": setting.seed})

    @property
    def width(self) -> int:
        """Numbers of a signature."""
        return self.sketch.dim

    def need(self) -> Need:
        """What a signer plans with: it fits its batches into what there is.

        Raises
        ------
        LimitError
            Not even one chunk fits.
        """
        _, memory = sketch_memory(self.setting.memory, dim=self.width, tasks=1)
        model = self.setting.model
        dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
        plan = plan_shape(self.setting.shape, self.sketch, dtype=dtype, device="cpu", memory=memory, name=model.name)
        return Need(
            plan.peak_bytes - plan.weight_bytes, f"batches of {plan.tokens:,} tokens and {plan.chunks:,} chunks"
        )

    def load(self) -> None:
        """The model with its sketch."""
        super().load()
        _, memory = sketch_memory(self.setting.memory, dim=self.width, tasks=1)
        self._signer = Signer(self.trunk, self.sketch, memory=memory)

    def row_vectors(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Signatures, float16 of unit length; zeros for a row of fewer than two tokens."""
        return self._signer.rows(texts).signature

    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Signatures, rounded to float16 as stored targets are."""
        found = self._signer.queries([each.text for each in queries], [each.prompt for each in queries])
        return found.signature.astype(np.float32)


def sketch_of(config: RiseMethod, sketch: SketchConfig) -> SketchConfig:
    """The configured sketch with what a method changes of it.

    Raises
    ------
    ConfigError
        The temperature is `auto`.
    """
    if config.temperature == "auto":
        raise ConfigError("compare.methods: temperature auto was not chosen; run `curate compare`, which chooses it")
    changed = {name: getattr(config, name) for name in ("temperature", "dim_r", "dim_h", "dim_g")}
    return sketch.model_copy(update={name: value for name, value in changed.items() if value is not None})
