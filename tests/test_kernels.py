"""The Triton kernels: equal to tensor operations, compiled for the GPUs that they are for, and not trusted blindly."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rise_ops.config import SketchConfig
from rise_ops.head import ReadoutHead
from rise_ops.residual_sketch import Way
from tests import oracle

pytest.importorskip("triton", reason="triton is not here; install the extra test on Linux")

ROOT = Path(__file__).parents[1]
_DISTANCES = [
    "peaked",
    "nearly one-hot",
    "flat",
    "several blocks",
    "next token outside the support",
    "one entry",
    "at least 33 entries",
    "all entries",
    "vocabulary below top_k",
    "masked vocabulary",
    "large entries in few groups",
    "rival in the bucket of the next token",
]
_COUNTS = ["whole numbers", "all equal", "few above many equal", "no numbers", "head", "split head"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """What every case of `tests.interpreted` found."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    command = [sys.executable, "-m", "tests.interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    assert sorted(found) == sorted(_DISTANCES + _COUNTS)
    return found


@pytest.mark.parametrize("name", _DISTANCES)
def test_interpreted_kernels_equal_tensor_operations(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted[name]
    assert found["distance"] < 1e-5 and found["decided"] >= 2


@pytest.mark.parametrize("name", _COUNTS)
def test_interpreted_kernels_in_the_cases_that_are_open(name: str, interpreted: dict[str, dict[str, float]]) -> None:
    found = interpreted[name]
    assert found["distance"] < 1e-5 and found["wrong"] == 0


_TYPES = {
    "scaled": "*fp32", "values": "*fp32", "tokens": "*i64", "vocab": "i32", "k": "i32", "own": "*fp32",
    "targets": "*i64", "kept_values": "*fp32", "kept_tokens": "*i64", "counts": "*i32", "width": "i32",
    "top_k": "i32", "mass": "fp32", "min_support": "i32", "codes": "*i32", "out": "*fp32", "eps": "fp32",
    "projected": "*fp32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "warps", "constants"),
    [
        ("_candidates", 8, {"GROUPS": 4096, "WIDTH": 1024}),
        ("_candidates", 8, {"GROUPS": 512, "WIDTH": 256, "k": 1}),
        ("_support", 4, {"ADAPTIVE": True, "WIDTH": 1024}),
        ("_support", 4, {"ADAPTIVE": False, "WIDTH": 256, "top_k": 1, "min_support": 1}),
        ("_sketch_r", 4, {"WIDTH": 128, "ENTRIES": 32}),
        ("_sketch_g", 4, {"WIDTH": 64, "ENTRIES": 64, "top_k": 1}),
    ],
)
def test_kernels_compile_for_hopper(
    name: str, warps: int, constants: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To machine code, without a GPU. What equals 1 is a constant to Triton, which has other types."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rise_ops import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    signature = {each: "constexpr" if each in constants else _TYPES[each] for each in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert built.asm["cubin"].startswith(b"\x7fELF")
    assert ".target sm_90" in built.asm["ptx"]


def _head(way: Way, limit: int = 2**30) -> ReadoutHead:
    weight = torch.randn(700, 12, generator=torch.Generator().manual_seed(0))
    return ReadoutHead(weight, SketchConfig(), way=way, max_logit_bytes=limit)


def _signatures(head: ReadoutHead) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    hidden, ids = torch.randn(2, 30, 12, generator=generator), torch.randint(0, 700, (2, 30), generator=generator)
    return head.signatures(hidden, ids, [30, 11])


def test_kernels_that_cannot_run_are_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """Compiled kernels have no place on a CPU; the same happens where there is no C compiler for their launcher."""
    head = _head("triton")
    with caplog.at_level(logging.WARNING):
        found = _signatures(head)
    assert head.residuals.way == "torch"
    assert "cannot run" in caplog.text and "tensor operations" in caplog.text
    assert torch.equal(found, _signatures(_head("torch")))


@pytest.mark.parametrize("limit", [2**30, 100_000])
@pytest.mark.parametrize("error", [0.01, 0.0])
def test_kernels_that_are_wrong_are_replaced(
    error: float, limit: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first sketches are compared; those that are right are kept."""
    from rise_ops import kernels
    from rise_ops.support import merge, residuals_of, top_entries

    reference = _head("torch").residuals

    def sketches(found: Any, targets: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        found = merge(found, None, reference.config.top_k)
        right = reference.by_tensors(residuals_of(found, targets, reference.config), targets)
        right["g"][:, 0] += 3 * error
        return right

    monkeypatch.setattr(kernels, "top_entries", top_entries)
    monkeypatch.setattr(kernels, "sketches", sketches)
    head = _head("triton", limit)
    with caplog.at_level(logging.WARNING):
        found = _signatures(head)
    assert head.residuals.way == ("torch" if error else "triton")
    assert ("are wrong" in caplog.text) == bool(error)
    torch.testing.assert_close(found, _signatures(_head("torch")), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_304, 50_257])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("limit", [2**30, 64 * 2**20])
def test_kernels_equal_tensor_operations_on_a_gpu(vocab: int, temperature: float, limit: int) -> None:
    """At the sizes of Pythia-1B, in bfloat16; whole rows of logits, and slices of the vocabulary."""
    from rise_ops.support import undecided

    weight = torch.randn(vocab, 2048, device="cuda", dtype=torch.bfloat16) * 0.02
    hidden = torch.randn(1, 2_049, 2048, device="cuda", dtype=torch.bfloat16) * 3
    ids = torch.randint(0, vocab, (1, 2_049), device="cuda")
    config = SketchConfig(temperature=temperature)
    heads = [ReadoutHead(weight, config, way=way, max_logit_bytes=limit) for way in ("triton", "torch")]
    by_kernels, by_tensors = (head._factors(hidden, ids, [2_049], None) for head in heads)
    assert heads[0].residuals.way == "triton"
    found = heads[1].residuals._candidates(hidden[0, :-1], ids[0, 1:], config.top_k + 1)
    decided = ~undecided(found, ids[0, 1:], config)
    assert int(decided.sum()) > 100
    for name in ("r", "g"):
        apart = (by_kernels[name][0, :-1] - by_tensors[name][0, :-1]).norm(dim=1)[decided]
        assert float(apart.max()) < 0.0141  # cosine 0.9999
    whole = [head.signatures(hidden, ids, [2_049])[0].cpu().numpy() for head in heads]
    assert oracle.cosine(whole[0], whole[1]) >= 0.9999
