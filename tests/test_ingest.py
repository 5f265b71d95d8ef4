"""Ingesting an object: what it becomes, that this does not depend on where it lies, and that work is done once."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from rise_ops import ingest
from rise_ops.blocks import read_block
from rise_ops.config import CurationConfig, FieldMap, LimitsConfig
from rise_ops.errors import ConfigError, SourceError
from rise_ops.ingest import IngestedObject, ingest_corpus
from rise_ops.objects import places_key, read_record, recall, record_key, remember, rows_key
from rise_ops.sources import SourceObject
from rise_ops.store import Store
from tests.conftest import s3_filesystem
from tests.corpora import corpus_of, ingest_path, jsonl, listed, make_rows, record_frame, rejections, write_as


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _memory(data: bytes, *, name: str = "rows.jsonl") -> str:
    uri = f"memory://{uuid.uuid4().hex}/{name}"
    with fsspec.open(uri, "wb") as file:
        file.write(data)
    return uri


def test_an_object_becomes_blocks_and_a_record(store: Store, tmp_path: Path) -> None:
    rows = make_rows(5000)
    path = write_as(tmp_path / "rows.jsonl", rows)
    made = ingest_path(store, path)
    assert (made.rows, made.rejected, made.small, made.reused) == (5000, 0, False, False)
    frame = record_frame(store, made)
    assert frame["source_row"].to_list() == list(range(5000))
    texts = pl.concat([read_block(store, block) for block in made.blocks])
    assert texts["text"].to_list() == [row["text"] for row in rows]
    assert frame["block_id"].unique(maintain_order=True).to_list() == list(made.blocks)
    record = read_record(store, made.record)
    assert record.fields == {"id": "json", "text": "json"}
    assert [block.block_id for block in record.blocks] == list(made.blocks)
    assert sum(block.rows for block in record.blocks) == 5000
    assert sum(block.characters for block in record.blocks) == made.characters == sum(len(row["text"]) for row in rows)


def test_ids_do_not_depend_on_place_or_format(local: Store, tmp_path: Path) -> None:
    rows = make_rows(3000)
    path = write_as(tmp_path / "rows.jsonl", rows)
    here = ingest_path(local, path)
    assert ingest_path(local, _memory(path.read_bytes())).record == here.record
    for suffix in ("jsonl.gz", "jsonl.zst", "parquet", "feather", "arrow", "csv", "csv.gz"):
        made = ingest_path(local, write_as(tmp_path / f"same.{suffix}", rows))
        assert made.blocks == here.blocks, suffix
        assert made.record != here.record


@pytest.mark.s3
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "parquet", "csv"])
def test_ids_on_s3_are_the_local_ones(s3_bucket: str, tmp_path: Path, suffix: str) -> None:
    path = write_as(tmp_path / f"rows.{suffix}", make_rows(3000))
    uri = f"s3://{s3_bucket}/raw/rows.{suffix}"
    Store(f"s3://{s3_bucket}").create_from_file(f"raw/rows.{suffix}", path)
    there = ingest_path(Store(f"s3://{s3_bucket}/store"), uri)
    here = ingest_path(Store(str(tmp_path / "store")), path)
    assert (there.record, there.blocks, there.rows) == (here.record, here.blocks, 3000)
    assert there.etag is not None


@pytest.mark.s3
def test_a_renamed_or_copied_object_on_s3_is_not_downloaded(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files, store = s3_filesystem(), Store(f"s3://{s3_bucket}/store")
    files.pipe_file(f"{s3_bucket}/raw/a.jsonl", jsonl(make_rows(600)))
    first = ingest_path(store, f"s3://{s3_bucket}/raw/a.jsonl")
    files.cp_file(f"{s3_bucket}/raw/a.jsonl", f"{s3_bucket}/raw/b.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "open_rows", None)
        patch.setattr(ingest, "hash_object", None)
        again = ingest_path(store, f"s3://{s3_bucket}/raw/b.jsonl")
    assert again.reused
    assert (again.record, again.blocks, again.rows) == (first.record, first.blocks, 600)
    deep = ingest_path(store, f"s3://{s3_bucket}/raw/b.jsonl", deep=True)
    assert deep.reused and deep.record == first.record
    mapped = ingest_path(store, f"s3://{s3_bucket}/raw/b.jsonl", fields=FieldMap(text="id"))
    assert not mapped.reused


def test_an_etag_that_is_not_made_of_content_says_nothing(local: Store) -> None:
    for tag in (None, "5f5e100-1a2b", "W/0123456789abcdef0123456789abcdef", "x" * 32):
        seen = SourceObject("s3://bucket/a.jsonl", 1, tag, 1)
        remember(local, seen, "record", "settings")
        assert recall(local, seen, "settings") is None
    elsewhere = SourceObject("https://host/a.jsonl", 1, "0" * 32, 1)
    remember(local, elsewhere, "record", "settings")
    assert recall(local, elsewhere, "settings") is None
    assert list(local.list("")) == []


def test_rejected_rows_are_kept_with_reason(local: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": 2}\n{"text": "\xff"}\n' + b"x" * 2000 + b'\n{"id": "\\ud800"}\n')
    made = ingest_path(local, path)
    assert (made.rows, made.rejected) == (1, 4)
    assert rejections(local, made) == {2: "wrong_type", 3: "not_utf8", 4: "bad_json", 5: "no_text"}
    frame = record_frame(local, made).drop_nulls("reason")
    assert frame["reason"][0] == "line 3 has a number in 'text' where text is expected"
    assert frame["raw"].to_list() == ['{"text": 2}', '{"text": "\\xff"}', "x" * 500, '{"id": "\\ud800"}']
    assert frame["block_id"].null_count() == 4


def test_rejected_table_rows_show_their_columns(local: Store, tmp_path: Path) -> None:
    made = ingest_path(local, write_as(tmp_path / "a.parquet", [{"text": "good", "n": 1}, {"text": " ", "n": 2}]))
    frame = record_frame(local, made).drop_nulls("reason")
    assert frame.select("reason", "raw").rows() == [("row 2 has no text: 'text' is empty", '{"n":2,"text":" "}')]


def test_a_flood_of_faults_stays_complete(local: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes((b"bad\n" * 7 + b'{"text": "good"}\n') * 700)
    made = ingest_path(local, tmp_path / "a.jsonl")
    assert (made.rows, made.rejected) == (700, 4900)
    assert record_frame(local, made)["source_row"].to_list() == list(range(5600))


def test_a_known_object_is_not_read_again(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_as(tmp_path / "rows.jsonl", make_rows(600))
    first = ingest_path(local, path)
    moved = path.rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(ingest, "open_rows", None)
    again = ingest_path(local, moved)
    assert again.reused
    assert (again.record, again.blocks, again.rows) == (first.record, first.blocks, first.rows)


@pytest.mark.parametrize("what", ["block", "rows", "places", "record"])
def test_what_is_missing_is_made_again(local: Store, tmp_path: Path, what: str) -> None:
    first = ingest_path(local, write_as(tmp_path / "rows.jsonl", make_rows(10 if what == "rows" else 600)))
    key = {
        "block": f"blocks/{first.blocks[0] if first.blocks else ''}.parquet",
        "rows": rows_key(first.record),
        "places": places_key(first.record),
        "record": record_key(first.record),
    }[what]
    local.delete([key])
    again = ingest_path(local, tmp_path / "rows.jsonl")
    assert not again.reused
    assert local.exists(key)
    assert again.to_json() == first.to_json()


def test_settings_make_another_record(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "rows.jsonl", [{"text": "a", "body": "b"}] * 3)
    plain = ingest_path(local, path)
    mapped = ingest_path(local, path, fields=FieldMap(text="body"))
    assert plain.object_sha == mapped.object_sha
    assert plain.record != mapped.record


def test_dry_writes_nothing_and_says_the_same(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "rows.jsonl", [*make_rows(700), {"text": 1}])
    dry = ingest_path(local, path, dry=True)
    assert list(local.list("")) == []
    assert ingest_path(local, path).to_json() == dry.to_json()


def test_a_damaged_object_leaves_no_record(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "rows.jsonl.gz", make_rows(5000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="truncated after line"):
        ingest_path(local, path)
    assert list(local.list("objects")) == []


def test_an_object_that_changes_meanwhile_is_refused(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "rows.jsonl", make_rows(10))
    seen = listed(path)
    path.write_bytes(jsonl(make_rows(11)))
    corpus = corpus_of(path)
    for dry in (False, True):
        with pytest.raises(SourceError, match="changed while it was read"):
            ingest.ingest_object(local, seen, corpus=corpus, limits=LimitsConfig(), dry=dry)
    assert list(local.list("objects")) == []


def test_sources_in_the_store_are_refused(local: Store) -> None:
    source = SourceObject(f"{local.uri}/runs/x.jsonl", 1, None, 1)
    with pytest.raises(ConfigError, match="lies in the store"):
        ingest.ingest_object(local, source, corpus=corpus_of(source.uri), limits=LimitsConfig())


def test_row_limit_reaches_every_format(local: Store, tmp_path: Path) -> None:
    limits = LimitsConfig.model_validate({"row_bytes": 300})
    rows = [{"text": "short"}, {"text": "x" * 400}, {"text": "fine"}]
    for suffix in ("jsonl", "parquet", "arrow", "csv"):
        made = ingest_path(local, write_as(tmp_path / f"a.{suffix}", rows), limits=limits)
        assert rejections(local, made) == {1: "too_long"}, suffix


def test_references_survive_json() -> None:
    made = IngestedObject("u", 1, None, 2, "s", "r", 3, 4, ("a", "b"), False, 5)
    assert IngestedObject.from_json(made.to_json()) == made


def test_progress_counts_rows(local: Store, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = write_as(tmp_path / "a.parquet", make_rows(2500))
    ingest_path(local, path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]


def test_the_whole_stage(local: Store, tmp_path: Path) -> None:
    write_as(tmp_path / "raw" / "a.jsonl", make_rows(1500))
    write_as(tmp_path / "raw" / "b.parquet", make_rows(10, seed=1))
    document: dict[str, Any] = {
        "store": local.uri,
        "corpus": {"name": "corpus", "sources": [f"{tmp_path}/raw/*"]},
        "model": {"name": "none"},
    }
    config = CurationConfig.model_validate(document)
    version, objects = ingest_corpus(local, config, run_id="one")
    assert (version.version, version.rows, len(objects)) == (1, 1510, 2)
    assert version.fields == {"id": "json", "text": "json"}
    again, objects = ingest_corpus(local, config, run_id="two")
    assert (again, objects) == (version, ())


@pytest.mark.skipif(not (Path(__file__).parents[2] / "shared").exists(), reason="no example data here")
def test_real_rows_come_in_whole(local: Store) -> None:
    data = Path(__file__).parents[2] / "shared" / "data"
    for pool in sorted(data.glob("*/pool.jsonl")):
        made = ingest_path(local, pool)
        assert (made.rows, made.rejected) == (5000, 0), os.fspath(pool)
