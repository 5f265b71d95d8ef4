"""What computes hidden states: the model in this process, or other processes that hold it.

An engine gives the hidden states that enter the LM head, and the LM head itself as a plain tensor on the device where
signatures are computed. `rise_ops.trunk` does the rest for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rise_ops.errors import ModelError
from rise_ops.model_shape import ModelShape, shape_of_model
from rise_ops.placement import place_of
from rise_ops.threads import arithmetic_pool

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Engine(ABC):
    """A causal language model without its LM head, and the LM head.

    Parameters
    ----------
    settings
        The transformers configuration of the model.
    weight, bias
        LM head [V, D] and [V], on the device where signatures are computed.
    shape
        Sizes of the model.
    weights
        Bytes of its weights by device.
    """

    def __init__(
        self,
        settings: Any,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        shape: ModelShape,
        weights: dict[str, int],
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.shape = shape
        self.weights = weights
        self.logit_scale, self.soft_cap = logit_transform(settings.get_text_config())

    @property
    def is_rounded(self) -> bool:
        """Whether weights have fewer bits than their type says."""
        return False

    @property
    def model(self) -> Any:
        """The Hugging Face model, where it is in this process.

        Raises
        ------
        ModelError
            It is not.
        """
        raise ModelError(
            "the model runs in other processes, and this needs it in its own; leave out model.tensor_parallel and "
            "model.backend"
        )

    @abstractmethod
    def hidden_states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [B, L, D] of int [B, L], on the LM head's device; meaningless behind a chunk's length."""

    @abstractmethod
    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """The model's own logits [N, V] at the N positions of a mask int [B, L]; None where it has none."""


class LocalEngine(Engine):
    """A Hugging Face model in this process, on one device or, through accelerate, on several.

    Raises
    ------
    ModelError
        The model has no LM head, or one that is quantised.
    """

    def __init__(self, model: Any, *, name: str) -> None:
        output = model.get_output_embeddings()
        if output is None or getattr(output, "weight", None) is None:
            raise ModelError(f"model {name} ({type(model).__name__}) has no LM head; use a causal language model")
        weight, bias = _whole(output)
        if weight.dtype not in _FLOATS:
            raise ModelError(
                f"the LM head of model {name} is in {str(weight.dtype)[6:]}; use a checkpoint that quantises other "
                "layers only"
            )
        super().__init__(model.config, weight, bias, shape=shape_of_model(model), weights=_held(model, weight))
        self._model = model
        self._inputs = _runs_on(model.get_input_embeddings())
        self._is_whole = not self.is_rounded and not hasattr(model, "hf_device_map")

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self._model

    @property
    def is_rounded(self) -> bool:
        """Whether the model is quantised."""
        return getattr(self._model, "hf_quantizer", None) is not None

    def hidden_states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [B, L, D] of int [B, L], on the LM head's device, without a mask: a causal model looks back.

        On a CPU threads take some of the chunks each: together on one they would wait for each other at every step.
        """
        threads, ids = torch.get_num_threads(), ids.to(self._inputs)
        if self._is_whole and self._inputs.type == "cpu" and threads > 1 and len(ids) >= 2 * threads:
            return torch.cat(list(arithmetic_pool(threads).map(self._run, ids.tensor_split(threads))))
        return self._run(ids).to(self.weight.device)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The model's own logits [N, V] at the N positions of a mask int [B, L]."""
        ids, mask = ids.to(self._inputs), mask.to(self._inputs)
        found: torch.Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found[mask.bool().to(found.device)].to(self.weight.device)

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return found


def logit_transform(config: Any) -> tuple[float, float | None]:
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


def _whole(head: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of an LM head; a copy on the device where it runs, if accelerate keeps it elsewhere."""
    if not head.weight.is_meta:
        return head.weight, getattr(head, "bias", None)
    from accelerate.utils import align_module_device

    with align_module_device(head):
        bias = getattr(head, "bias", None)
        return head.weight.detach().clone(), None if bias is None else bias.detach().clone()


def _runs_on(module: Any) -> torch.device:
    hook = getattr(module, "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is None:
        return torch.device(module.weight.device)
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def _held(model: Any, head: torch.Tensor) -> dict[str, int]:
    """Bytes of a model's weights by device; with the LM head's, the largest layer that comes there when its turn is."""
    device_map = getattr(model, "hf_device_map", None) or {}
    held: Counter[str] = Counter()
    away: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if parameter.is_meta:
            held[place_of(name, device_map)] += size
            away[max((each for each in device_map if name.startswith(each)), key=len)] += size
        else:
            held[str(parameter.device)] += size
    if away:
        held[str(head.device)] += max(away.values())
        if model.get_output_embeddings().weight.is_meta:
            held[str(head.device)] += head.numel() * head.element_size()
    return dict(held)
