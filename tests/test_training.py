"""Training: batches, schedule and steps against plain references; the same weights after an interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rise_ops.compare_config import ClosedLoopConfig
from rise_ops.config import ModelConfig, TargetConfig
from rise_ops.errors import ModelError
from rise_ops.store import Store
from rise_ops.training import Checkpoints, TokenRows, encoded_rows, fresh_trunk, learning_rate, train
from rise_ops.trunk import Trunk, load_trunk
from tests.tiny_models import VOCABULARY, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(name=str(save("llama", tmp_path_factory.mktemp("model"))), device="cpu")


def _loop(**changes: Any) -> ClosedLoopConfig:
    held_out = {"own": TargetConfig(queries="none.jsonl")}
    small = {"tokens": 1, "context": 12, "batch": 2, "checkpoint_steps": 3, "learning_rate": 1e-2}
    return ClosedLoopConfig.model_validate({"held_out": held_out, **small, **changes})


def _rows(count: int = 9, *, eos: int | None = 0) -> TokenRows:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 20, count).tolist()
    return TokenRows.of([generator.integers(1, VOCABULARY, length, np.int32) for length in lengths], eos=eos)


def _weights(trunk: Trunk) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in trunk.model.named_parameters()}


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_rows_end_with_one_end_of_text() -> None:
    parts = [np.array(ids, np.int32) for ids in ([5, 6], [7, 0], [8])]
    closed, plain = TokenRows.of(parts, eos=0), TokenRows.of(parts, eos=None)
    assert closed.ids.tolist() == [5, 6, 0, 7, 0, 8, 0] and closed.ends.tolist() == [3, 5, 7]
    assert plain.ids.tolist() == [5, 6, 7, 0, 8] and plain.ends.tolist() == [2, 4, 5]


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    rows = TokenRows.of([np.full(length, length, np.int32) for length in (3, 4, 5)], eos=None)
    epochs = [rows.sequences(5, seed=0, epoch=epoch) for epoch in range(8)]
    assert {found.shape for found in epochs} == {(3, 5)}
    for found in epochs:
        flat = found.reshape(-1)
        assert flat[12:].tolist() == [-1] * 3
        runs = [int(flat[place]) for place in range(12) if place == 0 or flat[place] != flat[place - 1]]
        assert sorted(runs) == [3, 4, 5] and all((flat == size).sum() == size for size in runs)
    assert len({found.tobytes() for found in epochs}) > 1
    assert (rows.sequences(5, seed=0, epoch=1) == epochs[1]).all()
    assert {rows.sequences(5, seed=seed, epoch=0).tobytes() for seed in range(8)} != {epochs[0].tobytes()}


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = _loop(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05
    assert learning_rate(0, 5, _loop(warmup=0.0, learning_rate=2.0)) == 2.0


def _plain(trunk: Trunk, rows: TokenRows, config: ClosedLoopConfig, seed: int) -> list[float]:
    """The same training, sequence by sequence, with Adam written out (arXiv 1711.05101, algorithm 2)."""
    parameters = list(trunk.model.requires_grad_(True).parameters())
    first, second = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
    batches = [
        batch
        for epoch in range(config.epochs)
        for batch in torch.from_numpy(rows.sequences(config.context, seed=seed, epoch=epoch)).long().split(config.batch)
    ]
    losses = []
    for step, batch in enumerate(batches):
        tokens = [sequence[sequence >= 0][None] for sequence in batch]
        terms = [
            -torch.log_softmax(trunk.model(input_ids=ids).logits[0, place].double(), -1)[ids[0, place + 1]]
            for ids in tokens
            for place in range(ids.shape[1] - 1)
        ]
        loss = torch.stack(terms).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.sqrt(sum((each.double() ** 2).sum() for each in gradients))  # type: ignore[arg-type]
        rate = learning_rate(step, len(batches), config)
        with torch.no_grad():
            for place, (own, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                clipped = gradient * min(1.0, float(config.clip / (norm.detach() + 1e-6)))
                first[place] = 0.9 * first[place] + 0.1 * clipped
                second[place] = 0.95 * second[place] + 0.05 * clipped**2
                mean, spread = first[place] / (1 - 0.9 ** (step + 1)), second[place] / (1 - 0.95 ** (step + 1))
                decay = config.weight_decay if own.ndim >= 2 else 0.0
                own.copy_(own * (1 - rate * decay) - rate * mean / (spread.sqrt() + 1e-8))
        losses.append(float(loss.detach()))
    return losses


def test_a_training_is_what_a_plain_one_is(model: ModelConfig) -> None:
    config, rows = _loop(epochs=2), _rows()
    one, two = fresh_trunk(model), fresh_trunk(model)
    found = train(one, rows, config, seed=3)
    plain = _plain(two, rows, config, seed=3)
    assert found.steps == len(plain) == 2 * -(-len(rows.ids) // 24)
    assert found.tokens == 2 * len(rows.ids)
    assert found.losses == pytest.approx(plain, rel=1e-4)
    for name, weight in _weights(one).items():
        torch.testing.assert_close(weight, _weights(two)[name], rtol=1e-3, atol=3e-4)


def test_training_learns_and_leaves_the_model_of_the_process_alone(model: ModelConfig) -> None:
    before = _weights(load_trunk(model))
    trunk = fresh_trunk(model)
    assert _equal(before, _weights(trunk)) and trunk.model is not load_trunk(model).model
    rows = encoded_rows(trunk, [["the quick brown fox"] * 3, ["the quick brown fox"] * 5])
    assert rows.ids[rows.ends - 1].tolist() == [trunk.tokenizer.eos_token_id] * 8
    found = train(trunk, rows, _loop(epochs=8), seed=0)
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert not _equal(before, _weights(trunk))
    assert _equal(before, _weights(load_trunk(model)))


def test_a_step_in_several_passes_is_the_same_step(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rows = _loop(batch=4), _rows()
    one, two = fresh_trunk(model), fresh_trunk(model)
    whole = train(one, rows, config, seed=0)
    monkeypatch.setattr("rise_ops.training._LOGIT_BYTES", 1)
    pieces = train(two, rows, config, seed=0)
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-4)


class _Killed(Exception):
    pass


def _killed_after(steps: int) -> Any:
    def progress(done: int, _: int | None) -> None:
        if done == steps:
            raise _Killed

    return progress


@pytest.mark.parametrize("stop", [2, 3, 4, 8])
def test_a_killed_training_gives_the_same_weights(model: ModelConfig, tmp_path: Path, stop: int) -> None:
    config, rows = _loop(epochs=2), _rows(18)
    whole = fresh_trunk(model)
    uninterrupted = train(whole, rows, config, seed=1)
    assert uninterrupted.steps > stop
    checkpoints = Checkpoints(Store(str(tmp_path)), "loops/x/checkpoints/rise-1")
    with pytest.raises(_Killed):
        train(fresh_trunk(model), rows, config, seed=1, checkpoints=checkpoints, progress=_killed_after(stop))
    kept = sorted(path.name for path in (tmp_path / checkpoints.folder).glob("*"))
    step = f"{stop // 3 * 3:08d}"
    assert kept == ([f"{step}.json", f"{step}.safetensors"] if stop >= 3 else [])
    seen: list[int] = []
    resumed = fresh_trunk(model)
    found = train(resumed, rows, config, seed=1, checkpoints=checkpoints, progress=lambda done, _: seen.append(done))
    assert seen[0] == stop // 3 * 3 + 1
    assert found == uninterrupted
    assert _equal(_weights(whole), _weights(resumed))
    checkpoints.clear()
    assert not list((tmp_path / checkpoints.folder).glob("*"))


@pytest.mark.parametrize("harm", ["damaged", "no record", "no weights", "record", "newer"])
def test_a_checkpoint_that_is_not_whole_does_not_count(model: ModelConfig, tmp_path: Path, harm: str) -> None:
    config, rows = _loop(epochs=2), _rows()
    whole = fresh_trunk(model)
    uninterrupted = train(whole, rows, config, seed=1)
    checkpoints = Checkpoints(Store(str(tmp_path)), "loops/x/checkpoints/rise-1")
    with pytest.raises(_Killed):
        train(fresh_trunk(model), rows, config, seed=1, checkpoints=checkpoints, progress=_killed_after(3))
    weights, record = (tmp_path / checkpoints.folder / f"00000003.{name}" for name in ("safetensors", "json"))
    if harm == "damaged":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    elif harm == "newer":
        record.write_text(record.read_text().replace('"format_version":1', '"format_version":9'))
    elif harm == "record":
        record.write_text("{")
    else:
        (record if harm == "no record" else weights).unlink()
    resumed, seen = fresh_trunk(model), list[int]()
    found = train(resumed, rows, config, seed=1, checkpoints=checkpoints, progress=lambda done, _: seen.append(done))
    assert seen[0] == 1 and found == uninterrupted
    assert _equal(_weights(whole), _weights(resumed))


def test_a_training_that_cannot_be_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ModelError, match=r"context is 2048, model .* reads 1024 tokens"):
        train(fresh_trunk(model), _rows(), _loop(context=2_048), seed=0)
    broken = fresh_trunk(model)
    with torch.no_grad():
        broken.model.get_output_embeddings().weight[:] = math.inf
    with pytest.raises(ModelError, match=r"diverged: the loss of step 1 of \d+ is nan; lower closed_loop"):
        train(broken, _rows(), _loop(), seed=0)
