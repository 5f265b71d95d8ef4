"""Lineage: from a run, an export or a row back to a line in a source object, and never a lie."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rise_ops.config import ExportConfig, KeepConfig, SelectionConfig
from rise_ops.errors import ConfigError
from rise_ops.export import export_rows
from rise_ops.lineage import trace
from rise_ops.runs import code_identity, list_runs, read_run, reference, stage_record, write_run
from rise_ops.selection import decide
from rise_ops.store import Store
from tests.corpora import make_rows, write_as
from tests.indexed import INDEX, Indexed, index_rows, make_target, score_parts
from tests.test_export import LINEAGE

ROWS = make_rows(300)


def leave_run(indexed: Indexed, run_id: str, keep: Mapping[str, Any], **export: Any) -> None:
    """What a flow leaves behind."""
    version, store = indexed.version, indexed.store
    parts = score_parts(indexed, {"good": make_target(3)}, run_id=run_id)
    decide(
        store, version, run_id=run_id, parts=parts, weights={"good": 1.0}, targets=["good"], aggregate="mean",
        selection=SelectionConfig(keep=KeepConfig(**keep)), memory=2**30,
    )  # fmt: skip
    corpus = {"name": version.corpus, "version": version.version, "snapshot_id": version.snapshot_id}
    made = export_rows(
        store, version, run_id=run_id, name="out", config=ExportConfig(**export),
        lineage=LINEAGE | {"corpus": corpus}, memory=2**30,
    )  # fmt: skip
    output = reference(store.url(f"runs/{run_id}/decisions.parquet"))
    stage = stage_record("select", started="now", seconds=1.23456, cached=False, inputs=[], outputs=[output])
    write_run(
        store,
        {
            "run_id": run_id,
            "model": {"name": "some/model", "fingerprint": "f" * 64},
            "corpus": corpus,
            "started": version.created,
            "index_id": INDEX,
            "code": code_identity(),
            "config_fingerprint": "c" * 64,
            "export": made.label,
            "stages": [stage],
        },
    )


@pytest.fixture
def indexed(tmp_path: Path) -> Indexed:
    made = index_rows(Store(str(tmp_path / "store")), tmp_path, {"raw.jsonl": ROWS})
    leave_run(made, "run-1", {"rows": 100})
    leave_run(made, "run-2", {"rows": 20})
    return made


def _doc_id(indexed: Indexed, *, rank: int) -> str:
    frame = indexed.store.scan_parquet(["runs/run-2/decisions.parquet"]).collect()
    found: str = frame.filter(frame["rank"] == rank)["doc_id"][0]
    return found


def test_a_run(indexed: Indexed) -> None:
    found = trace(indexed.store, "run-1")
    assert found == {"kind": "run", **read_run(indexed.store, "run-1"), "made_with": None, "events": None}
    (stage,) = found["stages"]
    assert stage["seconds"] == 1.235
    assert Path(stage["outputs"][0]["uri"]).exists()
    assert list_runs(indexed.store) == ["run-1", "run-2"]


def test_an_export(indexed: Indexed) -> None:
    newest, first = trace(indexed.store, "out"), trace(indexed.store, "out/0001")
    assert (newest["kind"], newest["version"], newest["rows"]) == ("export", "0002", 20)
    assert (first["version"], first["run"]["run_id"]) == ("0001", "run-1")
    with pytest.raises(ConfigError, match="versions: 0001, 0002"):
        trace(indexed.store, "out/0007")


@pytest.mark.parametrize("digits", [8, 20, 64])
def test_an_exported_row_leads_to_its_line(indexed: Indexed, tmp_path: Path, digits: int) -> None:
    doc_id = _doc_id(indexed, rank=20)
    found = trace(indexed.store, doc_id[:digits])
    assert (found["kind"], found["doc_id"]) == ("row", doc_id)
    assert [(row["run_id"], row["kept"], row["export"]) for row in found["decisions"]] == [
        ("run-2", True, "out/0002"),
        ("run-1", True, "out/0001"),
    ]
    assert found["exports"] == ["out/0001", "out/0002"]
    (source,) = found["sources"]
    line = (tmp_path / "raw.jsonl").read_text().splitlines()[source["row"]]
    assert source["uri"] == str(tmp_path / "raw.jsonl") and source["line"] == line
    assert source["object_sha"] == indexed.version.sources[0].object_sha
    assert json.loads(json.dumps(found)) == found


def test_a_dropped_row_has_no_export(indexed: Indexed) -> None:
    found = trace(indexed.store, _doc_id(indexed, rank=50))
    assert [(row["run_id"], row["reason"], row["export"]) for row in found["decisions"]] == [
        ("run-2", "over_rows", None),
        ("run-1", "kept", "out/0001"),
    ]
    assert found["exports"] == ["out/0001"]
    assert found["run_id"] == "run-1"  # which exported it, though another decided later
    assert found["record"] == indexed.store.url("runs/run-1/run.json")


@pytest.mark.parametrize("target", ["nothing", "abc", "ABCDEF0123", "0" * 64])
def test_what_is_unknown_is_said(indexed: Indexed, target: str) -> None:
    with pytest.raises(ConfigError, match=r"no run or export|no run in .* decided"):
        trace(indexed.store, target)


def test_an_ambiguous_beginning_is_refused(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rise_ops.lineage._MIN_DOC_ID", 1)
    with pytest.raises(ConfigError, match="give more digits"):
        trace(indexed.store, "a")


@pytest.mark.parametrize("change", ["deleted", "edited", "grown"])
def test_a_source_that_changed_is_not_quoted(indexed: Indexed, tmp_path: Path, change: str) -> None:
    raw = tmp_path / "raw.jsonl"
    if change == "deleted":
        raw.unlink()
    elif change == "edited":
        raw.write_text(raw.read_text().replace("word1", "WORD1"))
    else:
        write_as(raw, [{"text": "first"}, *ROWS])
    (source,) = trace(indexed.store, _doc_id(indexed, rank=1))["sources"]
    assert "line" not in source
    assert str(raw) in source["unavailable"]


def test_a_source_that_was_only_touched_is_quoted(indexed: Indexed, tmp_path: Path) -> None:
    os.utime(tmp_path / "raw.jsonl", ns=(1, 1))
    (source,) = trace(indexed.store, _doc_id(indexed, rank=1))["sources"]
    assert json.loads(source["line"]) == ROWS[source["row"]]


def test_a_row_at_several_places(tmp_path: Path) -> None:
    indexed = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": ROWS, "b.jsonl": [*ROWS[:3], ROWS[0]]})
    leave_run(indexed, "run-2", {})
    doc_id = indexed.rows.filter(indexed.rows["text"] == ROWS[0]["text"])["doc_id"][0]
    places = [(Path(source["uri"]).name, source["row"]) for source in trace(indexed.store, doc_id)["sources"]]
    assert sorted(places) == [("a.jsonl", 0), ("b.jsonl", 0), ("b.jsonl", 3)]


@pytest.mark.s3
def test_no_secret_is_written_or_shown(s3_bucket: str, tmp_path: Path) -> None:
    store = Store(f"s3://{s3_bucket}/store")
    indexed = index_rows(store, tmp_path, {"raw.jsonl": ROWS})
    leave_run(indexed, "run-2", {"rows": 5})
    secrets = [os.environ[name] for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID")]
    shown = [json.dumps(trace(store, target)) for target in ("run-2", "out", _doc_id(indexed, rank=1))]
    written = [store.get(key) for key, _ in store.list("")]
    assert len(written) > 20
    for secret in secrets:
        assert not any(secret in text for text in shown)
        assert not any(secret.encode() in data for data in written)


def test_an_empty_store_knows_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run or export"):
        trace(Store(str(tmp_path / "nothing")), "run-1")
    with pytest.raises(ConfigError, match="the latest are: none"):
        read_run(Store(str(tmp_path / "nothing")), "run-1")
