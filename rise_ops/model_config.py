"""Which model, and how it is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from rise_ops.config_base import Section, no_url

Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]

_PLACE = re.compile(r"cpu|disk|cuda(:\d+)?")


class ModelConfig(Section):
    """A Hugging Face causal language model."""

    name: Annotated[str, AfterValidator(no_url)] = Field(min_length=1, description="Hub name or folder.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on CPU, the checkpoint's own on CUDA."
    )
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Off unless asked.")
    device_map: Strategy | tuple[tuple[str, str], ...] | None = Field(
        None, description="Layers over several devices: a strategy, or {module: device}. null: all on `device`."
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="Weights of linear layers, the LM head excepted, in 8 or 4 bits (bitsandbytes)."
    )
    tensor_parallel: int = Field(1, ge=1, description="Processes that split each layer among their GPUs.")
    backend: Literal["transformers", "vllm"] = Field("transformers", description="What computes hidden states.")

    @field_validator("device_map", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        """A mapping as pairs, which can be hashed; a number as the GPU that it stands for."""
        if not isinstance(value, Mapping):
            return value
        places = {str(name): f"cuda:{place}" if isinstance(place, int) else str(place) for name, place in value.items()}
        return tuple(sorted(places.items()))

    @field_validator("device_map")
    @classmethod
    def _known_places(cls, value: Strategy | tuple[tuple[str, str], ...] | None) -> Any:
        for name, place in value if isinstance(value, tuple) else ():
            if not _PLACE.fullmatch(place):
                raise ValueError(f"'{place}' of module '{name}' is not a device; use cpu, disk or cuda:N")
        return value

    @model_validator(mode="after")
    def _one_way_to_load(self) -> ModelConfig:
        ways = {
            "device_map": self.device_map is not None,
            "quantization": self.quantization is not None,
            "tensor_parallel": self.tensor_parallel > 1,
            "backend: vllm": self.backend == "vllm",
        }
        if ways["device_map"] and self.device != "auto":
            raise ValueError("cannot use 'device' with 'device_map'")
        for one, other in (
            ("device_map", "tensor_parallel"),
            ("quantization", "tensor_parallel"),
            ("device_map", "backend: vllm"),
            ("quantization", "backend: vllm"),
        ):
            if ways[one] and ways[other]:
                raise ValueError(f"cannot use '{one}' with '{other}'")
        several = ways["tensor_parallel"] or ways["backend: vllm"]
        if several and re.fullmatch(r"cuda:\d+", self.device):
            raise ValueError("'device' cannot name one GPU with 'tensor_parallel' or 'backend: vllm'; use auto")
        return self

    @property
    def in_one_process(self) -> bool:
        """Whether the model itself, with all its modules, is in the process that asks for it."""
        return self.tensor_parallel == 1 and self.backend == "transformers"

    @property
    def is_plain(self) -> bool:
        """Whether the model is to be in one process on one device, with the weights that it was saved with."""
        return self.in_one_process and self.device_map is None and self.quantization is None
