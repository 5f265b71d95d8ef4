"""A model split among processes: the same signatures, and what happens when one of them is lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rise_ops import tensor_parallel
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ModelError
from rise_ops.placement import plan_weights
from rise_ops.signatures import Signer
from rise_ops.tensor_parallel import TensorParallelEngine, _Ranks
from rise_ops.trunk import Trunk, load_trunk, unload_trunk
from tests import tiny_models

_TEXTS = ["the quick brown fox", "a small green field near the river " * 60, "lazy dog jumps"]
_SKETCH = SketchConfig(dim_r=32, dim_h=16, dim_g=16)
_ROOT = Path(__file__).parents[1]
_PARENT = """
import sys, time
from rise_ops.config import ModelConfig
from rise_ops.trunk import load_trunk
trunk = load_trunk(ModelConfig(name=sys.argv[1], device="cpu", tensor_parallel=2))
print(*trunk.engine.processes, flush=True)
time.sleep(600)
"""


def _config(folder: Path, **options: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(folder), "device": "cpu", **options})


def _engine(trunk: Trunk) -> TensorParallelEngine:
    assert isinstance(trunk.engine, TensorParallelEngine)
    return trunk.engine


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _ended(processes: list[int], seconds: float = 30) -> bool:
    limit = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(_alive, processes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("olmo3", tmp_path_factory.mktemp("models") / "m")


@pytest.fixture(scope="module")
def trunk(folder: Path) -> Iterator[Trunk]:
    trunk = load_trunk(_config(folder, tensor_parallel=2))
    yield trunk
    unload_trunk(trunk)


def _states(trunk: Trunk, tokens: int = 24) -> torch.Tensor:
    return trunk.hidden_states(torch.arange(tokens)[None], [tokens])


def test_signatures_are_those_of_one_process(trunk: Trunk, folder: Path) -> None:
    plain = load_trunk(_config(folder))
    assert len(_engine(trunk).processes) == 2 and os.getpid() not in _engine(trunk).processes
    assert torch.equal(trunk.unembedding, plain.unembedding) and trunk.shape == plain.shape
    torch.testing.assert_close(_states(trunk), _states(plain), atol=1e-4, rtol=1e-4)
    one, two = (Signer(each, _SKETCH, memory=2**28).rows(_TEXTS) for each in (trunk, plain))
    assert one.chunks.tolist() == two.chunks.tolist() and max(one.chunks) > 1
    cosines = (one.signature.astype(np.float64) * two.signature.astype(np.float64)).sum(axis=1)
    assert (cosines > 0.9999).all()


def test_each_process_holds_a_part(trunk: Trunk, folder: Path) -> None:
    plan = plan_weights(_config(folder, tensor_parallel=2), working=0)
    assert trunk.weight_bytes == pytest.approx(plan.places["cpu"], rel=0.02)  # norms are in every part
    assert plan.places["cpu"] == plan.weight_bytes + plan.head_bytes


def test_the_model_itself_is_not_here(trunk: Trunk) -> None:
    with pytest.raises(ModelError, match=r"runs in other processes.*leave out model\.tensor_parallel"):
        _ = trunk.model


def test_a_lost_process_is_an_error(trunk: Trunk) -> None:
    processes = _engine(trunk).processes
    os.kill(processes[1], signal.SIGKILL)
    with pytest.raises(ModelError, match=r"rank 1 of 2 failed \(its process has ended with code -9\)"):
        _states(trunk)
    assert _ended(processes) and _engine(trunk).processes == []


def test_all_start_again_and_halve_the_batch_where_one_has_no_memory(
    trunk: Trunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Signer(trunk, _SKETCH, memory=2**28)
    expected = signer.rows(_TEXTS).signature
    processes, ranks = _engine(trunk).processes, _engine(trunk)._ranks
    assert ranks is not None
    receive = ranks._receive
    told: list[int] = []

    def once(rank: int) -> Any:
        found = receive(rank)
        if told:
            return found
        told.append(rank)
        return {"failure": "memory", "text": "no memory"}

    monkeypatch.setattr(ranks, "_receive", once)
    assert (signer.rows(_TEXTS).signature.astype(np.float32) * expected).sum(axis=1) == pytest.approx(1, abs=1e-3)
    assert signer.halvings == 1 and _ended(processes) and len(_engine(trunk).processes) == 2


def test_a_silent_process_is_an_error(trunk: Trunk, monkeypatch: pytest.MonkeyPatch) -> None:
    _states(trunk)
    processes = _engine(trunk).processes
    monkeypatch.setattr(tensor_parallel, "STEP_SECONDS", 1.0)
    os.kill(processes[0], signal.SIGSTOP)
    with pytest.raises(ModelError, match="rank 0 of 2 has not answered for 1 s"):
        _states(trunk)
    assert _ended(processes)


def test_models_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"rank . of 2 failed .*has no `tp_plan`"):
        load_trunk(_config(tiny_models.save("gpt2", tmp_path / "m"), tensor_parallel=2))


def test_processes_end_when_nobody_holds_them(folder: Path) -> None:
    ranks = _Ranks(_config(folder, tensor_parallel=2), torch.device("cpu"))
    processes = [each.pid for each in ranks.processes]
    assert all(map(_alive, processes))
    del ranks
    gc.collect()
    assert _ended(processes)


def test_processes_end_with_a_killed_parent(folder: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(folder)], cwd=_ROOT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    processes = [int(each) for each in parent.stdout.readline().split()]
    assert len(processes) == 2 and all(map(_alive, processes))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _ended(processes)
