"""The model: token ids in, the hidden states that enter its LM head out.

Any Hugging Face causal language model, from a folder or the hub, safetensors only (nothing is unpickled). The
head's weight, bias, logit scale and final soft-cap are read from the model, and before any work a probe checks
that they reproduce the model's own logits from the hidden states; a model that does something else with them
is refused. Batches are padded on the right and run without an attention mask: a causal model cannot look
behind a token, and the probe compares with masked batches.

What runs the model is an engine (`rise_ops.engines`): this process, with one device or several; processes that split
each layer (`rise_ops.tensor_parallel`); or vLLM (`rise_ops.vllm_engine`). Where its weights will go is logged, and
refused if they cannot fit, before they are loaded (`rise_ops.placement`).

A model's fingerprint comes from its weights, `config.json` and tokenizer files (a folder, wherever it is), or
from its commit (the hub). Models stay loaded for the life of the process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rise_ops.chunking import Chunk, prompt_chunk, prompt_tokens, row_chunks
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.engines import Engine, LocalEngine
from rise_ops.errors import LimitError, ModelError
from rise_ops.head import DEFAULT_LOGIT_BYTES, ReadoutHead
from rise_ops.loading import load_model, load_tokenizer, quiet_transformers
from rise_ops.model_files import first_line, model_fingerprint, resolve_model
from rise_ops.model_shape import ModelShape
from rise_ops.placement import WeightPlan, pick_device, plan_weights
from rise_ops.sketch import SketchTables

__all__ = ["Encoded", "Trunk", "load_trunk", "loaded_trunk", "model_fingerprint", "pick_device", "unload_trunk"]

DEFAULT_WORKING_BYTES = 8 * 2**30
"""Working memory that is left beside the weights where nobody says how much."""

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest relative error of a position's logits on the probe: two runs of a deep 16-bit model differ by 1–2 %."""
_ROUNDED_TOLERANCE = 0.05
"""The same of a quantised model, in any type: int8 takes columns apart that are large anywhere in the batch."""
_PROBE_LENGTHS = (2, 13, 32)
_ENCODE_CHARACTERS = 2**20
_SMALLEST = SketchConfig(channels=("rh",), dim_r=1, dim_h=1, dim_g=1)
"""Where logits are wanted and no sketch: it keeps the projections small."""

_logger = logging.getLogger(__name__)
_lock = threading.RLock()
_loaded: dict[tuple[str, str], Trunk] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Tokens of one text."""

    ids: np.ndarray[Any, np.dtype[np.int32]]
    """Token ids, special tokens included."""
    ends: tuple[int, ...] | None
    """Character offset at which each token ends; None unless asked for and known."""
    starts: tuple[int, ...] | None = None
    """Character offset at which each token starts, likewise."""


class Trunk:
    """A loaded causal language model. Use `load_trunk`.

    Parameters
    ----------
    model
        As Hugging Face returns it, in evaluation mode on its device; or what runs it elsewhere.
    tokenizer
        As Hugging Face returns it.
    name, fingerprint
        What to call it in messages, and its identity.

    Raises
    ------
    ModelError
        The model has no LM head, or the head does not reproduce its logits.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, fingerprint: str) -> None:
        self.engine: Engine = model if isinstance(model, Engine) else LocalEngine(model, name=name)
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self._heads: dict[tuple[str, str, int], ReadoutHead] = {}
        self._tokenizer_lock = threading.Lock()
        self.vocab_size, self.hidden_dim = self.engine.weight.shape
        self.logit_scale, self.soft_cap = self.engine.logit_scale, self.engine.soft_cap
        self.max_positions: int | None = self.engine.shape.max_positions
        self._verify()

    def __repr__(self) -> str:
        return f"Trunk({self.name!r}, {self.parameters:,} parameters, {self.dtype}, {self.fingerprint[:12]})"

    @property
    def model(self) -> Any:
        """The Hugging Face model.

        Raises
        ------
        ModelError
            It is not in this process.
        """
        return self.engine.model

    @property
    def unembedding(self) -> torch.Tensor:
        """[V, D] weight of the LM head."""
        return self.engine.weight

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.engine.shape

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of hidden states and LM head."""
        return self.engine.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the LM head is: hidden states come there, and signatures are computed there."""
        return self.engine.weight.device

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return self.engine.shape.parameters

    @property
    def weights(self) -> dict[str, int]:
        """Memory of the parameters by device."""
        return self.engine.weights

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters on all devices."""
        return sum(self.engine.weights.values())

    def head(
        self, sketch: SketchConfig, tables: SketchTables | None = None, *, max_logit_bytes: int = DEFAULT_LOGIT_BYTES
    ) -> ReadoutHead:
        """The readout head for a sketch; made once for each configuration, tables and memory bound."""
        key = (sketch.fingerprint, "" if tables is None else tables.sha256, max_logit_bytes)
        with _lock:
            if key not in self._heads:
                self._heads[key] = ReadoutHead(
                    self.engine.weight,
                    sketch,
                    bias=self.engine.bias,
                    tables=tables,
                    logit_scale=self.logit_scale,
                    soft_cap=self.soft_cap,
                    max_logit_bytes=max_logit_bytes,
                )
            return self._heads[key]

    @torch.inference_mode()
    def hidden_states(self, ids: torch.Tensor, lengths: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Hidden states that enter the LM head: int [B, L] padded on the right → [B, L, D].

        States behind a chunk's length are meaningless.

        Raises
        ------
        ModelError
            A chunk is longer than the model can read, or the model returned another number of states.
        """
        longest = int(ids.shape[1])
        counts = [int(each) for each in lengths]
        if self.max_positions is not None and longest > self.max_positions:
            raise ModelError(
                f"model {self.name} reads {self.max_positions} tokens, a chunk has {longest}; use a model with a "
                "longer context"
            )
        hidden = self.engine.hidden_states(ids, counts)
        if hidden.shape != (*ids.shape, self.hidden_dim):
            raise ModelError(
                f"model {self.name} returned hidden states {list(hidden.shape)} for {list(ids.shape)} tokens and "
                f"a head of width {self.hidden_dim}; this model cannot be used"
            )
        return hidden

    def encode(self, texts: Sequence[str], *, offsets: bool = False) -> list[Encoded]:
        """Tokens of texts, special tokens as the tokenizer adds them, never cut.

        Raises
        ------
        ModelError
            The tokenizer gives ids that the model has no row for.
        """
        found: list[Encoded] = []
        for part in _parts(texts):
            found.extend(self._encode_part(part, offsets=offsets and bool(self.tokenizer.is_fast)))
        return found

    def count_tokens(self, text: str) -> int:
        """Number of tokens of one text."""
        return len(self.encode([text])[0].ids)

    def prompt_length(self, found: Encoded, prompt: str) -> int:
        """Leading tokens of an encoded text that belong to the prompt which it begins with."""
        if found.ends is None:  # a tokenizer written in Python knows no offsets
            return self.count_tokens(prompt)
        return prompt_tokens(found.ends, len(prompt))

    def query_chunks(self, row: int, found: Encoded, prompt: str | None) -> list[Chunk]:
        """Chunks of a query: one with a prompt, as those of a row without."""
        tokens = len(found.ids)
        return prompt_chunk(row, tokens, self.prompt_length(found, prompt)) if prompt else row_chunks(row, tokens)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [N, V], of hidden states [N, D]: what the head makes of them, unscaled by any temperature."""
        return self.head(_SMALLEST).logits(hidden)

    def _encode_part(self, texts: Sequence[str], *, offsets: bool) -> Iterator[Encoded]:
        with self._tokenizer_lock:  # fast tokenizers refuse to be configured by two threads at once
            batch = self.tokenizer(
                list(texts),
                add_special_tokens=True,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=offsets,
                verbose=False,
            )
        for index, row in enumerate(batch["input_ids"]):
            ids = np.asarray(row, dtype=np.int32)
            if ids.size and int(ids.max()) >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
                raise ModelError(
                    f"tokenizer of {self.name} gives token {int(ids.max())} ({token!r}), the model has "
                    f"{self.vocab_size}; use the tokenizer that the model was trained with"
                )
            if not offsets:
                yield Encoded(ids, None)
                continue
            places = batch["offset_mapping"][index]
            yield Encoded(ids, tuple(int(end) for _, end in places), tuple(int(start) for start, _ in places))

    @torch.inference_mode()
    def _verify(self) -> None:
        """Refuse a model whose logits do not follow from hidden states and head."""
        ids, mask = _probe(self.vocab_size)
        expected = self.engine.logits(ids, mask)
        hidden = self.hidden_states(ids, _PROBE_LENGTHS)
        if expected is None:
            return
        found, expected = self.logits(hidden[mask.bool().to(hidden.device)]), expected.float()
        self._heads.clear()
        if found.shape != expected.shape:
            raise ModelError(
                f"model {self.name} gives {expected.shape[-1]} logits, its LM head {found.shape[-1]}; "
                "this model cannot be used"
            )
        error = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)).max())
        tolerance = _ROUNDED_TOLERANCE if self.engine.is_rounded else _TOLERANCE.get(self.dtype, 0.05)
        if not error <= tolerance:  # also where it is NaN
            raise ModelError(
                f"the LM head of model {self.name} does not reproduce its logits: "
                f"relative error {error:.2g}, at most {tolerance:g} expected; the model changes its hidden states or "
                "logits in a way this program does not know, use another model or another dtype"
            )


def load_trunk(config: ModelConfig, working: int = DEFAULT_WORKING_BYTES) -> Trunk:
    """Load a model once per process; later calls return the same one.

    A folder whose files changed since is loaded again.

    Parameters
    ----------
    config
        Which model, and how to load it.
    working
        Bytes that will be needed beside the weights, for who decides where they go.

    Raises
    ------
    ModelError
        The model is missing, damaged, has no tokenizer or no safetensors, or fails its probe.
    LimitError
        It does not fit on the device.
    """
    with _lock:
        key = (config.fingerprint, model_fingerprint(config))
        if key not in _loaded:
            _loaded[key] = _load(config, fingerprint=key[1], working=working)
        return _loaded[key]


def loaded_trunk(config: ModelConfig) -> Trunk | None:
    """The model, if this process has loaded it already.

    Raises
    ------
    ModelError
        It is not where it was.
    """
    with _lock:
        return _loaded.get((config.fingerprint, model_fingerprint(config)))


def unload_trunk(trunk: Trunk) -> None:
    """Forget a loaded model, so that its memory is free once nobody holds it."""
    with _lock:
        for key in [key for key, held in _loaded.items() if held is trunk]:
            del _loaded[key]


def _load(config: ModelConfig, *, fingerprint: str, working: int) -> Trunk:
    from safetensors import SafetensorError

    files = resolve_model(config)
    plan = plan_weights(config, working=working)
    _logger.info("%s", plan.text)
    plan.refuse_if_too_large()
    try:
        with quiet_transformers():
            tokenizer = load_tokenizer(config, files)
            engine = _engine(config, plan, working)
    except torch.OutOfMemoryError as error:
        raise LimitError(
            f"model {config.name} does not fit on {plan.head_device}; use a smaller one, bfloat16, "
            "model.quantization or model.device_map"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {config.name} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "check that its files are whole and belong together"
        ) from error
    trunk = Trunk(engine, tokenizer, name=config.name, fingerprint=fingerprint)
    _logger.info("loaded %s on %s", repr(trunk), str(trunk.device))  # no record that keeps the model
    return trunk


def _engine(config: ModelConfig, plan: WeightPlan, working: int) -> Engine:
    if config.backend == "vllm":
        from rise_ops.vllm_engine import VllmEngine

        return VllmEngine(config, plan, working=working)
    if config.tensor_parallel > 1:
        from rise_ops.tensor_parallel import TensorParallelEngine

        return TensorParallelEngine(config, plan)
    model = load_model(config, resolve_model(config), working=working + plan.head_bytes)
    return LocalEngine(model, name=config.name)


def _probe(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sequences of several lengths, padded on the right, and their mask."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (len(_PROBE_LENGTHS), max(_PROBE_LENGTHS))
    mask = (torch.arange(shape[1]) < torch.tensor(_PROBE_LENGTHS)[:, None]).to(torch.int64)
    return torch.randint(0, vocab_size, shape, generator=generator) * mask, mask


def _parts(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Runs of texts of about a million characters: a tokenizer keeps ~100 bytes for each token it returns."""
    start, characters = 0, 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= _ENCODE_CHARACTERS:
            yield texts[start : index + 1]
            start, characters = index + 1, 0
    if start < len(texts):
        yield texts[start:]
