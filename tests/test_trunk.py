"""Loading models: families, probe, fingerprint, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ModelError
from rise_ops.trunk import load_trunk, model_fingerprint
from tests import tiny_models

_FAMILIES = [*tiny_models.FAMILIES]


def _config(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), device="cpu", **options)


@pytest.mark.parametrize("family", _FAMILIES)
def test_family_loads_and_reproduces_its_logits(family: str, tmp_path: Path) -> None:
    folder = tiny_models.save(family, tmp_path / family)
    trunk = load_trunk(_config(folder))
    assert trunk.dtype == torch.float32
    assert (trunk.vocab_size, trunk.hidden_dim) == (tiny_models.VOCABULARY, 32)
    ids = torch.randint(0, trunk.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    hidden = trunk.hidden_states(ids, [40, 25])
    with torch.inference_mode():
        expected = trunk.model(input_ids=ids).logits.float()
    found = trunk.head(SketchConfig()).logits(hidden.flatten(0, 1)).view_as(expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_scale_and_cap_are_read(tmp_path: Path) -> None:
    assert load_trunk(_config(tiny_models.save("gemma2", tmp_path / "g"))).soft_cap == 30.0
    assert load_trunk(_config(tiny_models.save("cohere", tmp_path / "c"))).logit_scale == 0.25
    assert load_trunk(_config(tiny_models.save("granite", tmp_path / "r"))).logit_scale == 0.125


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_cuda(dtype: str, tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    trunk = load_trunk(ModelConfig.model_validate({"name": str(folder), "device": "cuda", "dtype": dtype}))
    assert trunk.device.type == "cuda"


def test_other_dtype(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    assert load_trunk(_config(folder, dtype="bfloat16")).dtype == torch.bfloat16


def test_loaded_once(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    trunk = load_trunk(_config(folder))
    assert load_trunk(_config(folder)) is trunk
    assert trunk.fingerprint == model_fingerprint(_config(folder))
    assert trunk.fingerprint[:12] in repr(trunk)
    assert trunk.parameters == sum(parameter.numel() for parameter in trunk.model.parameters())


def test_head_that_does_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        output = plain(self, *args, **options)
        output.logits = output.logits * 1.5
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    folder = tiny_models.save("llama", tmp_path / "m")
    with pytest.raises(ModelError, match=r"does not reproduce its logits: relative error 0\.33"):
        load_trunk(_config(folder))


def test_fingerprint_is_about_content(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    first = model_fingerprint(_config(folder))
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"transformers_version": "0", "_name_or_path": "x"}))
    (copy / "README.md").write_text("not part of the model")
    assert model_fingerprint(_config(copy)) == first
    assert model_fingerprint(_config(copy, dtype="bfloat16")) == first

    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    second = model_fingerprint(_config(copy))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    third = model_fingerprint(_config(copy))
    (copy / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    assert len({first, second, third, model_fingerprint(_config(copy))}) == 4


def test_missing_models(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_trunk(_config(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="neither a folder nor a hub model"):
        load_trunk(ModelConfig(name="nobody/has-this-model"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_trunk(_config(tmp_path / "empty"))


def test_incomplete_and_damaged_folders(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_trunk(_config(folder))

    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        load_trunk(_config(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load_trunk(_config(folder))

    weights.write_bytes(whole)
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match="no tokenizer"):
        load_trunk(_config(folder))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no tokenizer that can be loaded"):
        load_trunk(_config(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        load_trunk(_config(folder))


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.save("llama", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are not in its files.*up_proj"):
        load_trunk(_config(folder))


def test_adapters_revisions_and_devices_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m")
    with pytest.raises(ModelError, match="has no revisions"):
        load_trunk(_config(folder, revision="main"))
    with pytest.raises(ModelError, match="is not a device"):
        load_trunk(ModelConfig(name=str(folder), device="gpu"))
    with pytest.raises(ModelError, match="is not here"):
        load_trunk(ModelConfig(name=str(folder), device="cuda:99"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapter"):
        load_trunk(_config(folder))


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    folder = tiny_models.save("llama", tmp_path / "m", vocab_size=20)
    trunk = load_trunk(_config(folder))
    with pytest.raises(ModelError, match="the model has 20"):
        trunk.encode(["the quick brown fox"])


def test_context_of_the_model(tmp_path: Path) -> None:
    trunk = load_trunk(_config(tiny_models.save("gpt2", tmp_path / "m", positions=64)))
    with pytest.raises(ModelError, match="reads 64 tokens, a chunk has 65"):
        trunk.hidden_states(torch.zeros(1, 65, dtype=torch.int64), [65])


def test_offsets(tmp_path: Path) -> None:
    trunk = load_trunk(_config(tiny_models.save("llama", tmp_path / "m")))
    texts = ["the quick brown fox", "", "jumps é over"]
    with_offsets, without = trunk.encode(texts, offsets=True), trunk.encode(texts)
    for text, found, plain in zip(texts, with_offsets, without, strict=True):
        assert found.ids.tolist() == plain.ids.tolist() and plain.ends is None
        assert found.ends is not None and len(found.ends) == len(found.ids)
        assert max(found.ends, default=0) == len(text)
