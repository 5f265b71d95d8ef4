"""What methods hold in memory, and what tells their outcomes apart."""

from __future__ import annotations

import logging
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rise_ops.baselines import zeroth_order
from rise_ops.baselines.base import Query
from rise_ops.baselines.last_layer import LastLayer
from rise_ops.baselines.rapidin import Folding
from rise_ops.baselines.zeroth_order import ZerothOrder
from rise_ops.compare_config import LastLayerMethod, ZerothOrderMethod
from rise_ops.comparison import Material, method_key
from rise_ops.trunk import Trunk, load_trunk
from tests import tiny_models
from tests.curation import load, write_curation
from tests.test_baselines import QUERIES, TEXTS, Listed, _setting, _trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX whose head is not tied to its embeddings."""
    return tiny_models.save("gpt_neox", tmp_path_factory.mktemp("neox"))


def test_z0_inf_holds_one_checkpoint_at_a_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # a handler may keep what records refer to
    last = _trained(folder, tmp_path / "last", seed=1)
    alive: weakref.WeakSet[Trunk] = weakref.WeakSet()
    most = []

    def counted(config: Any) -> Trunk:
        trunk = load_trunk(config)
        alive.add(trunk)
        most.append(len(alive))
        return trunk

    monkeypatch.setattr(zeroth_order, "load_trunk", counted)
    method = ZerothOrder(_setting(last, tmp_path), ZerothOrderMethod(method="z0_inf", checkpoints=(str(folder),)))
    method.load()
    method.build(Listed(TEXTS))
    assert max(most) == 1


def test_folding_shuffles_whatever_the_length() -> None:
    for entries in range(3_000_000, 3_000_000 + 64 * 40, 64):
        runs = Folding(entries, 64, shuffles=2, seed=0).runs
        assert not (runs.diff() >= 0).all(), entries


def test_last_layer_holds_no_more_gradients_than_it_says(folder: Path, tmp_path: Path) -> None:
    config = LastLayerMethod(method="last_layer")
    need = LastLayer(_setting(folder, tmp_path), config).need().bytes
    method = LastLayer(_setting(folder, tmp_path, memory=need), config)
    method.load()
    size = 4 * method.setting.shape.vocab_size * method.setting.shape.hidden_dim
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        list(method.scores(Listed(TEXTS), [*QUERIES, Query(TEXTS[0])]))
    events = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    changes = [each.nbytes() for each in sorted(events, key=lambda each: each.start_ns())]
    held = np.cumsum([change for change in changes if abs(change) >= size and change % size == 0])
    assert held.max() <= 3 * size


def test_what_was_measured_with_other_checkpoints_is_not_reused(folder: Path, tmp_path: Path) -> None:
    config = load(write_curation(tmp_path, compare={"label": "label"}))
    checkpoint = _trained(folder, tmp_path / "checkpoint", seed=1)
    method = ZerothOrderMethod(method="z0_inf", checkpoints=(str(checkpoint),))
    material = Material(blocks=(), rows=0, queries=(), wanted=(), identity="0")
    before = method_key(material, config, method, 0)
    _trained(folder, checkpoint, seed=2)
    assert method_key(material, config, method, 0) != before
