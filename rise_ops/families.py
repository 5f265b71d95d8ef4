"""Models by short names: Pythia (arXiv 2304.01373), OLMo 2 (arXiv 2501.00656) and OLMo 3 (arXiv 2512.13961).

A preset knows a model's sizes as its `config.json` has them, so its parameters, its memory and a sketch for it can be
told, and a model of random weights be built and measured, before anything is downloaded. In a configuration a preset's
name stands for its hub name (`rise_ops.model_files.resolve_model`).

Left out of the configurations: what stretches OLMo 3's positions beyond 8,192 (chunks have at most 512 tokens), and
ids of special tokens that no computation here uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from rise_ops.config import SketchConfig
from rise_ops.errors import ConfigError, LimitError
from rise_ops.machine import device_name, free_memory, memory_peak

if TYPE_CHECKING:
    import torch

    from rise_ops.model_shape import ModelShape
    from rise_ops.signatures import MemoryPlan
    from rise_ops.trunk import Trunk

Json = dict[str, Any]


_HF_CLASSES = MappingProxyType({"gpt_neox": "GPTNeoXConfig", "olmo2": "Olmo2Config", "olmo3": "Olmo3Config"})


@dataclass(frozen=True, slots=True)
class Widths:
    """A sketch for a model, and why."""

    dim_r: int
    dim_h: int
    dim_g: int
    weight_rh: float
    weight_gh: float
    why: str

    @property
    def sketch(self) -> SketchConfig:
        """As a configuration has it."""
        return SketchConfig(**{name: value for name, value in asdict(self).items() if name != "why"})


_PAPER = "the paper's for Pythia-1B and this package's default"
_UNTRIED = "this package's default; the paper has no figures for this model, sketch: {dim: auto} tries narrower ones"
_WIDE = Widths(128, 128, 64, 1.0, 0.3, _UNTRIED)
_PYTHIA_1B = Widths(128, 128, 64, 1.0, 0.3, _PAPER)
MIDDLE = Widths(48, 64, 16, 0.7, 1.0, "the paper's for OLMo-3-32B")
"""8 KiB a row."""
_OLMO_2_32B = Widths(48, 64, 16, 0.7, 1.0, "the paper's for OLMo-3-32B, which is as wide; not tried")
GPU_MEMORY = 141 * 10**9
"""Of an H200."""
GPU_KINDS = ("bfloat16", "int8", "nf4")
LEAN = Widths(16, 8, 28, 1.0, 0.3, "the storage that the paper holds against RapidIn's")
"""For any model, where the index must be small."""


@dataclass(frozen=True, slots=True)
class Preset:
    """One model of a family."""

    name: str
    hub: str
    """Where its weights are."""
    family: Literal["gpt_neox", "olmo2", "olmo3"]
    vocab_size: int
    hidden_dim: int
    inner_dim: int
    layers: int
    heads: int
    kv_heads: int
    positions: int
    widths: Widths
    """Recommended for it."""

    def config(self) -> Any:
        """A transformers configuration."""
        import transformers

        sizes: dict[str, float] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_dim,
            "intermediate_size": self.inner_dim,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.positions,
            "tie_word_embeddings": False,
        }
        if self.family != "gpt_neox":
            sizes |= {"num_key_value_heads": self.kv_heads, "rms_norm_eps": 1e-6, "rope_theta": 500_000.0}
        return getattr(transformers, _HF_CLASSES[self.family])(**sizes)

    def shape(self) -> ModelShape:
        """Sizes, with the exact number of parameters; no weight is allocated."""
        return _shape(self)

    def build(self, *, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Any:
        """A model of random weights, as transformers draws them before training."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=getattr(torch, dtype))
        return model.eval().requires_grad_(False)

    def trunk(self, *, seed: int = 0, dtype: str = "float32", device: str = "cpu") -> Trunk:
        """Random weights with a tokenizer that reads token ids: the text "7 12" has the tokens 7 and 12."""
        from rise_ops.trunk import Trunk

        model = self.build(seed=seed, dtype=dtype, device=device)
        return Trunk(model, NumberTokenizer(), name=self.name, fingerprint=f"random-{self.name}-{seed}")

    def plan(self, *, memory: int, dtype: str, device: str = "cpu") -> MemoryPlan:
        """How signatures with the recommended sketch spend a memory budget.

        Raises
        ------
        LimitError
            Not even one chunk fits.
        """
        import torch

        from rise_ops.signatures import plan_shape

        return plan_shape(
            self.shape(), self.widths.sketch, dtype=getattr(torch, dtype), device=device, memory=memory, name=self.name
        )


@lru_cache(64)
def _shape(preset: Preset) -> ModelShape:
    from rise_ops.model_shape import shape_of

    return shape_of(preset.config())


def _pythia(size: str, hidden: int, layers: int, heads: int, vocab: int = 50_304, widths: Widths = _WIDE) -> Preset:
    name = f"pythia-{size}"
    return Preset(
        name, f"EleutherAI/{name}", "gpt_neox", vocab, hidden, 4 * hidden, layers, heads, heads, 2_048, widths
    )


_ALL = (
    _pythia("14m", 128, 6, 4),
    _pythia("31m", 256, 6, 8),
    _pythia("70m", 512, 6, 8),
    _pythia("160m", 768, 12, 12),
    _pythia("410m", 1_024, 24, 16),
    _pythia("1b", 2_048, 16, 8, widths=_PYTHIA_1B),
    _pythia("1.4b", 2_048, 24, 16),
    _pythia("2.8b", 2_560, 32, 32),
    _pythia("6.9b", 4_096, 32, 32, vocab=50_432),
    Preset("olmo-2-1b", "allenai/OLMo-2-0425-1B", "olmo2", 100_352, 2_048, 8_192, 16, 16, 16, 4_096, _WIDE),
    Preset("olmo-2-7b", "allenai/OLMo-2-1124-7B", "olmo2", 100_352, 4_096, 11_008, 32, 32, 32, 4_096, _WIDE),
    Preset("olmo-2-13b", "allenai/OLMo-2-1124-13B", "olmo2", 100_352, 5_120, 13_824, 40, 40, 40, 4_096, _WIDE),
    Preset("olmo-2-32b", "allenai/OLMo-2-0325-32B", "olmo2", 100_352, 5_120, 27_648, 64, 40, 8, 4_096, _OLMO_2_32B),
    Preset("olmo-3-7b", "allenai/Olmo-3-1025-7B", "olmo3", 100_278, 4_096, 11_008, 32, 32, 32, 65_536, _WIDE),
    Preset("olmo-3-32b", "allenai/Olmo-3-1125-32B", "olmo3", 100_278, 5_120, 27_648, 64, 40, 8, 65_536, MIDDLE),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({each.name: each for each in _ALL})
"""By name."""


def hub_name(name: str) -> str:
    """What a preset's name stands for on the hub; any other name is its own."""
    return PRESETS[name].hub if name in PRESETS else name


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises
    ------
    ConfigError
        There is none.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no model preset {name}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


class NumberTokenizer:
    """Reads token ids as text, for models that have no tokenizer."""

    is_fast = False

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """Token ids of each text; options of real tokenizers are ignored."""
        return {"input_ids": [[int(each) for each in text.split()] for text in texts]}

    def convert_ids_to_tokens(self, token: int) -> str:
        """The id itself."""
        return str(token)


def describe(preset: Preset, *, memory: int, gpu_memory: int = GPU_MEMORY) -> Json:
    """What `curate models` says of a preset: the memory of its sketch in float32 on a CPU and bfloat16 on CUDA, and on
    how many GPUs of a size it fits.
    """
    shape, sketch = preset.shape(), preset.widths.sketch
    plans = {dtype: preset.plan(memory=memory, dtype=dtype, device=device)
             for dtype, device in (("float32", "cpu"), ("bfloat16", "cuda"))}  # fmt: skip
    return {
        "name": preset.name,
        "hub": preset.hub,
        "parameters": shape.parameters,
        "hidden_dim": shape.hidden_dim,
        "layers": shape.layers,
        "vocab_size": shape.vocab_size,
        "max_positions": shape.max_positions,
        "weight_bytes": {dtype: plan.weight_bytes for dtype, plan in plans.items()},
        "working_bytes": {dtype: plan.peak_bytes - plan.weight_bytes for dtype, plan in plans.items()},
        "gpu_memory": gpu_memory,
        "on_gpus": {kind: on_gpus(preset, kind, memory=memory, gpu_memory=gpu_memory) for kind in GPU_KINDS},
        "widths": {**asdict(preset.widths), "dim": sketch.dim},
        "bytes_per_row": 2 * sketch.dim,
        "lean": {**asdict(LEAN), "dim": LEAN.sketch.dim},
    }


def on_gpus(preset: Preset, kind: str, *, memory: int, gpu_memory: int) -> Json | None:
    """The fewest GPUs, a power of two, on which a preset fits, and what is on each of them; None beyond 16.

    On several, each holds an equal part of the weights and one the LM head once more, as with `model.tensor_parallel`.

    Parameters
    ----------
    kind
        `bfloat16`, or a `model.quantization` with the other weights in bfloat16.
    memory
        Working memory that is wanted.
    gpu_memory
        Bytes of one GPU, of which nine tenths are planned with.
    """
    import torch

    from rise_ops.placement import USABLE
    from rise_ops.signatures import plan_shape

    total, head = _weight_bytes(preset, kind), 2 * preset.vocab_size * preset.hidden_dim
    for count in (1, 2, 4, 8, 16):
        weights = total if count == 1 else -(-total // count) + head
        room = min(memory, int(USABLE * gpu_memory) - weights)
        try:
            plan = plan_shape(preset.shape(), preset.widths.sketch, dtype=torch.bfloat16, device="cuda", memory=room,
                              name=preset.name)  # fmt: skip
        except LimitError:
            continue
        working = plan.peak_bytes - plan.weight_bytes
        return {"gpus": count, "weight_bytes": weights, "working_bytes": working, "tokens": plan.tokens}
    return None


@lru_cache(64)
def _weight_bytes(preset: Preset, kind: str) -> int:
    import torch

    from rise_ops.model_shape import empty_model
    from rise_ops.placement import BITS, parameter_bytes

    return sum(parameter_bytes(empty_model(preset.config()), torch.bfloat16, BITS.get(kind)).values())


@dataclass(frozen=True, slots=True)
class Measured:
    """What random weights of a preset do on a device.

    Random weights are undecided between many tokens, which makes the sketch slower than that of a trained model.
    """

    name: str
    device: str
    dtype: str
    tokens: int
    """In rows of 256."""
    sketch_tokens_per_second: float
    forward_tokens_per_second: float
    """The same batches through the model, logits included, and nothing else."""
    weight_bytes: int
    peak_bytes: int | None
    """While rows were sketched, of the whole process, or allocated on the GPU; None: not known here."""
    planned_bytes: int
    """Weights and working memory, as planned; libraries come on top."""


def measure_preset(preset: Preset, *, tokens: int, memory: int, device: str = "auto", dtype: str = "auto") -> Measured:
    """Build random weights, sketch random tokens, and run the bare model on the same batches.

    Parameters
    ----------
    tokens
        Rounded up to whole rows of 256.
    memory
        Working memory in bytes, as `limits.memory`.

    Raises
    ------
    LimitError
        Weights and working memory do not fit in the device's free memory.
    ModelError
        There is no such device.
    """
    import torch

    from rise_ops.chunking import CHUNK_TOKENS
    from rise_ops.signatures import Signer
    from rise_ops.trunk import pick_device

    place = pick_device(device)
    dtype = ("float32" if place.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
    _refuse_if_too_large(preset, preset.plan(memory=memory, dtype=dtype, device=place.type), place)
    signer = Signer(preset.trunk(dtype=dtype, device=str(place)), preset.widths.sketch, memory=memory)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(preset.vocab_size, (-(-tokens // CHUNK_TOKENS), CHUNK_TOKENS), generator=generator)
    texts = [" ".join(map(str, row)) for row in rows.tolist()]
    signer.rows(texts[:1])
    sketch_seconds = _seconds(lambda: signer.rows(texts), place)
    peak = memory_peak()
    batches = rows.split(max(1, min(signer.plan.chunks, signer.plan.tokens // CHUNK_TOKENS)))
    _forward(signer.trunk, batches[:1])
    forward_seconds = _seconds(lambda: _forward(signer.trunk, batches), place)
    return Measured(
        name=preset.name,
        device=device_name(place),
        dtype=dtype,
        tokens=rows.numel(),
        sketch_tokens_per_second=rows.numel() / sketch_seconds,
        forward_tokens_per_second=rows.numel() / forward_seconds,
        weight_bytes=signer.plan.weight_bytes,
        peak_bytes=peak,
        planned_bytes=signer.plan.peak_bytes,
    )


def _forward(trunk: Trunk, batches: Sequence[torch.Tensor]) -> None:
    import torch

    with torch.inference_mode():
        for batch in batches:
            trunk.model(input_ids=batch.to(trunk.device), use_cache=False)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _refuse_if_too_large(preset: Preset, plan: MemoryPlan, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and plan.peak_bytes > free:
        raise LimitError(
            f"{preset.name} takes {plan.weight_bytes / 2**30:,.2f} GiB for its weights and "
            f"{(plan.peak_bytes - plan.weight_bytes) / 2**30:,.2f} GiB to work with; {device} has {free / 2**30:,.2f} "
            "GiB free; use a smaller model, dtype bfloat16, or a larger device"
        )
