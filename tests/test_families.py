"""Model presets: sizes as published, random weights, plans before loading, and names that stand for hub names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flows.cli import app
from rise_ops import families, model_files
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ConfigError, LimitError
from rise_ops.families import PRESETS, Preset, describe, find_preset, measure_preset
from rise_ops.model_files import resolve_model
from rise_ops.signatures import Signer, plan_memory
from tests import tiny_models

PUBLISHED = {
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "olmo-2-1b": 1_484_916_736,
    "olmo-2-7b": 7_298_617_344,
    "olmo-2-13b": 13_716_198_400,
    "olmo-2-32b": 32_234_279_936,
    "olmo-3-7b": 7_298_011_136,
    "olmo-3-32b": 32_233_522_176,
}
"""Parameters that the model cards and the metadata of the published weights give."""
SMALL = Preset("small", "nobody/small", "olmo3", 500, 32, 48, 4, 4, 2, 1_024, families.LEAN)


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_are_the_published_ones(name: str) -> None:
    preset = PRESETS[name]
    shape = preset.shape()
    assert shape.parameters == PUBLISHED[name]
    assert (shape.vocab_size, shape.hidden_dim, shape.layers) == (preset.vocab_size, preset.hidden_dim, preset.layers)
    assert (shape.inner_dim, shape.max_positions) == (preset.inner_dim, preset.positions)


def test_all_published_models_are_there() -> None:
    assert set(PRESETS) == set(PUBLISHED)
    assert len({each.hub for each in PRESETS.values()}) == len(PRESETS)


def test_widths_are_those_of_the_paper() -> None:
    assert PRESETS["pythia-1b"].widths.sketch == SketchConfig()
    assert PRESETS["pythia-1b"].widths.sketch.dim == 24_576
    big = PRESETS["olmo-3-32b"].widths.sketch
    assert (big.dim, big.weight_rh, big.weight_gh) == (48 * 64 + 16 * 64, 0.7, 1.0)
    assert 2 * families.LEAN.sketch.dim == 704


def test_the_same_seed_builds_the_same_weights_and_leaves_the_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    one, two, other = (SMALL.build(seed=seed).get_output_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert not one.requires_grad and float(one.std()) > 0
    assert SMALL.build(dtype="bfloat16").get_output_embeddings().weight.dtype == torch.bfloat16


def test_random_weights_are_sketched_from_token_ids() -> None:
    trunk = SMALL.trunk()
    encoded = trunk.encode(["7 12 499", "3"])
    assert [found.ids.tolist() for found in encoded] == [[7, 12, 499], [3]]
    found = Signer(trunk, SMALL.widths.sketch, memory=2**28).rows(["7 12 499 5", "3"])
    assert found.tokens.tolist() == [4, 1] and found.chunks.tolist() == [1, 0]
    assert np.linalg.norm(found.signature[0].astype(np.float32)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("memory", [2**26, 2**28, 2**33])
def test_a_plan_before_loading_is_that_of_the_loaded_model(memory: int) -> None:
    assert SMALL.plan(memory=memory, dtype="float32") == plan_memory(SMALL.trunk(), SMALL.widths.sketch, memory=memory)


def test_a_plan_is_refused_with_numbers() -> None:
    with pytest.raises(LimitError, match=r"olmo-3-32b need .* MiB of working memory, limits\.memory allows 16 MiB"):
        PRESETS["olmo-3-32b"].plan(memory=2**24, dtype="bfloat16")


def test_description_by_hand() -> None:
    found = describe(PRESETS["pythia-14m"], memory=2**33)
    assert found["weight_bytes"] == {"float32": 4 * 14_067_712, "bfloat16": 2 * 14_067_712}
    assert found["bytes_per_row"] == 49_152 and found["widths"]["dim"] == 24_576
    # 4,096 tokens of 4·(10·128 + 3·512) + 4·(2·128 + 3·320) bytes; chunks and pending rows of 12·24,576; 40 MiB of
    # logits for each thread
    token, chunk = 4 * (1_280 + 1_536) + 4 * (256 + 960), 12 * 24_576
    logits = 40 * 2**20 * torch.get_num_threads()
    assert found["working_bytes"]["float32"] == 4_096 * token + (2_048 + 2**31 // chunk) * chunk + logits


def test_gpus_that_a_model_needs() -> None:
    big = PRESETS["olmo-3-32b"]
    found = describe(big, memory=2**33)["on_gpus"]
    # every linear weight but the LM head's in 8 bits and 4 bytes for each of its rows, or 4 bits and 4 bytes for 64
    head, linear = big.vocab_size * big.hidden_dim, sum(out * inside for out, inside in big.shape().modules)
    rows, rest = sum(out for out, _ in big.shape().modules), big.shape().parameters - linear
    assert [found[kind]["gpus"] for kind in ("bfloat16", "int8", "nf4")] == [1, 1, 1]
    assert found["bfloat16"]["weight_bytes"] == 2 * big.shape().parameters
    assert found["int8"]["weight_bytes"] == 2 * rest + linear + 4 * rows
    assert found["nf4"]["weight_bytes"] == 2 * rest + linear // 2 + linear // 16
    assert found["bfloat16"]["working_bytes"] <= 2**33 and found["bfloat16"]["tokens"] > 4_096
    small = describe(big, memory=2**33, gpu_memory=24 * 10**9)["on_gpus"]
    assert (small["bfloat16"]["gpus"], small["int8"]["gpus"], small["nf4"]["gpus"]) == (4, 2, 1)
    assert small["bfloat16"]["weight_bytes"] == -(-2 * big.shape().parameters // 4) + 2 * head
    assert describe(big, memory=2**33, gpu_memory=2 * 10**9)["on_gpus"]["bfloat16"] is None


def test_a_name_stands_for_its_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def commit(config: ModelConfig, name: str) -> str:
        asked.append(name)
        return "c" * 40

    monkeypatch.setattr(model_files, "_hub_commit", commit)
    assert resolve_model(ModelConfig(name="pythia-1b")).location == "EleutherAI/pythia-1b"
    assert resolve_model(ModelConfig(name="olmo-3-32b")).location == "allenai/Olmo-3-1125-32B"
    assert resolve_model(ModelConfig(name="someone/pythia-1b")).location == "someone/pythia-1b"
    assert asked == ["EleutherAI/pythia-1b", "allenai/Olmo-3-1125-32B", "someone/pythia-1b"]
    monkeypatch.chdir(tmp_path)
    tiny_models.save("gpt_neox", tmp_path / "pythia-1b")
    found = resolve_model(ModelConfig(name="pythia-1b"))
    assert (found.location, found.commit) == ("pythia-1b", None)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match=r"no model preset pythia-3b; known: pythia-14m, "):
        find_preset("pythia-3b")


def test_measuring_counts_tokens_and_plans() -> None:
    found = measure_preset(SMALL, tokens=600, memory=2**28, device="cpu")
    assert (found.tokens, found.dtype, found.device) == (768, "float32", "cpu")
    assert found.sketch_tokens_per_second > 0 and found.forward_tokens_per_second > 0
    assert found.weight_bytes == 4 * SMALL.shape().parameters
    assert 0 < found.planned_bytes - found.weight_bytes <= 2**28


def test_what_does_not_fit_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "free_memory", lambda device: 20 * 2**30)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("weights were built")

    monkeypatch.setattr(Preset, "build", never)
    with pytest.raises(LimitError, match=r"olmo-2-32b takes 120\.08 GiB for its weights .* has 20\.00 GiB free"):
        measure_preset(PRESETS["olmo-2-32b"], tokens=256, memory=2**33, device="cpu")


def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    done = run.invoke(app, ["models", "--json"])
    found = json.loads(done.stdout.splitlines()[-1])
    assert [each["name"] for each in found] == list(PRESETS)
    done = run.invoke(app, ["models"])
    assert "olmo-3-32b" in done.stdout and "49,152" in done.stdout and "100,278" in done.stdout
    done = run.invoke(app, ["models", "pythia-1b"])
    assert "EleutherAI/pythia-1b" in done.stdout and "1,011,781,632" in done.stdout
    assert "128/128/64" in done.stdout and "16/8/28" in done.stdout and "on GPUs of 141 GB" in done.stdout
    done = run.invoke(app, ["models", "olmo-3-32b", "--gpu-memory", "2GB"])
    assert "does not fit on 16" in done.stdout
    monkeypatch.setitem(families.__dict__, "PRESETS", {"small": SMALL})
    done = run.invoke(app, ["models", "small", "--measure", "--tokens", "300", "--memory", "256MiB", "--device", "cpu"])
    assert "tokens/s" in done.stdout and "512 tokens" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--measure"], ["nothing"], ["pythia-14m", "--memory", "much"], ["pythia-14m", "--gpu-memory", "x"]]
)
def test_wrong_use(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["models", *arguments])
    assert isinstance(done.exception, ConfigError)
