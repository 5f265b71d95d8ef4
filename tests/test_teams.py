"""The teams' configurations of `deployments/teams/` are whole, and fit the deployments that take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rise_ops.config import load_config

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
FILES = sorted((DEPLOYMENTS / "teams").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_team_curates_a_bucket_by_contrast_and_budget(path: Path) -> None:
    config = load_config(path)
    assert config.corpus.name == config.export_name == path.stem
    assert config.store == f"s3://curation/{path.stem}"
    assert all(uri.startswith(f"s3://raw/{path.stem}/") for uri in config.corpus.sources)
    assert min(config.weights.values()) < 0 < max(config.weights.values())
    assert any(value is not None for value in config.selection.keep.model_dump().values())


def test_every_team_has_its_deployments() -> None:
    document = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text(encoding="utf-8"))
    deployed = {deployment["name"].rpartition("-")[0] for deployment in document["deployments"]}
    assert deployed == {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_team_fits_into_a_variable(path: Path) -> None:
    assert len(json.dumps(load_config(path).model_dump(mode="json"))) <= 5_000, "characters of a Prefect variable"
