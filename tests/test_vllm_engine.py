"""The adapter for vLLM, held against a stand-in whose hidden states come from a real model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from rise_ops import loading
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ModelError
from rise_ops.head_files import read_head
from rise_ops.signatures import Signer
from rise_ops.trunk import load_trunk
from tests import tiny_models

_TEXTS = ["the quick brown fox", "a small green field near the river " * 60, "lazy dog jumps"]
_SKETCH = SketchConfig(dim_r=32, dim_h=16, dim_g=16)


class _Llm:
    """`vllm.LLM` as far as the adapter uses it, one prompt at a time."""

    made: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **options: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.made.append(options)
        self.model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=getattr(torch, options["dtype"]))

    @torch.inference_mode()
    def encode(self, prompts: Sequence[dict[str, list[int]]], *, pooling_task: str, use_tqdm: bool) -> list[Any]:
        assert pooling_task == "token_embed" and not use_tqdm
        return [self.answer(prompt["prompt_token_ids"]) for prompt in prompts]

    def answer(self, ids: list[int]) -> Any:
        states = self.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return SimpleNamespace(prompt_token_ids=ids, outputs=SimpleNamespace(data=self.change(states)))

    def change(self, states: torch.Tensor) -> torch.Tensor:
        return states.clone()


class _DropsTheLast(_Llm):
    def change(self, states: torch.Tensor) -> torch.Tensor:
        return states[:-1]


class _Scales(_Llm):
    def change(self, states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(states, dim=1)


class _Overflows(_Llm):
    def change(self, states: torch.Tensor) -> torch.Tensor:
        return states / 0


class _Repeats(_Llm):
    def answer(self, ids: list[int]) -> Any:
        return super().answer([*ids[:-1], ids[-1] ^ 1])


class _IsSilent(_Llm):
    def encode(self, prompts: Sequence[dict[str, list[int]]], **options: Any) -> list[Any]:
        return super().encode(prompts, **options)[:-1]


@dataclass
class _PoolerConfig:
    task: str
    tok_pooling_type: str
    use_activation: bool


def _install(monkeypatch: pytest.MonkeyPatch, llm: type[_Llm]) -> None:
    package, config = ModuleType("vllm"), ModuleType("vllm.config")
    vars(package)["LLM"], vars(config)["PoolerConfig"] = llm, _PoolerConfig
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.setattr(loading, "require", lambda *_, **__: None)
    monkeypatch.setattr("rise_ops.vllm_engine.require", lambda *_, **__: None)
    monkeypatch.setattr("rise_ops.trunk._loaded", {})
    monkeypatch.setattr(_Llm, "made", [])


def _config(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(folder), "device": "cpu", **options})


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt_neox"])
def test_signatures_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Llm)
    folder = tiny_models.save(family, tmp_path / "m")
    trunk, plain = load_trunk(_config(folder, backend="vllm")), load_trunk(_config(folder))
    assert trunk.fingerprint == plain.fingerprint and torch.equal(trunk.unembedding, plain.unembedding)
    one, two = (Signer(each, _SKETCH, memory=2**28).rows(_TEXTS) for each in (trunk, plain))
    assert one.chunks.tolist() == two.chunks.tolist() and max(one.chunks) > 1
    assert ((one.signature.astype(np.float64) * two.signature.astype(np.float64)).sum(axis=1) > 0.9999).all()
    with pytest.raises(ModelError, match=r"runs in other processes.*model\.backend"):
        _ = trunk.model


def test_what_vllm_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Llm)
    load_trunk(_config(tiny_models.save("llama", tmp_path / "m"), backend="vllm", tensor_parallel=2, dtype="bfloat16"))
    (options,) = _Llm.made
    assert options["model"] == str(tmp_path / "m") and options["runner"] == "pooling"
    assert options["pooler_config"] == _PoolerConfig("token_embed", "ALL", use_activation=False)
    assert not options["enable_prefix_caching"] and not options["enable_chunked_prefill"]
    assert options["max_num_batched_tokens"] >= options["max_model_len"] == 1_024
    assert (options["tensor_parallel_size"], options["dtype"]) == (2, "bfloat16")


@pytest.mark.parametrize(
    ("llm", "said"),
    [
        (_DropsTheLast, r"hidden states \[1, 32\] for 2 tokens .* not one for each token"),
        (_Repeats, "not one for each token"),
        (_Scales, "to unit length"),
        (_Overflows, "not finite"),
        (_IsSilent, "2 answers to 3 prompts"),
    ],
)
def test_wrong_states_are_refused(llm: type[_Llm], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, llm)
    with pytest.raises(ModelError, match=said):
        load_trunk(_config(tiny_models.save("llama", tmp_path / "m"), backend="vllm"))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_lm_head_is_read_from_the_files(family: str, tmp_path: Path) -> None:
    config = _config(tiny_models.save(family, tmp_path / "m"))
    weight, bias = read_head(config, dtype=torch.float32, device=torch.device("cpu"))
    engine = load_trunk(config).engine
    assert torch.equal(weight, engine.weight) and (bias is None) == (engine.bias is None)
    assert bias is None or engine.bias is None or torch.equal(bias, engine.bias)


def test_the_lm_head_of_sharded_and_of_incomplete_files(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.save("llama", tmp_path / "m")
    expected = load_trunk(_config(folder)).unembedding
    load_trunk(_config(folder)).model.save_pretrained(tmp_path / "parts", max_shard_size="50KB")
    tiny_models.save_tokenizer(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    weight, _ = read_head(_config(tmp_path / "parts"), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert torch.equal(weight, expected.bfloat16())
    tensors = load_file(folder / "model.safetensors")
    for changed in ({"lm_head.weight": torch.zeros(7, 32)}, {"lm_head.weight": torch.zeros(400, 32).to(torch.int8)}):
        save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"lm_head\.weight is \["):
            read_head(_config(folder), dtype=torch.float32, device=torch.device("cpu"))
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"hold no lm_head\.weight"):
        read_head(_config(folder), dtype=torch.float32, device=torch.device("cpu"))
