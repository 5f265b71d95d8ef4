"""The model: token ids in, the hidden states that enter its LM head out.

Any Hugging Face causal language model, from a folder or the hub, safetensors only (nothing is unpickled). The
head's weight, bias, logit scale and final soft-cap are read from the model, and before any work a probe checks
that they reproduce the model's own logits from the hidden states; a model that does something else with them
is refused. Batches are padded on the right and run without an attention mask: a causal model cannot look
behind a token, and the probe compares with masked batches.

A model's fingerprint comes from its weights, `config.json` and tokenizer files (a folder, wherever it is), or
from its commit (the hub). Models stay loaded for the life of the process.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rise_ops.chunking import Chunk, prompt_chunk, prompt_tokens, row_chunks
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import LimitError, ModelError
from rise_ops.head import DEFAULT_LOGIT_BYTES, ReadoutHead
from rise_ops.model_files import ModelFiles, first_line, model_fingerprint, resolve_model
from rise_ops.sketch import SketchTables

__all__ = ["Encoded", "Trunk", "load_trunk", "model_fingerprint", "unload_trunk"]

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Largest relative error of a position's logits on the probe: two runs of a deep 16-bit model differ by 1–2 %."""
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
    model, tokenizer
        As Hugging Face returns them, the model in evaluation mode on its device.
    name, fingerprint
        What to call it in messages, and its identity.

    Raises
    ------
    ModelError
        The model has no LM head, or the head does not reproduce its logits.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, fingerprint: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.fingerprint = fingerprint
        self._heads: dict[tuple[str, str, int], ReadoutHead] = {}
        self._tokenizer_lock = threading.Lock()
        output = model.get_output_embeddings()
        if output is None or getattr(output, "weight", None) is None:
            raise ModelError(f"model {name} ({type(model).__name__}) has no LM head; use a causal language model")
        self._weight: torch.Tensor = output.weight
        self._bias: torch.Tensor | None = getattr(output, "bias", None)
        self.vocab_size, self.hidden_dim = self._weight.shape
        text_config = model.config.get_text_config()
        self.logit_scale, self.soft_cap = _logit_transform(text_config)
        limit = getattr(text_config, "max_position_embeddings", None)
        self.max_positions: int | None = int(limit) if limit else None
        self._verify()

    def __repr__(self) -> str:
        return f"Trunk({self.name!r}, {self.parameters:,} parameters, {self.dtype}, {self.fingerprint[:12]})"

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self._weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._weight.device

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.model.parameters())

    def head(
        self, sketch: SketchConfig, tables: SketchTables | None = None, *, max_logit_bytes: int = DEFAULT_LOGIT_BYTES
    ) -> ReadoutHead:
        """The readout head for a sketch; made once for each configuration, tables and memory bound."""
        key = (sketch.fingerprint, "" if tables is None else tables.sha256, max_logit_bytes)
        with _lock:
            if key not in self._heads:
                self._heads[key] = ReadoutHead(
                    self._weight,
                    sketch,
                    bias=self._bias,
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
        if self.max_positions is not None and longest > self.max_positions:
            raise ModelError(
                f"model {self.name} reads {self.max_positions} tokens, a chunk has {longest}; use a model with a "
                "longer context"
            )
        hidden: torch.Tensor = self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
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
        ids, mask = _probe(min(self.vocab_size, self.model.get_input_embeddings().weight.shape[0]))
        ids, mask = ids.to(self.device), mask.to(self.device)
        expected = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
        hidden = self.hidden_states(ids, _PROBE_LENGTHS)[mask.bool()]
        found = self.logits(hidden)
        self._heads.clear()
        if found.shape != expected.shape:
            raise ModelError(
                f"model {self.name} gives {expected.shape[-1]} logits, its LM head {found.shape[-1]}; "
                "this model cannot be used"
            )
        error = float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(1e-6)).max())
        tolerance = _TOLERANCE.get(self.dtype, 0.05)
        if not error <= tolerance:  # also where it is NaN
            raise ModelError(
                f"the LM head of model {self.name} ({type(self.model).__name__}) does not reproduce its logits: "
                f"relative error {error:.2g}, at most {tolerance:g} expected; the model changes its hidden states or "
                "logits in a way this program does not know, use another model or another dtype"
            )


def load_trunk(config: ModelConfig) -> Trunk:
    """Load a model once per process; later calls return the same one.

    A folder whose files changed since is loaded again.

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
            _loaded[key] = _load(config, fingerprint=key[1])
        return _loaded[key]


def unload_trunk(trunk: Trunk) -> None:
    """Forget a loaded model, so that its memory is free once nobody holds it."""
    with _lock:
        for key in [key for key, held in _loaded.items() if held is trunk]:
            del _loaded[key]


def _load(config: ModelConfig, *, fingerprint: str) -> Trunk:
    from safetensors import SafetensorError

    files = resolve_model(config)
    device = pick_device(config.device)
    try:
        with _quiet_transformers():
            tokenizer = _load_tokenizer(config, files)
            model = _load_model(config, files, device)
    except torch.OutOfMemoryError as error:
        raise LimitError(f"model {config.name} does not fit on {device}; use a smaller one or bfloat16") from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {config.name} cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "check that its files are whole and belong together"
        ) from error
    trunk = Trunk(model, tokenizer, name=config.name, fingerprint=fingerprint)
    _logger.info("loaded %s on %s", repr(trunk), str(trunk.device))  # no record that keeps the model
    return trunk


def _load_tokenizer(config: ModelConfig, files: ModelFiles) -> Any:
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


def _load_model(config: ModelConfig, files: ModelFiles, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    if config.dtype != "auto":
        dtype: Any = getattr(torch, config.dtype)
    else:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.location,
        revision=files.commit,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        output_loading_info=True,
    )
    model, report = loaded
    missing = sorted(report.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"model {config.name}: {len(missing)} weights are not in its files, among them {missing[0]}; "
            "they would be random. Use a complete checkpoint"
        )
    return model.eval().requires_grad_(False).to(device)


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


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """Factor and soft-cap that models apply to their logits, under the names their configurations use."""
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    # HyperCLOVA X multiplies by the number that Granite divides by.
    scale = scale * scaling if str(config.model_type).startswith("hyperclovax") else scale / scaling
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma; RecurrentGemma; xLSTM
        if getattr(config, name, None):
            return scale, float(getattr(config, name))
    return scale, None


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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the library's own progress bars: stderr belongs to whoever runs the stage."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
