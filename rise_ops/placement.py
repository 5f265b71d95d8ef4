"""Where the weights of a model go and what memory they take, from its configuration alone, before it is loaded.

A plan that does not fit in what is free now is refused, with what would make it fit. Sizes are those of the
parameters: 1 byte each in int8 and a float32 for each row, half a byte in nf4 and a float32 for each 64
(Dettmers et al., arXiv 2208.07339 and 2305.14314). The LM head and the embeddings keep their type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ByteSize

from rise_ops.config import ModelConfig
from rise_ops.errors import LimitError, ModelError
from rise_ops.machine import free_memory
from rise_ops.model_shape import ModelShape, linear_modules, model_outline, shape_of_model

USABLE = 0.9
"""Part of a GPU that is planned with; the rest is for libraries and fragments."""
BITS = {"int8": 8.0, "nf4": 4.0 + 32 / 64}
"""Of a weight."""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Where a model's weights will be."""

    name: str
    kind: str
    """Type of the weights, or their quantisation."""
    dtype: torch.dtype
    """Of hidden states and LM head."""
    shape: ModelShape
    weight_bytes: int
    places: Mapping[str, int]
    """Bytes by device, or `disk`, in the order in which they are filled."""
    head_device: torch.device
    """Where the LM head is, and signatures are computed."""

    @property
    def head_bytes(self) -> int:
        """Of the LM head's weight."""
        return self.shape.vocab_size * self.shape.hidden_dim * self.dtype.itemsize

    @property
    def text(self) -> str:
        """As it is logged."""
        where = ", ".join(f"{_size(size)} on {place}{_free_text(place)}" for place, size in self.places.items())
        return f"model {self.name} has {_size(self.weight_bytes)} of weights ({self.kind}): {where}"

    def refuse_if_too_large(self) -> None:
        """Raise LimitError where a device has less memory free than its weights take."""
        for place, size in self.places.items():
            free = None if place == "disk" else free_memory(torch.device(place))
            if free is not None and size > free:
                raise LimitError(
                    f"model {self.name} does not fit on {place}: its weights take {_size(size)} there "
                    f"({self.kind}), {_size(free)} are free; use dtype bfloat16, model.quantization, "
                    "model.device_map, model.tensor_parallel or a smaller model"
                )


def pick_device(name: str) -> torch.device:
    """The device of this name; auto: CUDA where there is some.

    Raises
    ------
    ModelError
        It is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device {name} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"model.device {name} is not here ({torch.cuda.device_count()} CUDA devices); use auto or cpu")
    return device


def plan_weights(config: ModelConfig, *, working: int) -> WeightPlan:
    """Where the weights of a configured model will go.

    Parameters
    ----------
    working
        Bytes that a strategy of `model.device_map` leaves free on each GPU.

    Raises
    ------
    ModelError
        The model or a device is not here.
    """
    device = pick_device(config.device)
    outline = model_outline(config)
    dtype = loaded_dtype(config, outline.config, device)
    stored = stored_quantization(outline.config)
    if device.type == "cpu" and config.quantization == "nf4":
        _refuse_odd_modules(outline, config.name)
    sizes = parameter_bytes(outline, dtype, _stored_bits(stored) if stored else BITS.get(config.quantization or ""))
    shape, total = shape_of_model(outline), sum(sizes.values())
    head = shape.vocab_size * shape.hidden_dim * dtype.itemsize
    kind = config.quantization or (f"{stored['quant_method']}, as stored" if stored else str(dtype)[6:])
    if config.device_map is not None:
        places = _mapped(config, sizes, working=working + head)
    elif config.in_one_process:
        places = {str(device): total}
    else:
        places = _split(total, config.tensor_parallel, device, head=head)
    on = next((place for place in places if place.startswith("cuda")), "cpu")
    return WeightPlan(config.name, kind, dtype, shape, total, places, torch.device(on))


def _refuse_odd_modules(model: Any, name: str) -> None:
    """On CPUs with bfloat16 products bitsandbytes packs 32 rows of blocks of 64, and fails at any others.

    They are refused on every CPU: a configuration should not depend on which one it meets.
    """
    for _, out, inside in linear_modules(model):
        if out % 32 or inside % 64:
            raise ModelError(
                f"model {name} has a linear module of {out} rows of {inside}; nf4 on a CPU takes multiples of 32 rows "
                "and of 64 columns, use int8"
            )


def loaded_dtype(config: ModelConfig, settings: Any, device: torch.device) -> torch.dtype:
    """Floating type in which a model is loaded on a device, `settings` being its transformers configuration."""
    if config.dtype != "auto":
        return _dtype(config.dtype)
    return torch.float32 if device.type == "cpu" else _dtype(settings.get_text_config().dtype or settings.dtype)


def stored_quantization(settings: Any) -> dict[str, Any] | None:
    """How a checkpoint is quantised, as its `config.json` says; None where it is not."""
    found = getattr(settings, "quantization_config", None)
    if found is None:
        return None
    return {"quant_method": "unknown"} | (found if isinstance(found, dict) else found.to_dict())


def parameter_bytes(model: Any, dtype: torch.dtype, bits: float | None) -> dict[str, int]:
    """Bytes of each parameter of a model, the weights of its linear modules having so many bits where not None."""
    linear = {module.weight: out for module, out, _ in linear_modules(model)} if bits else {}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter in linear and bits:
            sizes[name] = int(parameter.numel() * bits / 8) + 4 * linear[parameter] * (bits == 8)
        else:
            sizes[name] = parameter.numel() * dtype.itemsize
    return sizes


def device_room(working: int) -> dict[int | str, int]:
    """Bytes for weights on each GPU, `working` bytes and at most a quarter of it left free, and in CPU memory."""
    room: dict[int | str, int] = {}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        room[index] = max(0, free - (total - int(USABLE * total)) - min(working, total // 4))
    return {**room, "cpu": free_memory(torch.device("cpu")) or 0}


def working_room(memory: int, places: Mapping[str, int]) -> int:
    """What of a budget for working memory the GPUs that hold weights have, each of them."""
    for place, size in places.items():
        if place.startswith("cuda"):
            total = torch.cuda.get_device_properties(torch.device(place)).total_memory
            memory = min(memory, max(0, int(USABLE * total) - size))
    return memory


def place_of(name: str, device_map: Mapping[str, Any]) -> str:
    """The device of a parameter: that of the longest module name that it begins with."""
    names = [each for each in device_map if not each or name == each or name.startswith(f"{each}.")]
    place = device_map[max(names, key=len)] if names else "cpu"
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def _mapped(config: ModelConfig, sizes: Mapping[str, int], *, working: int) -> dict[str, int]:
    if not isinstance(config.device_map, str):
        for _, place in config.device_map or ():
            if place != "disk":
                pick_device(place)
        counted: Counter[str] = Counter()
        for name, size in sizes.items():
            counted[place_of(name, dict(config.device_map or ()))] += size
        return dict(sorted(counted.items(), key=lambda each: not each[0].startswith("cuda")))
    room, left = device_room(working), sum(sizes.values())
    share = left if config.device_map == "sequential" else -(-left // max(1, len(room) - 1))
    places: dict[str, int] = {}
    for index, most in room.items():
        taken = min(left, most if index != "cpu" else left, share if index != "cpu" else left)
        if taken:
            places["cpu" if index == "cpu" else f"cuda:{index}"] = taken
        left -= taken
    return places


def _split(total: int, processes: int, device: torch.device, *, head: int) -> dict[str, int]:
    """Over processes, with the LM head once more where signatures are computed."""
    if device.type == "cpu":
        return {"cpu": total + head}
    if processes > torch.cuda.device_count():
        raise ModelError(
            f"model.tensor_parallel is {processes}, and there are {torch.cuda.device_count()} CUDA devices; "
            "lower it, or set model.device to cpu"
        )
    return {f"cuda:{index}": -(-total // processes) + (0 if index else head) for index in range(processes)}


def _stored_bits(stored: Mapping[str, Any]) -> float:
    if stored.get("load_in_4bit") or stored["quant_method"] == "mxfp4":
        return BITS["nf4"]
    return float(stored.get("bits") or 8)


def _dtype(found: Any) -> torch.dtype:
    if isinstance(found, torch.dtype):
        return found
    return getattr(torch, str(found).removeprefix("torch.")) if found else torch.float32


def _size(count: int) -> str:
    return ByteSize(count).human_readable(separator=" ")


def _free_text(place: str) -> str:
    free = None if place == "disk" else free_memory(torch.device(place))
    return "" if free is None else f" ({_size(free)} free)"
