"""Loads a model and its tokenizer in this process: on one device, over several, or quantised.

`model.device_map` and `model.quantization` need accelerate and bitsandbytes, the extra `big`. Layers that are mapped
to CPU memory or disk come to a GPU when their turn is (disk: out of the model's own files; nothing is written). The
LM head keeps its type under `model.quantization`, as does the compute between the layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from rise_ops.config import ModelConfig
from rise_ops.errors import ModelError
from rise_ops.model_files import ModelFiles, first_line
from rise_ops.model_shape import model_settings
from rise_ops.placement import device_room, loaded_dtype, pick_device, stored_quantization

_logger = logging.getLogger(__name__)


def load_tokenizer(config: ModelConfig, files: ModelFiles) -> Any:
    """The tokenizer of a model.

    Raises
    ------
    ModelError
        There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            files.location, revision=files.commit, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(
            f"model {config.name} has no tokenizer that can be loaded ({first_line(error)}); put the tokenizer files "
            "(tokenizer.json, tokenizer_config.json) next to its weights"
        ) from error


def load_model(config: ModelConfig, files: ModelFiles, *, working: int, **options: Any) -> Any:
    """A Hugging Face causal language model in evaluation mode, on its devices.

    Parameters
    ----------
    working
        Bytes that a strategy of `model.device_map` leaves free on each GPU.
    options
        Of transformers' `from_pretrained`.

    Raises
    ------
    ModelError
        Weights are not in its files, or a library is missing.
    """
    from transformers import AutoModelForCausalLM

    device, settings = pick_device(config.device), model_settings(config)
    dtype = loaded_dtype(config, settings, device)
    if config.quantization is not None or stored_quantization(settings) is not None:
        options |= _quantization(config, settings, dtype, device)
    if config.device_map is not None:
        options |= _device_map(config, settings, working)
    moved = "device_map" not in options and "distributed_config" not in options
    if moved and device.type == "cuda" and find_spec("accelerate"):
        options["device_map"], moved = {"": device}, False  # without a copy in CPU memory
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.location,
        revision=files.commit,
        dtype="auto" if config.dtype == "auto" and device.type != "cpu" else dtype,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
        **options,
    )
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"model {config.name}: {len(missing)} weights are not in its files, among them {missing[0]}; "
            "they would be random. Use a complete checkpoint"
        )
    model = model.eval().requires_grad_(False)
    return model.to(device) if moved else model


def require(module: str, *, key: str, extra: str) -> None:
    """Raise ModelError, with how to install it, where a module that a key needs is missing."""
    if find_spec(module) is None:
        raise ModelError(
            f"{key} needs {module}, which is not installed; install it with pip install 'rise-ops[{extra}]'"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without the library's own progress bars: stderr belongs to whoever runs the stage."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _device_map(config: ModelConfig, settings: Any, working: int) -> dict[str, Any]:
    require("accelerate", key="model.device_map", extra="big")
    if not isinstance(config.device_map, str):
        return {"device_map": dict(config.device_map or ())}
    return {"device_map": config.device_map, "max_memory": device_room(working)}


def _quantization(config: ModelConfig, settings: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Options for a model that is quantised while it is loaded, or was when it was saved."""
    require("accelerate", key="a quantised model", extra="big")
    stored = stored_quantization(settings)
    if stored is not None:
        if config.quantization is not None:
            raise ModelError(
                f"model {config.name} is quantised already ({stored['quant_method']}); leave out model.quantization"
            )
        return {"device_map": {"": device}}
    from transformers import BitsAndBytesConfig

    require("bitsandbytes", key="model.quantization", extra="big")
    # it says at every product that inputs are rounded to float16
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if config.quantization == "int8":
        how = BitsAndBytesConfig(load_in_8bit=True)
    else:
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": how, "device_map": {"": device}}
