"""What is known of a model before it is loaded: its sizes, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rise_ops.config import ModelConfig
from rise_ops.errors import ModelError
from rise_ops.model_files import first_line, resolve_model


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a causal language model."""

    parameters: int
    """Tied ones count once."""
    vocab_size: int
    """Rows of the LM head's weight."""
    hidden_dim: int
    layers: int
    inner_dim: int
    """Width of the feed-forward layers."""
    max_positions: int | None
    """Tokens that the model reads."""
    modules: tuple[tuple[int, int], ...]
    """(out, in) of the linear modules, without the LM head."""


def empty_model(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model that a transformers configuration describes, on the meta device: no weight is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def shape_of(config: Any, *, trust_remote_code: bool = False) -> ModelShape:
    """Sizes of the model that a transformers configuration describes."""
    return shape_of_model(empty_model(config, trust_remote_code=trust_remote_code))


def linear_modules(model: Any) -> list[tuple[Any, int, int]]:
    """(module, out, in) of the linear modules, GPT-2's own kind included, without the LM head."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: list[tuple[Any, int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.append((module, module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            found.append((module, module.weight.shape[1], module.weight.shape[0]))
    return found


def shape_of_model(model: Any) -> ModelShape:
    """Sizes of a model that is there."""
    text, head = model.config.get_text_config(), model.get_output_embeddings()
    limit = getattr(text, "max_position_embeddings", None)
    vocab, hidden = head.weight.shape
    return ModelShape(
        parameters=int(model.num_parameters()),  # also where a byte holds two
        vocab_size=int(vocab),
        hidden_dim=int(hidden),
        layers=int(text.num_hidden_layers),
        inner_dim=int(getattr(text, "intermediate_size", None) or 4 * hidden),
        max_positions=int(limit) if limit else None,
        modules=tuple((out, inside) for _, out, inside in linear_modules(model)),
    )


def model_settings(config: ModelConfig) -> Any:
    """The transformers configuration of a model, from its `config.json`.

    Raises
    ------
    ModelError
        It cannot be found or read.
    """
    from transformers import AutoConfig

    files = resolve_model(config)
    try:
        return AutoConfig.from_pretrained(
            files.location, revision=files.commit, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise _unknown(config, error) from error


def model_outline(config: ModelConfig) -> Any:
    """The configured model on the meta device, from its `config.json`.

    Raises
    ------
    ModelError
        It cannot be found or is no causal language model.
    """
    settings = model_settings(config)
    try:
        return empty_model(settings, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise _unknown(config, error) from error


@lru_cache(8)
def model_shape(config: ModelConfig) -> ModelShape:
    """Sizes of a configured model, from its `config.json`.

    Raises
    ------
    ModelError
        It cannot be found or is no causal language model.
    """
    return shape_of_model(model_outline(config))


def _unknown(config: ModelConfig, error: Exception) -> ModelError:
    return ModelError(f"model {config.name} is no causal language model that is known here: {first_line(error)}")
