"""Where a source object went: found by brute force in the exports, and by the command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.cli import main
from rise_ops import withdrawal
from rise_ops.errors import ConfigError
from rise_ops.export import list_exports
from rise_ops.garbage import collect_garbage
from rise_ops.store import Store
from rise_ops.withdrawal import trace_source
from tests.corpora import make_rows
from tests.indexed import Indexed, index_rows
from tests.test_lineage import leave_run

Json = dict[str, Any]

_ALL = make_rows(640)
A, B, C = _ALL[:300], [*_ALL[300:600], *_ALL[:5]], _ALL[600:]
"""`a` and `b` share five rows; `c` is small, so that it is packed."""
SHARED = 5


def make_store(folder: Path, **export: Any) -> Indexed:
    """Version 1 has `a`, `b` and `c`, version 2 has `a` no more; a run and an export of each."""
    store = Store(str(folder / "store"))
    first = index_rows(store, folder, {"raw/a.jsonl": A, "raw/b.jsonl": B, "raw/c.jsonl": C})
    leave_run(first, "run-1", {}, **export)
    second = index_rows(store, folder, {"raw/b.jsonl": B, "raw/c.jsonl": C})
    leave_run(second, "run-2", {}, **export)
    assert (first.version.version, second.version.version) == (1, 2)
    return second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    made = tmp_path_factory.mktemp("withdrawal")
    (made / "raw").mkdir()
    make_store(made)
    return made


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the store to break; sources stay where they are."""
    shutil.copytree(folder / "store", tmp_path / "store")
    return tmp_path


def store_of(folder: Path) -> Store:
    return Store(str(folder / "store"))


def exports_of(found: Json) -> dict[str, tuple[int, int]]:
    return {item["export"]: (item["rows"], item["rows_elsewhere"]) for item in found["exports"]}


def test_an_object_that_left(folder: Path) -> None:
    store, uri = store_of(folder), str(folder / "raw" / "a.jsonl")
    found = trace_source(store, uri)
    (corpus,) = found["corpora"]
    (item,) = corpus["objects"]
    assert (item["uri"], item["versions"], item["current"], item["rows"]) == (uri, [1], False, len(A))
    assert (corpus["current_version"], corpus["count"], corpus["current"]) == (2, 1, 0)
    (run,) = found["runs"]
    assert (run["run_id"], run["rows"], run["kept"], run["export"]) == ("run-1", len(A), len(A), "out/0001")
    assert exports_of(found) == {"out/0001": (len(A), SHARED), "out/0002": (0, SHARED)}
    assert json.loads(json.dumps(found)) == found


def test_the_rows_are_those_of_the_exported_files(folder: Path) -> None:
    store, uri = store_of(folder), str(folder / "raw" / "a.jsonl")
    data = pl.read_parquet(f"{store.url('exports/out/0001')}/data/*.parquet")
    mine = data.filter(pl.col("source_uri") == uri)
    shared = data.filter(pl.col("source_uri") != uri, pl.col("doc_id").is_in(mine["doc_id"].to_list()))
    found = trace_source(store, uri)["exports"][0]
    columns = ["doc_id", "source_uri", "source_row"]
    assert found["places"] == mine.select(columns).to_dicts()
    assert found["elsewhere"] == shared.select(columns).to_dicts()
    assert len(found["elsewhere"]) == SHARED


def test_an_object_that_is_there(folder: Path) -> None:
    found = trace_source(store_of(folder), str(folder / "raw" / "b.jsonl"))
    (corpus,) = found["corpora"]
    assert (corpus["current"], corpus["objects"][0]["versions"]) == (1, [1, 2])
    assert [run["run_id"] for run in found["runs"]] == ["run-2", "run-1"]
    assert exports_of(found) == {"out/0001": (len(B), SHARED), "out/0002": (len(B), 0)}
    assert "corpus.sources of corpus" in found["next"][0]


def test_an_object_that_is_packed(folder: Path) -> None:
    found = trace_source(store_of(folder), str(folder / "raw" / "c.jsonl"))
    assert exports_of(found) == {"out/0001": (len(C), 0), "out/0002": (len(C), 0)}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("raw/", "abc"), ("raw/*.jsonl", "abc"), ("*", "abc"), ("raw/[ab].jsonl", "ab"), ("./raw/../raw/a.jsonl", "a")],
)
def test_folders_globs_and_relative_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: str
) -> None:
    monkeypatch.chdir(folder)
    found = trace_source(store_of(folder), pattern)
    objects = [Path(item["uri"]).stem for item in found["corpora"][0]["objects"]]
    assert objects == list(names)
    assert found["exports"][0]["rows"] == sum({"a": len(A), "b": len(B), "c": len(C)}[name] for name in names)


def test_a_folder_is_not_a_beginning(folder: Path) -> None:
    with pytest.raises(ConfigError, match="nothing in"):
        trace_source(store_of(folder), str(folder / "ra"))


def test_the_answer_does_not_depend_on_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, uri = store_of(folder), str(folder / "raw" / "*")
    whole = [trace_source(store, uri), trace_source(store, str(folder / "raw" / "a.jsonl"))]
    monkeypatch.setattr(withdrawal, "_PART_ROWS", 40)
    monkeypatch.setattr(withdrawal, "_SLICE_ROWS", 64)
    parts = [trace_source(store, uri), trace_source(store, str(folder / "raw" / "a.jsonl"))]
    for one in (*whole, *parts):
        for export in one["exports"]:
            export["elsewhere"].sort(key=lambda place: (place["doc_id"], place["source_row"]))
    assert parts == whole


def test_what_is_listed_is_bounded_and_what_is_counted_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(withdrawal, "LISTED", 3)
    found = trace_source(store_of(folder), str(folder / "raw" / "a.jsonl"))["exports"][0]
    assert (found["rows"], len(found["places"])) == (len(A), 3)
    assert (found["rows_elsewhere"], len(found["elsewhere"])) == (SHARED, 3)


def test_exports_as_lines(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    store = make_store(tmp_path, format="jsonl.zst").store
    found = trace_source(store, str(tmp_path / "raw" / "a.jsonl"))
    assert exports_of(found) == {"out/0001": (len(A), SHARED), "out/0002": (0, SHARED)}


def test_a_run_that_left_nothing(folder: Path, own: Path) -> None:
    shutil.rmtree(own / "store" / "runs" / "run-1")
    found = trace_source(store_of(own), str(folder / "raw" / "a.jsonl"))
    assert found["runs"] == []
    assert exports_of(found) == {"out/0001": (len(A), SHARED), "out/0002": (0, SHARED)}


def test_a_version_that_is_gone(folder: Path, own: Path) -> None:
    """Its exports name the object all the same; which rows others share with it is not known any more."""
    (own / "store" / "corpora" / "corpus" / "versions" / "000000000001.json").unlink()
    found = trace_source(store_of(own), str(folder / "raw" / "a.jsonl"))
    assert found["corpora"] == []
    assert [run["run_id"] for run in found["runs"]] == ["run-1"]
    assert exports_of(found) == {"out/0001": (len(A), 0)}


def test_an_export_that_is_damaged_is_answered_for_by_decisions(folder: Path, own: Path) -> None:
    (file,) = (own / "store" / "exports" / "out" / "0001" / "data").iterdir()
    file.write_bytes(b"PAR1 broken PAR1")
    found = trace_source(store_of(own), str(folder / "raw" / "a.jsonl"))
    assert exports_of(found) == {"out/0001": (len(A), SHARED), "out/0002": (0, SHARED)}
    assert [item["read_from"] for item in found["exports"]] == ["decisions", "data"]
    assert [item["key"] for item in found["unreadable"]] == ["exports/out/0001"]
    assert "could not be read" in found["next"][-1]


@pytest.mark.parametrize("broken", ["corpora/corpus/versions/000000000001.json", "runs/run-1/decisions.parquet"])
def test_what_cannot_be_read_is_said(folder: Path, own: Path, broken: str) -> None:
    (own / "store" / broken).write_bytes(b"{broken")
    found = trace_source(store_of(own), str(folder / "raw" / "a.jsonl"))
    assert broken in [item["key"] for item in found["unreadable"]]
    assert found["exports"][0]["rows"] == len(A)


def test_attributions_that_quote_it(folder: Path, own: Path) -> None:
    store, uri = store_of(own), str(folder / "raw" / "a.jsonl")
    hit = {"doc_id": "d", "score": 0.5, "source_uri": uri, "source_row": 3, "text": "t"}
    store.create_json("attributions/one.json", {"queries": [{"query": "q", "hits": [], "bottom": [hit]}]})
    store.create_json("attributions/two.json", {"queries": [{"query": "q", "hits": [hit | {"source_uri": "x"}]}]})
    assert trace_source(store, uri)["attributions"] == ["one.json"]


def test_what_is_unknown_is_said_with_what_is_near(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*b\.jsonl"):
        trace_source(store_of(folder), str(folder / "raw" / "d.jsonl"))
    with pytest.raises(ConfigError, match="curate status"):
        trace_source(store_of(folder), "s3://other/bucket")


def test_the_steps_leave_nothing(folder: Path, own: Path) -> None:
    store, uri = store_of(own), str(folder / "raw" / "a.jsonl")
    steps = trace_source(store, uri)["next"]
    assert [store.url("exports/out/0001") in step for step in steps] == [True, False, False, False]
    assert f"curate gc {store.uri} --keep 1" in steps[-1]
    shutil.rmtree(own / "store" / "exports" / "out" / "0001")
    collect_garbage(store, keep=1)
    with pytest.raises(ConfigError, match="nothing in"):
        trace_source(store, uri)
    assert [manifest["version"] for manifest in list_exports(store)] == ["0002"]
    assert not any(uri.encode() in store.get(key) for key, _ in store.list("") if key.endswith(".json"))


def test_rejected_rows_of_a_run_that_failed(folder: Path, own: Path) -> None:
    store, uri = store_of(own), "/elsewhere/bad.jsonl"
    table = own / "store" / "quarantine" / "run-9" / "rejected.parquet"
    table.parent.mkdir(parents=True)
    pl.DataFrame({"source_uri": [uri, "/x", uri], "raw": ["a", "b", "c"]}).write_parquet(table)
    found = trace_source(store, uri)
    (held,) = found["quarantines"]
    assert (held["run_id"], held["rows"]) == ("run-9", 2)
    assert any("run-9" in step and "quarantine" in step for step in found["next"])
    assert any("Prefect artifacts" in step for step in found["next"])
    assert "failed before it published" in found["next"][-1]
    with pytest.raises(ConfigError, match="failed before it published"):
        trace_source(store, "/elsewhere/other.jsonl")


def test_exports_whose_manifest_cannot_be_read(folder: Path, own: Path) -> None:
    exports = own / "store" / "exports" / "out"
    (exports / "0001" / "manifest.json").write_bytes(b"{broken")
    (exports / "0003").mkdir()
    (exports / "0003" / "lineage.json").write_bytes(b"{}")
    found = trace_source(store_of(own), str(folder / "raw" / "a.jsonl"))
    assert exports_of(found) == {"out/0002": (0, SHARED)}
    assert [item["key"] for item in found["unreadable"]] == ["exports/out/0001/manifest.json", "exports/out/0003"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["curate", "lineage", *arguments])
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_on_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store, uri = str(folder / "store"), str(folder / "raw" / "a.jsonl")
    assert run(monkeypatch, store, "--source", uri) == 0
    shown = capsys.readouterr().out
    for words in ("in older versions only", "out/0001: 300 of its 645 rows", "5 rows of the same content",
                  "and 295 more", f"{store}/exports/out/0001", "--keep 1"):  # fmt: skip
        assert words in shown
    assert run(monkeypatch, store, "--source", uri, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["kind"] == "source"


def test_its_help_can_be_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    assert "--source" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["run-1", "--source", "x"], ["--source", "/nowhere/x.jsonl"]])
def test_wrong_use(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    assert run(monkeypatch, str(folder / "store"), *arguments) == 2
