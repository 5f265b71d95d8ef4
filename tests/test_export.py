"""Exports: original columns, other tools open them, and nothing half-way is visible."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rise_ops.config import ExportConfig, KeepConfig, SelectionConfig
from rise_ops.errors import StoreError
from rise_ops.export import OWN_COLUMNS, Export, export_rows, list_exports
from rise_ops.selection import decide
from rise_ops.store import Store
from tests.corpora import corpus_of, make_rows
from tests.indexed import Indexed, index_corpus, index_rows, make_target, score_parts

LINEAGE: dict[str, Any] = {
    "identity": ["snapshot", "index"],
    "corpus": {"name": "corpus", "version": 1, "snapshot_id": "s" * 64},
    "model": {"name": "some/model", "fingerprint": "f" * 64},
    "index_id": "1" * 64,
    "weights": {"good": 1.0},
    "aggregate": "mean",
    "keep": {},
}


def _export(indexed: Indexed, *, run_id: str = "run", keep: Mapping[str, Any] | None = None, **config: Any) -> Export:
    parts = score_parts(indexed, {"good": make_target(3)}, run_id=run_id)
    decide(
        indexed.store, indexed.version, run_id=run_id, parts=parts, weights={"good": 1.0}, targets=["good"],
        aggregate="mean", selection=SelectionConfig(keep=KeepConfig(**(keep or {}))), memory=2**30,
    )  # fmt: skip
    return export_rows(
        indexed.store, indexed.version, run_id=run_id, name="out", config=ExportConfig(**config), lineage=LINEAGE,
        memory=2**30,
    )  # fmt: skip


def _data(store: Store, made: Export) -> dict[str, bytes]:
    prefix = f"exports/{made.label}/"
    manifest = store.get_json(f"{prefix}manifest.json")
    return {file["path"]: store.get(prefix + file["path"]) for file in manifest["files"]}


def _table(indexed: Indexed, **options: Any) -> pa.Table:
    made = _export(indexed, format="parquet", **options)
    return pa.concat_tables([pq.read_table(pa.BufferReader(data)) for data in _data(indexed.store, made).values()])


def _lines(indexed: Indexed, **options: Any) -> list[dict[str, Any]]:
    made = _export(indexed, format="jsonl.zst", **options)
    packed = [zstandard.ZstdDecompressor().stream_reader(data).read() for data in _data(indexed.store, made).values()]
    return [json.loads(line) for data in packed for line in data.split(b"\n") if line]


def _local(tmp_path: Path, rows: Sequence[Mapping[str, Any]], name: str = "a.jsonl") -> Indexed:
    return index_rows(Store(str(tmp_path / "store")), tmp_path, {name: rows})


_SHAPES: list[dict[str, Any]] = [
    {"text": "plain", "n": 1, "nested": {"a": [1, None], "b": "x"}},
    {"text": "  not stripped \n", "n": None, "flag": True},
    {"prompt": "Question? ", "generation": " answer\n", "score": 0.1},
    {"instruction": "Say hi", "input": "", "output": " hi ", "n": 2**53},
    {"text": "with prompt", "prompt_text": "with", "tags": ["a", "b"]},
    {"text": 'line\u2028separator \x85 and "quotes" \\ é 🎉'},
]


def _only(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None and name not in OWN_COLUMNS}


def test_original_columns_come_back(store: Store, tmp_path: Path) -> None:
    indexed = index_rows(store, tmp_path, {"a.jsonl": _SHAPES})
    expected = [{name: value for name, value in row.items() if value is not None} for row in _SHAPES]
    table = _table(indexed)
    ordered = sorted(table.to_pylist(), key=lambda row: row["source_row"])
    assert [_only(row) for row in ordered] == expected
    assert table.column_names[-4:] == list(OWN_COLUMNS)
    assert table.schema.field("n").type == pa.int64()
    assert table.schema.field("nested").type == pa.struct([("a", pa.list_(pa.int64())), ("b", pa.string())])
    lines = sorted(_lines(indexed, run_id="lines"), key=lambda row: row["source_row"])
    assert [_only(row) for row in lines] == expected
    uri = str(tmp_path / "a.jsonl")
    places = [(row["source_uri"], row["source_row"]) for row in lines]
    assert places == [(uri, number) for number in range(len(_SHAPES))]
    assert {row["doc_id"] for row in lines} == set(indexed.rows["doc_id"])
    assert all(isinstance(row["value"], float) for row in lines)


def test_types_of_tables_are_restored(tmp_path: Path) -> None:
    time = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=datetime.UTC)
    table = pa.table(
        {
            "text": ["one", "two", "three"],
            "count": pa.array([1, None, 3], pa.int16()),
            "ratio": pa.array([0.1, None, float("nan")], pa.float32()),
            "day": pa.array([time.date(), None, time.date()], pa.date32()),
            "at": pa.array([time, None, time], pa.timestamp("us", tz="UTC")),
            "price": pa.array([Decimal("1.50"), None, Decimal("2.25")], pa.decimal128(10, 2)),
            "blob": pa.array([b"\x00\xff", None, b""], pa.binary()),
            "parts": pa.array([[1, 2], None, []], pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    indexed = index_corpus(Store(str(tmp_path / "store")), corpus_of(tmp_path / "a.parquet"))
    found = _table(indexed).sort_by("source_row").select(table.column_names)
    assert found.schema.remove_metadata() == table.schema
    assert found.to_pydict().__repr__() == table.to_pydict().__repr__()  # NaN is not equal to itself


def test_a_type_that_differs_between_objects_becomes_text(tmp_path: Path) -> None:
    files: dict[str, list[dict[str, Any]]] = {
        "a.jsonl": [{"text": "one", "x": 1}],
        "b.jsonl": [{"text": "two", "x": "1"}],
        "c.jsonl": [{"text": "three", "x": [True]}],
    }
    indexed = index_rows(Store(str(tmp_path / "store")), tmp_path, files)
    found = {row["text"]: row["x"] for row in _table(indexed).to_pylist()}
    assert found == {"one": "1", "two": '"1"', "three": "[true]"}


def test_numbers_that_do_not_fit_become_text(tmp_path: Path) -> None:
    rows = [{"text": "a", "x": 2**64}, {"text": "b", "x": 1}]
    assert {row["text"]: row["x"] for row in _table(_local(tmp_path, rows)).to_pylist()} == {"a": str(2**64), "b": "1"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_columns_that_are_called_like_ours_are_renamed(tmp_path: Path, kind: str) -> None:
    rows = [
        {"text": "one", "value": "mine", "doc_id": 7, "source_row": "x", "original_value": 1.5},
        {"text": "two", "value": "yours", "doc_id": 8, "source_row": "y", "original_value": 2.5},
    ]
    indexed = _local(tmp_path, rows, f"a.{kind}")
    for found in (_table(indexed).to_pylist(), _lines(indexed, run_id="lines")):
        for row, original in zip(sorted(found, key=lambda row: int(row["source_row"])), rows, strict=True):
            assert row["original_original_value"] == original["value"]
            assert row["original_value"] == original["original_value"]
            assert row["original_doc_id"] == original["doc_id"]
            assert row["original_source_row"] == original["source_row"]
            assert len(row["doc_id"]) == 64 and isinstance(row["value"], float) and isinstance(row["source_row"], int)


@pytest.mark.parametrize("kind", ["parquet", "jsonl.zst"])
def test_files_are_bounded_and_the_manifest_is_true(store: Store, tmp_path: Path, kind: str) -> None:
    rows = make_rows(1500, words=40)
    indexed = index_rows(store, tmp_path, {"a.jsonl": rows})
    made = _export(indexed, format=kind, max_file_bytes=2**17)
    assert made.rows == 1500 and made.files > 3 and not made.reused
    (manifest,) = list_exports(store, "out")
    data = _data(store, made)
    for file in manifest["files"]:
        assert file["bytes"] == len(data[file["path"]])
        assert file["sha256"] == hashlib.sha256(data[file["path"]]).hexdigest()
        if kind == "jsonl.zst":
            assert len(zstandard.ZstdDecompressor().stream_reader(data[file["path"]]).read()) <= 2**17
    assert sum(file["rows"] for file in manifest["files"]) == 1500 == manifest["rows"]
    if kind == "parquet":
        frame = store.scan_parquet([f"exports/{made.label}/{path}" for path in data]).collect()
        assert frame["id"].to_list() == [row["id"] for row in rows]


@pytest.mark.parametrize("kind", ["parquet", "jsonl.zst"])
def test_datasets_opens_the_folder(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    indexed = _local(tmp_path, make_rows(300))
    made = _export(indexed, format=kind, keep={"rows": 100}, max_file_bytes=2**16)
    folder = indexed.store.url(f"exports/{made.label}")
    found = datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "cache"))
    assert found.num_rows == 100
    assert set(found.column_names) == {"id", "text", *OWN_COLUMNS}
    if kind == "parquet":
        assert pl.scan_parquet(f"{folder}/data/*.parquet").collect().height == 100


def test_the_same_decisions_are_published_once(tmp_path: Path) -> None:
    indexed = _local(tmp_path, make_rows(50))
    first = _export(indexed, run_id="one", keep={"rows": 10})
    again = _export(indexed, run_id="two", keep={"rows": 10})
    assert (first.version, first.reused) == ("0001", False)
    assert again == Export("out", "0001", 10, 1, first.bytes, reused=True)
    assert _export(indexed, run_id="three", keep={"rows": 10}, format="jsonl.zst").version == "0002"
    assert _export(indexed, run_id="four", keep={"rows": 11}).version == "0003"
    assert [manifest["version"] for manifest in list_exports(indexed.store)] == ["0001", "0002", "0003"]


@pytest.mark.parametrize("failing", ["data/train-00001", "README.md", "manifest.json"])
def test_half_an_export_is_never_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    indexed = _local(tmp_path, make_rows(1500, words=40))
    create = Store.create

    def fail(store: Store, key: str, data: bytes) -> bool:
        if failing in key:
            raise StoreError("no space left")
        return create(store, key, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", fail)
        with pytest.raises(StoreError):
            _export(indexed, max_file_bytes=2**17)
    assert list_exports(indexed.store) == []
    begun = {key: indexed.store.get(key) for key, _ in indexed.store.list("exports/out/0001/data")}
    made = _export(indexed, max_file_bytes=2**17)  # goes on with what the first one began
    assert (made.version, made.reused) == ("0001", False)
    assert [manifest["version"] for manifest in list_exports(indexed.store)] == ["0001"]
    whole = {f"exports/out/0001/{path}": data for path, data in _data(indexed.store, made).items()}
    assert begun.items() <= whole.items()
    assert _export(indexed, max_file_bytes=2**17).reused


def test_an_export_that_another_program_began_is_left_alone(tmp_path: Path) -> None:
    indexed = _local(tmp_path, make_rows(300))
    first = _export(indexed)
    store = indexed.store
    store.delete([f"exports/{first.label}/manifest.json", f"exports/{first.label}/data/train-00000.parquet"])
    store.create(f"exports/{first.label}/data/train-00000.parquet", b"other bytes")
    made = _export(indexed)
    assert (made.version, made.reused) == ("0002", False)
    assert store.get(f"exports/{first.label}/data/train-00000.parquet") == b"other bytes"


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_an_export_that_lost_a_file_is_made_whole(tmp_path: Path, how: str) -> None:
    indexed = _local(tmp_path, make_rows(300))
    made = _export(indexed)
    key = f"exports/{made.label}/data/train-00000.parquet"
    before = indexed.store.get(key)
    indexed.store.delete([key])
    if how == "cut":
        indexed.store.create(key, before[:-9])
    again = _export(indexed)
    assert (again.version, again.reused) == ("0001", False)
    assert indexed.store.get(key) == before
    assert _export(indexed).reused


def test_only_kept_rows_are_exported(tmp_path: Path) -> None:
    indexed = _local(tmp_path, make_rows(400))
    table = _table(indexed, keep={"rows": 37})
    decisions = indexed.store.scan_parquet(["runs/run/decisions.parquet"]).filter("kept").collect()
    assert table.column("doc_id").to_pylist() == decisions["doc_id"].to_list()
    assert table.column("value").to_pylist() == decisions["value"].to_list()
    assert table.column("source_row").to_pylist() == decisions["source_row"].to_list()


def test_the_card_names_what_it_is(tmp_path: Path) -> None:
    indexed = _local(tmp_path, make_rows(5))
    made = _export(indexed)
    card = indexed.store.get(f"exports/{made.label}/README.md").decode()
    assert "path: data/*.parquet" in card and "- n<1K" in card and "| run | run |" in card
