"""What is told of a run, and to whom: where it cannot be told, the run ends as it would have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.curate import curate
from flows.index_corpus import index_corpus
from rise_ops.errors import CurationError, SourceError, StoreError
from rise_ops.runs import list_runs, read_run
from rise_ops.store import Store
from tests.curation import ROWS, load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")


def _refuse(*_: Any, **__: Any) -> Any:
    raise StoreError("the store refuses")


def _unreachable(*_: Any, **__: Any) -> Any:
    raise httpx.ReadTimeout("the server does not answer")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_curation(tmp_path)


def test_events_and_metrics_that_cannot_be_stored_do_not_fail_a_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rise_ops.openlineage.RunEvents.finish", _refuse)
    monkeypatch.setattr("tasks.recording.write_metrics", _refuse)
    monkeypatch.setattr("tasks.recording.publish_metrics", _refuse)
    monkeypatch.setattr("tasks.ingest.source_columns", _refuse)
    config = load(path)
    summary = curate(config)
    record = read_run(Store(config.store), summary["run_id"])
    assert (record["status"], summary["rows"]) == ("completed", ROWS)
    assert Path(summary["report"]).exists()


def test_a_server_that_takes_no_artifacts_does_not_fail_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("create_table_artifact", "create_markdown_artifact", "create_link_artifact"):
        monkeypatch.setattr(f"tasks.recording.{name}", _unreachable)
    monkeypatch.setattr("tasks.progress.create_progress_artifact", _unreachable)
    assert curate(load(path))["rows"] == ROWS


def test_progress_that_cannot_be_shown_does_not_fail_a_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.progress.update_progress_artifact", _unreachable)
    assert index_corpus(load(path))["rows_sketched"] == ROWS


def test_a_failed_run_leaves_its_record_where_its_events_cannot_be_stored(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rise_ops.openlineage.RunEvents.finish", _refuse)
    monkeypatch.setattr("tasks.ingest.ingest_object", _damaged)
    config = load(path)
    with pytest.raises(SourceError, match="is damaged"):
        index_corpus(config)
    (run_id,) = list_runs(Store(config.store))
    assert "is damaged" in read_run(Store(config.store), run_id)["error"]


def _damaged(*_: Any, **__: Any) -> Any:
    raise SourceError("part-0.jsonl is damaged")


def test_a_run_whose_report_fails_is_told_as_failed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "collector"
    folder.mkdir()
    monkeypatch.setenv("CURATE_PROMETHEUS_DIR", str(folder))
    monkeypatch.setattr("tasks.recording.write_report", _refuse)
    config = load(path)
    with pytest.raises(StoreError, match="refuses"):
        curate(config)
    (metrics,) = folder.glob("*.prom")
    assert _success(metrics) == 0.0
    (run_id,) = list_runs(Store(config.store))
    lines = Store(config.store).get(f"runs/{run_id}/openlineage.jsonl").decode().splitlines()
    assert json.loads(lines[-1])["eventType"] == "FAIL"


def test_a_run_that_cannot_begin_is_told_as_failed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "collector"
    folder.mkdir()
    monkeypatch.setenv("CURATE_PROMETHEUS_DIR", str(folder))
    config = load(path)
    index_corpus(config)
    (metrics,) = folder.glob("*.prom")
    assert _success(metrics) == 1.0
    monkeypatch.setattr("tasks.recording.wait_for_collectors", _refuse)
    with pytest.raises(CurationError, match="refuses"):
        index_corpus(config)
    assert _success(metrics) == 0.0


def _success(metrics: Path) -> float:
    (line,) = [
        line for line in metrics.read_text(encoding="utf-8").splitlines() if line.startswith("curate_run_success")
    ]
    return float(line.rpartition(" ")[2])
