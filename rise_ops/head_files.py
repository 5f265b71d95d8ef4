"""The LM head of a model, read from its safetensors files where the model itself is in other processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rise_ops.config import ModelConfig
from rise_ops.errors import ModelError
from rise_ops.model_files import first_line, resolve_model, weight_files
from rise_ops.model_shape import model_outline

_GPT_NEOX = "embed_out"
"""What GPT-NeoX's files call it."""
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_head(
    config: ModelConfig, *, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight [V, D] and bias [V] of a configured model's LM head; the embeddings where the two are tied.

    Raises
    ------
    ModelError
        The files do not hold them, or in a quantised form.
    """
    outline = model_outline(config)
    head, embeddings = outline.get_output_embeddings(), outline.get_input_embeddings()
    if head is None:
        raise ModelError(f"model {config.name} has no LM head; use a causal language model")
    names = {module: name for name, module in outline.named_modules()}
    folder = _folder(config)
    places = _places(folder)
    candidates = [f"{names[head]}.weight", f"{_GPT_NEOX}.weight"]
    if head.weight is embeddings.weight:
        candidates.append(f"{names[embeddings]}.weight")
    key = next((key for key in (_key(name, places) for name in candidates) if key is not None), None)
    if key is None:
        raise ModelError(f"model {config.name}: its files hold no {names[head]}.weight; use a complete checkpoint")
    weight = _read(folder, places[key], key)
    if tuple(weight.shape) != tuple(head.weight.shape) or not weight.is_floating_point():
        raise ModelError(
            f"model {config.name}: {key} is {list(weight.shape)} in {str(weight.dtype)[6:]}, "
            f"{list(head.weight.shape)} expected; use a checkpoint whose LM head is not quantised"
        )
    bias = None if getattr(head, "bias", None) is None else _key(f"{names[head]}.bias", places)
    found = None if bias is None else _read(folder, places[bias], bias).to(device, dtype)
    return weight.to(device, dtype), found


def _folder(config: ModelConfig) -> Path:
    """The folder with the files, downloaded where the model is on a hub."""
    from transformers.utils.hub import cached_file

    files = resolve_model(config)
    if files.commit is None:
        return Path(files.location)
    errors = []
    for name in (_INDEX, _SINGLE):
        try:
            path = Path(str(cached_file(files.location, name, revision=files.commit)))
        except OSError as error:
            errors.append(first_line(error))
            continue
        if name == _INDEX:
            for part in weight_files(path.parent):
                cached_file(files.location, part, revision=files.commit)
        return path.parent
    raise ModelError(f"model {config.name} has no safetensors that can be downloaded ({errors[-1]}); use another one")


def _places(folder: Path) -> dict[str, str]:
    """File of each tensor."""
    from safetensors import safe_open

    if not (folder / _SINGLE).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return dict(index["weight_map"])
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)


def _key(name: str, places: dict[str, str]) -> str | None:
    """A tensor's name in the files, where the path to its module may be another one."""
    if name in places:
        return name
    end = ".".join(name.split(".")[-2:])
    found = [key for key in places if key == end or key.endswith(f".{end}")]
    return found[0] if len(found) == 1 else None


def _read(folder: Path, file: str, key: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(folder / file, framework="pt") as opened:
        found: torch.Tensor = opened.get_tensor(key)
    return found
