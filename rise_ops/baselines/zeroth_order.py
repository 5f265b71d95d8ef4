"""Z0-Inf: how losses move together while a model is trained (Kokhlikyan et al., 2025, arXiv 2510.11832).

Between two consecutive checkpoints θ_t and θ_{t+1} the loss of a text changes by Δℓ_t. The influence of row x on query
q is Σ_t Δℓ_t(x) · Δℓ_t(q) / ‖θ_{t+1} − θ_t‖²: no gradient, but a forward pass over all texts for every checkpoint. A
row is kept as its T differences, each divided by the length of the step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.baselines.base import Float32Array, Need, Query, Rows, Setting, VectorMethod
from rise_ops.baselines.hidden_state import forward_need
from rise_ops.baselines.language import mean_losses, tokenized
from rise_ops.compare_config import ZerothOrderMethod
from rise_ops.config import ModelConfig
from rise_ops.errors import ConfigError, ModelError
from rise_ops.model_files import resolve_model, weight_files
from rise_ops.progress import Progress, silent
from rise_ops.trunk import load_trunk, unload_trunk

Float64Array = npt.NDArray[np.float64]


class ZerothOrder(VectorMethod):
    """Changes of losses between checkpoints.

    Raises
    ------
    ConfigError
        No checkpoint is configured.
    """

    paper = "arXiv 2510.11832"
    dtype = np.float32

    def __init__(self, setting: Setting, config: ZerothOrderMethod) -> None:
        super().__init__(setting)
        if not config.checkpoints:
            raise ConfigError(
                "z0_inf needs checkpoints of the model's training: give compare.methods: {method: z0_inf, checkpoints: "
                "[folder, ...]}, in their order; the configured model comes last"
            )
        self._config = config
        self._vocabulary: dict[str, int] | None = None
        self._models = [*(checkpoint_config(setting.model, name) for name in config.checkpoints), setting.model]

    @property
    def width(self) -> int:
        """Steps between checkpoints."""
        return len(self._models) - 1

    def need(self) -> Need:
        """A forward pass with logits; one checkpoint is loaded at a time."""
        return forward_need(self.setting, self._config.max_tokens, logits=True)

    def load(self) -> None:
        """Lengths of the steps; checkpoints are loaded when losses are computed.

        Raises
        ------
        ModelError
            Checkpoints have not the same weights, or are the same.
        """
        self._steps = np.array([step_length(one, two) for one, two in pairwise(self._models)])

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Losses of all rows under each checkpoint, then their differences."""
        losses = self.setting.scratch.column("losses", (len(rows), len(self._models)), np.float64)
        for number in range(len(self._models)):
            done = 0
            for part in self._losses(number, ([Query(text) for text in texts] for texts in rows)):
                losses.array[done : done + len(part), number] = part
                done += len(part)
                progress((number * len(rows) + done) // len(self._models), len(rows))
        self._index = self.setting.scratch.column("index", (len(rows), self.width), self.dtype)
        for start in range(0, len(rows), 4_096):
            part = losses.read(start, start + 4_096)
            self._index.write(start, self._vectors(part))
        return len(rows) * self.width * np.dtype(self.dtype).itemsize

    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Differences of losses, divided by the lengths of the steps; NaN for a text that predicts nothing."""
        losses = [part for number in range(len(self._models)) for part in self._losses(number, [queries])]
        return self._vectors(np.stack(losses, axis=1))

    def _vectors(self, losses: Float64Array) -> Float32Array:
        return np.asarray(np.diff(losses, axis=1) / self._steps, np.float32)

    def _losses(self, number: int, parts: Iterable[Sequence[Query]]) -> Iterator[Float64Array]:
        """Losses of texts under one checkpoint, which is loaded for as long as that takes.

        Raises
        ------
        ModelError
            It has another tokenizer than those before it.
        """
        gc.collect()  # the one before may hold itself in a cycle
        config = self._models[number]
        trunk = load_trunk(config)
        try:
            own: dict[str, int] = trunk.tokenizer.get_vocab()
            if self._vocabulary not in (None, own):
                raise ModelError(f"checkpoint {config.name} has another tokenizer than the one before it")
            self._vocabulary = own
            for queries in parts:
                yield mean_losses(trunk, tokenized(trunk, queries, max_tokens=self._config.max_tokens))
        finally:
            unload_trunk(trunk)


def checkpoint_config(model: ModelConfig, name: str) -> ModelConfig:
    """An earlier checkpoint of a model, loaded as the model is."""
    return model.model_copy(update={"name": name, "revision": None})


def step_length(one: ModelConfig, two: ModelConfig) -> float:
    """Euclidean length of the difference of two checkpoints' weights; one tensor of each is in memory at a time.

    Raises
    ------
    ModelError
        They have not the same tensors, or do not differ.
    """
    left, right = _Tensors(one), _Tensors(two)
    if left.names.keys() != right.names.keys():
        odd = sorted(left.names.keys() ^ right.names.keys())[0]
        raise ModelError(
            f"checkpoints {one.name} and {two.name} have not the same weights: {odd} is in one of them only"
        )
    total = 0.0
    for name in left.names:
        before, after = left.read(name), right.read(name)
        if before.shape != after.shape:
            raise ModelError(
                f"checkpoints {one.name} and {two.name} have not the same weights: {name} has another shape"
            )
        total += float((after.double() - before.double()).square().sum())
    if total == 0:
        raise ModelError(f"checkpoints {one.name} and {two.name} are the same; give those of different moments")
    return float(np.sqrt(total))


class _Tensors:
    """The tensors of a model's files, by name."""

    def __init__(self, config: ModelConfig) -> None:
        from safetensors import safe_open

        folder = _folder(config)
        self.names: dict[str, Any] = {}
        for file in weight_files(folder):
            opened: Any = safe_open(str(folder / file), framework="pt")
            self.names |= dict.fromkeys(opened.keys(), opened)

    def read(self, name: str) -> Any:
        return self.names[name].get_tensor(name)


def _folder(config: ModelConfig) -> Path:
    """Where a model's files are; a hub model's are downloaded."""
    files = resolve_model(config)
    if files.commit is None:
        return Path(files.location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.safetensors.index.json"]
        return Path(snapshot_download(files.location, revision=files.commit, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"checkpoint {config.name} cannot be downloaded ({type(error).__name__})") from error
