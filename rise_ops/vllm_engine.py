"""Hidden states from vLLM's pooling runner, for models that it serves faster than transformers runs them.

The interface is that of vLLM 0.24 and newer, after its documentation and its own test of hidden states
(`LLM(runner="pooling")`, task `token_embed`, pooling `ALL`; no activation, so that states are not scaled to unit
length; prefix caching and chunked prefill off, with which a prompt's states may not all be there). This module has
been tested with a stand-in for vLLM only, not with vLLM itself.

vLLM gives no logits in this mode, so the probe cannot hold the LM head against them. What is checked of every prompt:
one state for each token, as many as the head is wide, all finite; and of the probe that states are not of unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rise_ops.config import ModelConfig
from rise_ops.engines import Engine
from rise_ops.errors import ModelError
from rise_ops.head_files import read_head
from rise_ops.loading import require
from rise_ops.model_files import resolve_model
from rise_ops.model_shape import model_settings
from rise_ops.placement import USABLE, WeightPlan

MAX_TOKENS = 4_096
"""Of a prompt, at most: no chunk is nearly as long."""
_UNIT = 1e-3


class VllmEngine(Engine):
    """A model in vLLM, and its LM head.

    Parameters
    ----------
    config
        Which model; `model.tensor_parallel` becomes vLLM's.
    plan
        Where its weights go.
    working
        Bytes that vLLM leaves free on each GPU, beside the LM head.

    Raises
    ------
    ModelError
        vLLM is not installed or cannot load the model.
    """

    def __init__(self, config: ModelConfig, plan: WeightPlan, *, working: int) -> None:
        require("vllm", key="model.backend: vllm", extra="vllm")
        from vllm import LLM
        from vllm.config import PoolerConfig

        weight, bias = read_head(config, dtype=plan.dtype, device=plan.head_device)
        super().__init__(model_settings(config), weight, bias, shape=plan.shape, weights=dict(plan.places))
        self._name = config.name
        files = resolve_model(config)
        length = min(MAX_TOKENS, plan.shape.max_positions or MAX_TOKENS)
        options: dict[str, Any] = {}
        if plan.head_device.type == "cuda":
            options["gpu_memory_utilization"] = _share(plan, working)
        self._llm = LLM(
            model=files.location,
            revision=files.commit,
            tokenizer_revision=files.commit,
            dtype=str(plan.dtype).removeprefix("torch."),
            trust_remote_code=config.trust_remote_code,
            tensor_parallel_size=config.tensor_parallel,
            runner="pooling",
            pooler_config=PoolerConfig(task="token_embed", tok_pooling_type="ALL", use_activation=False),
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            max_model_len=length,
            max_num_batched_tokens=2 * length,
            **options,
        )

    def hidden_states(self, ids: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """Hidden states [B, L, D] of int [B, L], on the LM head's device; zero behind a chunk's length.

        Raises
        ------
        ModelError
            Not one finite state for each token.
        """
        prompts = [{"prompt_token_ids": row[:length]} for row, length in zip(ids.tolist(), lengths, strict=True)]
        answers = self._llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        if len(answers) != len(prompts):
            raise ModelError(f"vLLM gave {len(answers)} answers to {len(prompts)} prompts; use another version of it")
        width = self.weight.shape[1]
        found = torch.zeros(*ids.shape, width, dtype=self.weight.dtype, device=self.weight.device)
        for slot, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            states, tokens = answer.outputs.data, len(prompt["prompt_token_ids"])
            if list(answer.prompt_token_ids) != prompt["prompt_token_ids"] or tuple(states.shape) != (tokens, width):
                raise ModelError(
                    f"vLLM gave hidden states {list(states.shape)} for {tokens} tokens of model {self._name} and a "
                    f"head of width {width}: not one for each token; use another version of vLLM, or backend "
                    "transformers"
                )
            if not bool(torch.isfinite(states).all()):
                raise ModelError(
                    f"vLLM gave hidden states of model {self._name} that are not finite; use dtype bfloat16"
                )
            found[slot, :tokens] = states.to(found)
        return found

    def logits(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """None, as there are none; the states at the positions of the mask are looked at instead.

        Raises
        ------
        ModelError
            They are of unit length.
        """
        states = self.hidden_states(ids, mask.sum(dim=1).tolist())[mask.bool().to(self.weight.device)]
        if bool((states.float().norm(dim=1) - 1).abs().max() < _UNIT):
            raise ModelError(
                f"vLLM scales the hidden states of model {self._name} to unit length, which cannot be undone; "
                "use another version of vLLM, or backend transformers"
            )


def _share(plan: WeightPlan, working: int) -> float:
    """Part of a GPU that vLLM may take."""
    total = torch.cuda.get_device_properties(plan.head_device).total_memory
    return max(0.1, USABLE - (plan.head_bytes + min(working, total // 4)) / total)
