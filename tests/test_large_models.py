"""Layers on several devices, quantised weights, and the plan of both before anything is loaded."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from rise_ops import loading, placement, sign_memory
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ConfigError, LimitError, ModelError
from rise_ops.model_files import model_fingerprint
from rise_ops.placement import WeightPlan, plan_weights
from rise_ops.plan import plan_run
from rise_ops.session import open_signer
from rise_ops.sign_memory import plan_ahead
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.trunk import load_trunk
from tests import tiny_models
from tests.curation import load, write_curation

_TEXTS = ["the quick brown fox", "a small green field near the river " * 20, "lazy dog jumps"]
_SKETCH = SketchConfig(dim_r=32, dim_h=16, dim_g=16)
_MEMORY = 2**28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("olmo3", tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as the blocks of nf4."""
    return tiny_models.save("olmo3", tmp_path_factory.mktemp("models") / "w", hidden_size=64, intermediate_size=128)


def _config(folder: Path, **options: Any) -> ModelConfig:
    device = {} if "device_map" in options else {"device": "cpu"}
    return ModelConfig.model_validate({"name": str(folder), **device, **options})


def _signatures(config: ModelConfig) -> np.ndarray[Any, np.dtype[np.float64]]:
    return Signer(load_trunk(config), _SKETCH, memory=_MEMORY).rows(_TEXTS).signature.astype(np.float64)


def _layers(**places: str) -> dict[str, str]:
    """A map of the modules of a model with two layers; what is not named is in CPU memory."""
    names = {"embed": "model.embed_tokens", "one": "model.layers.0", "two": "model.layers.1", "norm": "model.norm",
             "rotary": "model.rotary_emb", "head": "lm_head"}  # fmt: skip
    return {name: places.get(short, "cpu") for short, name in names.items()}


def _cut_up(plan: WeightPlan) -> int:
    return sum(plan.places.values())


@pytest.mark.parametrize(
    "device_map",
    ["auto", "balanced", "sequential", {"": "cpu"}, _layers(one="disk"), _layers(two="disk", head="disk"),
     _layers(embed="disk")],
)  # fmt: skip
def test_signatures_do_not_depend_on_where_layers_are(folder: Path, device_map: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU a strategy puts layers there, whose arithmetic is another")
    config, files = _config(folder, device_map=device_map, dtype="float32"), sorted(folder.iterdir())
    trunk = load_trunk(config)
    assert trunk.device.type == "cpu" and trunk.unembedding.shape == (tiny_models.VOCABULARY, 32)
    np.testing.assert_array_equal(_signatures(config), _signatures(_config(folder)))
    assert sorted(folder.iterdir()) == files


def test_a_layer_on_disk_counts_where_it_comes_to(folder: Path) -> None:
    whole = load_trunk(_config(folder)).weights["cpu"]
    trunk = load_trunk(_config(folder, device_map=_layers(one="disk")))
    layer = sum(each.numel() * 4 for each in load_trunk(_config(folder)).model.model.layers[0].parameters())
    assert trunk.weights == {"disk": layer, "cpu": whole}


@pytest.mark.gpu
def test_layers_in_cpu_memory_come_to_the_gpu(folder: Path) -> None:
    plain = _signatures(_config(folder, device="cuda", dtype="float32"))
    spread = _layers(embed="cuda:0", one="cuda:0", norm="cuda:0", rotary="cuda:0", head="cuda:0")
    config = _config(folder, device_map=spread, dtype="float32")
    trunk = load_trunk(config)
    assert trunk.device.type == "cuda" and set(trunk.weights) == {"cpu", "cuda:0"}
    assert ((_signatures(config) * plain).sum(axis=1) > 0.999).all()


@pytest.mark.parametrize(("method", "least"), [("int8", 0.9), ("nf4", 0.3)])
def test_quantised_models_pass_their_probe(wide: Path, method: str, least: float) -> None:
    trunk = load_trunk(_config(wide, quantization=method))
    plain = load_trunk(_config(wide))
    assert trunk.dtype == torch.float32 and torch.equal(trunk.unembedding, plain.unembedding)
    assert trunk.parameters == plain.parameters and trunk.weight_bytes < 0.75 * plain.weight_bytes
    ids = torch.arange(24)[None]
    one, two = (each.hidden_states(ids, [24])[0] for each in (trunk, plain))
    assert least < float(torch.nn.functional.cosine_similarity(one, two).mean()) < 0.99999
    found = Signer(trunk, _SKETCH, memory=_MEMORY).rows(_TEXTS)
    assert np.linalg.norm(found.signature.astype(np.float64), axis=1) == pytest.approx(np.ones(3), abs=1e-3)


def test_modules_that_nf4_cannot_pack_are_refused_before_loading(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"a linear module of 32 rows of 32; nf4 on a CPU takes multiples.*use int8"):
        load_trunk(_config(folder, quantization="nf4"))
    load_trunk(_config(folder, quantization="int8"))


@pytest.mark.parametrize("method", [None, "int8", "nf4"])
def test_planned_weights_are_those_of_the_loaded_model(wide: Path, method: str | None) -> None:
    config = _config(wide, quantization=method)
    plan, trunk = plan_weights(config, working=0), load_trunk(config)
    assert (plan.shape, plan.dtype, plan.head_device) == (trunk.shape, trunk.dtype, trunk.device)
    rows = 4 * sum(out for out, _ in plan.shape.modules) if method == "int8" else 0  # scales are no parameters
    blocks = sum(4 * out * inside // 64 for out, inside in plan.shape.modules) if method == "nf4" else 0
    assert plan.weight_bytes == trunk.weight_bytes + rows + blocks


def test_quantisation_is_part_of_the_identity_and_places_are_not(folder: Path) -> None:
    plain = model_fingerprint(_config(folder))
    assert model_fingerprint(_config(folder, device_map="auto")) == plain
    assert model_fingerprint(_config(folder, tensor_parallel=2)) == plain
    assert model_fingerprint(_config(folder, backend="vllm")) == plain
    assert len({plain, *(model_fingerprint(_config(folder, quantization=each)) for each in ("int8", "nf4"))}) == 3


def test_the_identity_of_a_plain_model_is_what_it_was(tmp_path: Path) -> None:
    """Of files with these contents, before there was any other way to load them."""
    for name, content in {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}"}.items():
        (tmp_path / name).write_text(content)
    found = model_fingerprint(_config(tmp_path))
    assert found == "1b907a1db93e653febdfdea80fc915e979bf371cad6f37cc1d4f8d02f41fbd43"


def test_checkpoints_that_are_quantised_already(wide: Path, tmp_path: Path) -> None:
    load_trunk(_config(wide, quantization="nf4")).model.save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path)
    config = _config(tmp_path)
    trunk = load_trunk(config)
    np.testing.assert_array_equal(_signatures(config), _signatures(_config(wide, quantization="nf4")))
    plan = plan_weights(config, working=0)
    assert plan.kind == "bitsandbytes, as stored" and plan.weight_bytes == pytest.approx(trunk.weight_bytes, rel=0.1)
    with pytest.raises(ModelError, match=r"quantised already \(bitsandbytes\); leave out model\.quantization"):
        load_trunk(_config(tmp_path, quantization="int8"))
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_trunk(config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device_map": "all"}, "device_map"),
        ({"device_map": {"": "tpu"}}, "'tpu' of module '' is not a device; use cpu, disk or cuda:N"),
        ({"device_map": "auto", "device": "cpu"}, "cannot use 'device' with 'device_map'"),
        ({"device_map": "auto", "tensor_parallel": 2}, "cannot use 'device_map' with 'tensor_parallel'"),
        ({"quantization": "int8", "tensor_parallel": 2}, "cannot use 'quantization' with 'tensor_parallel'"),
        ({"device_map": "auto", "backend": "vllm"}, "cannot use 'device_map' with 'backend: vllm'"),
        ({"quantization": "nf4", "backend": "vllm"}, "cannot use 'quantization' with 'backend: vllm'"),
        ({"device": "cuda:1", "tensor_parallel": 2}, "'device' cannot name one GPU"),
        ({"tensor_parallel": 0}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ModelConfig.model_validate({"name": "m", **options})


def test_a_map_survives_being_stored() -> None:
    config = ModelConfig.model_validate({"name": "m", "device_map": {"model": 0, "lm_head": "cuda:1"}})
    assert config.device_map == (("lm_head", "cuda:1"), ("model", "cuda:0"))
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config and hash(config)


def test_training_needs_the_plain_model(tmp_path: Path) -> None:
    held = "{tokens: 10, held_out: {h: {queries: q.jsonl}}}"
    with pytest.raises(ConfigError, match="'closed_loop' trains the model in one process on one device"):
        load(write_curation(tmp_path), f"closed_loop={held}", "model.quantization=int8")


def test_missing_libraries_are_named_with_how_to_install_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    monkeypatch.setattr("rise_ops.trunk._loaded", {})
    for options in ({"device_map": "auto"}, {"quantization": "int8"}, {"backend": "vllm"}):
        with pytest.raises(ModelError, match=r"pip install 'rise-ops\[(big|vllm)\]'"):
            load_trunk(_config(folder, **options))


def test_what_does_not_fit_is_refused_before_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("rise_ops.trunk.load_model", never)
    monkeypatch.setattr("rise_ops.trunk._loaded", {})
    monkeypatch.setattr(placement, "free_memory", lambda device: 100_000)
    for call in (lambda: load_trunk(_config(folder)), lambda: plan_ahead(_config(folder), _SKETCH, memory=_MEMORY)):
        with pytest.raises(LimitError, match=r"does not fit on cpu: .*\(float32\).*model\.quantization"):
            call()
    plain = plan_weights(_config(folder), working=0).weight_bytes
    assert plan_weights(_config(folder, quantization="int8"), working=0).weight_bytes < plain


def test_the_plan_is_told_before_the_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(write_curation(tmp_path), "sketch.seed=77")
    monkeypatch.setattr("rise_ops.trunk._loaded", {})
    caplog.set_level(logging.INFO)
    signer = open_signer(Store(config.store), config)
    texts = [record.getMessage() for record in caplog.records]
    (signing,) = (place for place, text in enumerate(texts) if "chunks at a time" in text)
    (weights,) = (place for place, text in enumerate(texts) if "of weights (" in text)
    (loaded,) = (place for place, text in enumerate(texts) if text.startswith("loaded Trunk"))
    assert max(signing, weights) < loaded
    assert f"at most {signer.plan.tokens:,} tokens in {signer.plan.chunks:,} chunks" in texts[signing]
    assert sign_memory.plan_ahead(config.model, config.sketch, memory=signer.plan.memory) == signer.plan


def test_a_plan_of_a_run_says_where_the_weights_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_curation(tmp_path)
    planned = plan_run(load(path))["model"]
    assert planned["places"] == {"cpu": planned["weight_bytes"]} and planned["problem"] == ""
    assert "MiB of weights (float32)" in planned["text"]
    smaller = plan_run(load(path, "model.quantization=int8"))["model"]
    assert smaller["weight_bytes"] < planned["weight_bytes"] and "(int8)" in smaller["text"]
    monkeypatch.setattr(placement, "free_memory", lambda device: 1_000)
    assert "does not fit on cpu" in plan_run(load(path, "model.tensor_parallel=2"))["model"]["problem"]


class _Gpus:
    """Stands in for the part of torch.cuda that plans ask."""

    def __init__(self, *free: int, total: int) -> None:
        self.free, self.total = free, total

    def mem_get_info(self, device: Any) -> tuple[int, int]:
        return self.free[torch.device(device).index or 0 if not isinstance(device, int) else device], self.total

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.free))
        monkeypatch.setattr(torch.cuda, "mem_get_info", self.mem_get_info)
        known = type("Properties", (), {"total_memory": self.total})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)


def test_weights_over_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = plan_weights(_config(folder, dtype="bfloat16"), working=0).weight_bytes
    head = 2 * tiny_models.VOCABULARY * 32
    _Gpus(60_000, 40_000, total=60_000).install(monkeypatch)
    room = placement.device_room(4_000)
    assert (room[0], room[1]) == (60_000 - 6_000 - 4_000, 40_000 - 6_000 - 4_000)
    first = 60_000 - 6_000 - min(4_000 + head, 15_000)
    second = first - 20_000
    wanted = {"dtype": "bfloat16", "device_map": "sequential"}
    plan = plan_weights(_config(folder, **wanted), working=4_000)
    assert plan.places == {"cuda:0": first, "cuda:1": second, "cpu": total - first - second}
    assert plan.head_device == torch.device("cuda:0") and _cut_up(plan) == total
    split = plan_weights(_config(folder, device="cuda", dtype="bfloat16", tensor_parallel=2), working=0)
    assert split.places == {"cuda:0": -(-total // 2) + head, "cuda:1": -(-total // 2)}
    with pytest.raises(ModelError, match="tensor_parallel is 4, and there are 2 CUDA devices"):
        plan_weights(_config(folder, device="cuda", tensor_parallel=4), working=0)
    mapped = plan_weights(_config(folder, dtype="bfloat16", device_map=_layers(one="cuda:1", two="cuda:0")), working=0)
    assert list(mapped.places)[-1] == "cpu" and _cut_up(mapped) == total
    with pytest.raises(ModelError, match="cuda:2 is not here"):
        plan_weights(_config(folder, device_map=_layers(one="cuda:2")), working=0)


def test_the_fullest_gpu_bounds_the_working_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _Gpus(1_000, 1_000, total=1_000).install(monkeypatch)
    assert placement.working_room(800, {"cuda:0": 200, "cuda:1": 300, "cpu": 5_000}) == 600
    assert placement.working_room(500, {"cuda:0": 200, "cuda:1": 300}) == 500
    assert placement.working_room(500, {"cuda:0": 2_000}) == 0
