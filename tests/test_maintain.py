"""Maintenance as a flow: what is broken fails it, garbage goes, and runs at work are left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows.index_corpus import index_corpus
from flows.maintain import maintain
from rise_ops.alive import alive
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError, IntegrityError
from rise_ops.store import Store
from tests.curation import load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")


@pytest.fixture
def config(tmp_path: Path) -> CurationConfig:
    """A corpus that is indexed, and a store that holds garbage."""
    found = load(write_curation(tmp_path))
    index_corpus(found)
    Store(found.store).create(_GARBAGE, b"what a killed run left")
    return found


_GARBAGE = "runs/killed/decisions.parquet"


def artifacts(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))


def test_a_whole_store_loses_its_garbage_only_when_asked(config: CurationConfig) -> None:
    looked = maintain(config, deep=True)
    assert looked["checked"] > 5 and looked["faults"] == 0 and looked["collected"] is None
    assert Store(config.store).exists(_GARBAGE)
    removed = maintain(config, garbage=True, keep=1)
    assert removed["collected"]["objects"] >= 1 and removed["collected"]["refused"] is None
    assert removed["collected"]["kept"] == {"tiny": [1]}
    assert not Store(config.store).exists(_GARBAGE)
    assert artifacts("store-garbage")


def test_what_is_broken_fails_the_run_and_keeps_the_garbage(config: CurationConfig) -> None:
    (block,) = (Path(config.store) / "blocks").iterdir()
    block.unlink()
    with pytest.raises(IntegrityError, match=rf"1 of \d+ .* are broken.*{block.name}"):
        maintain(config, garbage=True)
    assert Store(config.store).exists(_GARBAGE)
    assert any(block.name in artifact.data for artifact in artifacts("store-faults"))
    assert index_corpus(config)["rows"] > 0  # it is made again
    assert maintain(config)["faults"] == 0


def test_garbage_waits_for_a_run_at_work(config: CurationConfig) -> None:
    with alive(Store(config.store), "a-run-at-work"):
        kept = maintain(config, garbage=True)
    assert "a-run-at-work" in kept["collected"]["refused"]
    assert kept["collected"]["objects"] == 0
    assert Store(config.store).exists(_GARBAGE)


def test_a_store_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path), f"store={tmp_path}/nowhere")
    with pytest.raises(ConfigError, match=r"no store at .*nowhere"):
        maintain(config)
