"""Corpus versions: what is published when, what changed since, and where rows came from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pytest

from rise_ops.blocks import read_block
from rise_ops.config import FieldMap, LimitsConfig
from rise_ops.corpus import (
    CorpusVersion,
    current_version,
    diff_sources,
    latest_readable,
    list_incomplete,
    list_sources,
    placements,
    read_rows,
    read_snapshot,
    read_source_row,
    read_version,
    version_key,
    write_snapshot,
)
from rise_ops.errors import BadRowsError, ConflictError, IntegrityError, SourceError
from rise_ops.hashing import fingerprint
from rise_ops.ingest import publish
from rise_ops.objects import read_record
from rise_ops.rows import ingest_fingerprint
from rise_ops.store import Store
from tests.corpora import NO_LIMITS, corpus_of, ingest_all, ingest_path, jsonl, make_rows, write_as


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _texts(store: Store, version: CorpusVersion) -> dict[tuple[str, int], str]:
    """Text by file name and source row, through blocks and placements."""
    blocks = sorted({block for entry in version.sources for block in entry.blocks})
    texts = {block: read_block(store, block, ["text"])["text"].to_list() for block in blocks}
    return {
        (Path(uri).name, source_row): texts[block][row]
        for block, row, uri, source_row in placements(store, version, blocks).iter_rows()
    }


def test_every_row_is_found_where_it_came_from(store: Store, tmp_path: Path) -> None:
    large, small = make_rows(3000), make_rows(30, seed=1)
    write_as(tmp_path / "large.jsonl", large)
    write_as(tmp_path / "copy.jsonl", large)
    write_as(tmp_path / "small.parquet", small)
    version = ingest_all(store, corpus_of(tmp_path / "*.*"))
    expected = {(name, place): row["text"] for name in ("large.jsonl", "copy.jsonl") for place, row in enumerate(large)}
    expected |= {("small.parquet", place): row["text"] for place, row in enumerate(small)}
    assert _texts(store, version) == expected
    snapshot = read_snapshot(store, version.snapshot_id)
    assert snapshot["rows"].sum() == version.rows == 6030
    assert snapshot["characters"].sum() == sum(map(len, expected.values()))
    assert snapshot["block_id"].is_sorted()
    assert version.snapshot_id == fingerprint(snapshot["block_id"].to_list())


def test_versions_are_as_written_down(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.jsonl", make_rows(300))
    version = ingest_all(local, corpus_of(path), run_id="run-7")
    document = json.loads(local.get("corpora/corpus/versions/000000000001.json"))
    assert document["format_version"] == 1
    assert (document["corpus"], document["version"], document["parent"]) == ("corpus", 1, None)
    assert (document["run_id"], document["rows"], document["rejected"]) == ("run-7", 300, 0)
    (entry,) = document["sources"]
    assert entry["uri"] == str(path)
    assert entry["mtime"] == os.stat(path).st_mtime_ns
    assert set(entry) == {
        "uri", "size", "etag", "mtime", "object_sha", "record", "pack", "rows", "rejected", "blocks"
    }  # fmt: skip
    assert read_version(local, "corpus", 1) == current_version(local, "corpus") == version
    assert current_version(local, "other") is None


def test_a_newer_version_is_refused(local: Store) -> None:
    local.create_json(version_key("corpus", 1), {"format_version": 99})
    with pytest.raises(IntegrityError, match="format version 99"):
        current_version(local, "corpus")


def test_nothing_new_publishes_nothing(local: Store, tmp_path: Path) -> None:
    write_as(tmp_path / "a.jsonl", make_rows(300))
    corpus = corpus_of(tmp_path / "*.jsonl")
    first = ingest_all(local, corpus)
    before = sorted(local.list(""))
    assert ingest_all(local, corpus, run_id="again") == first
    assert sorted(local.list("")) == before


def test_changes_make_versions_and_share_blocks(local: Store, tmp_path: Path) -> None:
    rows = make_rows(20_000)
    path = write_as(tmp_path / "a.jsonl", rows)
    corpus = corpus_of(tmp_path / "*.jsonl")
    first = ingest_all(local, corpus)
    write_as(path, [{"text": "inserted at the top"}, *rows])
    second = ingest_all(local, corpus)
    assert len(set(second.sources[0].blocks) - set(first.sources[0].blocks)) <= 2
    write_as(path, [*rows[:10_000], {"text": "changed"}, *rows[10_001:]])
    third = ingest_all(local, corpus)
    assert len(set(third.sources[0].blocks) - set(first.sources[0].blocks)) <= 2
    assert [version.parent for version in (first, second, third)] == [None, 1, 2]
    write_as(path, rows)
    assert ingest_all(local, corpus).snapshot_id == first.snapshot_id


def test_renamed_copied_and_removed_objects(local: Store, tmp_path: Path) -> None:
    write_as(tmp_path / "a.jsonl", make_rows(600))
    write_as(tmp_path / "b.jsonl", make_rows(700, seed=1))
    corpus = corpus_of(tmp_path / "*.jsonl")
    first = ingest_all(local, corpus)
    content = {key for key, _ in local.list("") if key.startswith(("blocks", "objects"))}
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    renamed = ingest_all(local, corpus)
    assert renamed.snapshot_id == first.snapshot_id
    assert [Path(entry.uri).name for entry in renamed.sources] == ["b.jsonl", "c.jsonl"]
    (tmp_path / "d.jsonl").write_bytes((tmp_path / "c.jsonl").read_bytes())
    copied = ingest_all(local, corpus)
    assert copied.rows == 1900
    assert read_snapshot(local, copied.snapshot_id)["rows"].sum() == 1900
    assert {key for key, _ in local.list("") if key.startswith(("blocks", "objects"))} == content
    (tmp_path / "b.jsonl").unlink()
    removed = ingest_all(local, corpus)
    assert (removed.version, removed.rows) == (4, 1200)


def test_diffs(local: Store, tmp_path: Path) -> None:
    for name in "abc":
        write_as(tmp_path / f"{name}.jsonl", make_rows(3, seed=ord(name)))
    corpus = corpus_of(tmp_path / "*.jsonl")
    settings = ingest_fingerprint(corpus.fields, NO_LIMITS)
    empty = diff_sources(list_sources(corpus), None, settings)
    assert (len(empty.added), empty.changed, empty.removed, empty.unchanged) == (3, (), (), ())
    version = ingest_all(local, corpus)
    (tmp_path / "a.jsonl").unlink()
    write_as(tmp_path / "b.jsonl", make_rows(4))
    write_as(tmp_path / "d.jsonl", make_rows(1))
    diff = diff_sources(list_sources(corpus), version, settings)
    groups = (diff.added, diff.changed, diff.removed, diff.unchanged)
    names = [[Path(item.uri).stem for item in group] for group in groups]
    assert names == [["d"], ["b"], ["a"], ["c"]]
    other = diff_sources(list_sources(corpus), version, "other settings")
    assert [len(group) for group in (other.added, other.changed, other.unchanged)] == [1, 2, 0]


def test_columns_of_all_objects(local: Store, tmp_path: Path) -> None:
    write_as(tmp_path / "a.parquet", [{"text": "a", "n": 1, "only": 1.5}])
    write_as(tmp_path / "b.jsonl", [{"text": "b", "n": 2}])
    version = ingest_all(local, corpus_of(tmp_path / "*.*"))
    assert version.fields == {"n": "json", "only": "double", "text": "json"}
    (tmp_path / "b.jsonl").unlink()
    assert ingest_all(local, corpus_of(tmp_path / "*.*")).fields["n"] == "int64"


@pytest.mark.parametrize("limit", [0.02, 0.0, 1, 3])
def test_too_many_bad_rows(store: Store, tmp_path: Path, limit: float) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_rows(96)) + b"bad\nworse\n" + b'{"text": 5}\n{"text": ""}\n')
    with pytest.raises(BadRowsError) as caught:
        ingest_all(store, corpus_of(tmp_path / "*.jsonl"), limits=LimitsConfig(bad_rows=limit))
    message = str(caught.value)
    assert message.startswith(f"4 of 100 rows rejected (4 %), limits.bad_rows is {'%g' % (limit * 100)} %" if limit < 1
                              else f"4 of 100 rows rejected (4 %), limits.bad_rows is {limit:.0f} rows")  # fmt: skip
    assert "2 bad_json, 1 " in message
    assert f"{tmp_path}/a.jsonl line 97 is not valid JSON: Expecting value at column 1" in message
    assert store.url("quarantine/run/rejected.parquet") in message
    frame = store.scan_parquet(["quarantine/run/rejected.parquet"]).collect()
    assert frame.columns == ["source_uri", "source_row", "reason", "raw", "error"]
    assert frame["source_row"].to_list() == [96, 97, 98, 99]
    assert current_version(store, "corpus") is None


@pytest.mark.parametrize("limit", [0.04, 4])
def test_few_enough_bad_rows(local: Store, tmp_path: Path, limit: float) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_rows(96)) + b"bad\n" * 4)
    version = ingest_all(local, corpus_of(tmp_path / "*.jsonl"), limits=LimitsConfig(bad_rows=limit))
    assert (version.rows, version.rejected) == (96, 4)
    assert local.scan_parquet(["quarantine/run/rejected.parquet"]).collect().height == 4


def test_a_tightened_limit_holds_for_old_rows(local: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_rows(96)) + b"bad\n" * 4)
    corpus = corpus_of(tmp_path / "*.jsonl")
    ingest_all(local, corpus)
    with pytest.raises(BadRowsError):
        ingest_all(local, corpus, run_id="second", limits=LimitsConfig(bad_rows=0.01))
    assert local.exists("quarantine/second/rejected.parquet")


def test_a_corpus_without_rows_is_refused(local: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(SourceError, match="corpus corpus has no rows: 1 objects, 0 rejected rows"):
        ingest_all(local, corpus_of(tmp_path / "*.jsonl"))


def test_the_loser_of_a_race_takes_the_next_number(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ingest_path(store, write_as(tmp_path / "a.jsonl", make_rows(300)))
    two = ingest_path(store, write_as(tmp_path / "b.jsonl", make_rows(300, seed=1)))
    corpus = corpus_of(tmp_path / "*.jsonl")

    def overtaken(*arguments: Any) -> str:
        with monkeypatch.context() as undisturbed:
            undisturbed.setattr("rise_ops.publish.write_snapshot", write_snapshot)
            publish(store, corpus=corpus, objects=[one], unchanged=[], run_id="winner", limits=NO_LIMITS)
        return write_snapshot(*arguments)

    monkeypatch.setattr("rise_ops.publish.write_snapshot", overtaken)
    published = publish(store, corpus=corpus, objects=[one, two], unchanged=[], run_id="loser", limits=NO_LIMITS)
    assert (published.version, published.parent, published.rows) == (2, 1, 600)
    assert read_version(store, "corpus", 1).run_id == "winner"


def test_equal_publications_are_one(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ingest_path(local, write_as(tmp_path / "a.jsonl", make_rows(300)))
    corpus = corpus_of(tmp_path / "*.jsonl")
    winner = publish(local, corpus=corpus, objects=[one], unchanged=[], run_id="winner", limits=NO_LIMITS)
    seen = iter([(None, 0)])
    monkeypatch.setattr("rise_ops.publish.latest_readable", lambda *_: next(seen, (winner, 1)))
    assert publish(local, corpus=corpus, objects=[one], unchanged=[], run_id="loser", limits=NO_LIMITS) == winner


def test_a_damaged_version_is_followed_by_a_new_number(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.jsonl", make_rows(300))
    corpus = corpus_of(path)
    first = ingest_all(local, corpus)
    local.create("corpora/corpus/versions/000000000002.json", b"{cut off")
    with pytest.raises(IntegrityError, match="000000000002"):
        current_version(local, "corpus")  # the older one must not pass for the current one
    assert latest_readable(local, "corpus") == (first, 2)
    third = publish(local, corpus=corpus, objects=[], unchanged=first.sources, run_id="run", limits=NO_LIMITS)
    assert (third.version, third.parent, third.snapshot_id) == (3, 1, first.snapshot_id)
    assert current_version(local, "corpus") == third


def test_a_snapshot_that_is_gone_is_written_again(local: Store, tmp_path: Path) -> None:
    corpus = corpus_of(write_as(tmp_path / "a.jsonl", make_rows(300)))
    first = ingest_all(local, corpus)
    before = read_snapshot(local, first.snapshot_id)
    local.delete([f"snapshots/{first.snapshot_id}.parquet"])
    assert list_incomplete(local, first) == {first.sources[0].uri}
    assert publish(local, corpus=corpus, objects=[], unchanged=first.sources, run_id="run", limits=NO_LIMITS) == first
    assert read_snapshot(local, first.snapshot_id).equals(before)


def test_endless_conflict_is_named(local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ingest_path(local, write_as(tmp_path / "a.jsonl", make_rows(300)))
    local.create_json(version_key("corpus", 1), {"format_version": 1})
    monkeypatch.setattr("rise_ops.publish.latest_readable", lambda *_: (None, 0))
    with pytest.raises(ConflictError, match="published 5 versions"):
        publish(local, corpus=corpus_of(tmp_path / "*"), objects=[one], unchanged=[], run_id="loser", limits=NO_LIMITS)


def test_placements_read_only_what_is_asked(local: Store, tmp_path: Path) -> None:
    write_as(tmp_path / "a.jsonl", make_rows(300))
    write_as(tmp_path / "b.jsonl", make_rows(300, seed=1))
    version = ingest_all(local, corpus_of(tmp_path / "*.jsonl"))
    first, second = version.sources
    local.delete([f"objects/{second.record}.parquet"])
    found = placements(local, version, first.blocks)
    assert found["source_row"].to_list() == list(range(300))
    assert dict(found.schema) == {
        "block_id": pl.String, "block_row": pl.UInt32, "source_uri": pl.String, "source_row": pl.Int64
    }  # fmt: skip
    assert placements(local, version, []).is_empty()
    with pytest.raises(IntegrityError, match="missing or damaged"):
        placements(local, version, second.blocks)
    with pytest.raises(IntegrityError, match="block nosuch is not in corpus corpus version 1"):
        placements(local, version, ["nosuch"])


def test_repeated_blocks_within_an_object(local: Store, tmp_path: Path) -> None:
    twice = jsonl([{"text": "always the same"}] * 8192)
    (tmp_path / "a.jsonl").write_bytes(twice)
    version = ingest_all(local, corpus_of(tmp_path / "*.jsonl"))
    found = placements(local, version, version.sources[0].blocks)
    assert sorted(found["source_row"].to_list()) == list(range(8192))
    assert read_snapshot(local, version.snapshot_id)["rows"].sum() == 8192


def test_query_files(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"text": "a b", "prompt_text": "a"}\n\n{"text": "c"}\n')
    rows = read_rows(str(tmp_path / "*.jsonl"), FieldMap(), LimitsConfig())
    assert [(row.text, row.prompt, row.meta) for row in rows] == [("a b", "a", {"prompt_text": "a"}), ("c", None, {})]
    (tmp_path / "q.jsonl").write_bytes(b'{"text": "a b"}\n\n{"tex": "c"}\n')
    with pytest.raises(SourceError, match=r"q\.jsonl: line 3 has no text"):
        read_rows(str(tmp_path / "q.jsonl"), FieldMap(), LimitsConfig())
    (tmp_path / "q.jsonl").write_bytes(b"")
    with pytest.raises(SourceError, match="has no rows"):
        read_rows(str(tmp_path / "q.jsonl"), FieldMap(), LimitsConfig())


def test_source_rows_again(local: Store, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text":  "one"}\r\nbad \xff line\n{"text": "two"}\n')
    write_as(tmp_path / "b.parquet", [{"text": "x", "n": 1}, {"text": "y", "n": 2}])
    (tmp_path / "c.csv").write_bytes(b'text,n\n"a\nb",1\nc,2\n')
    version = ingest_all(local, corpus_of(tmp_path / "*.*"))
    lines, table, csv = version.sources
    assert read_source_row(lines, 1) == '{"text":  "one"}'
    assert read_source_row(lines, 2) == "bad \\xff line"
    assert read_source_row(table, 1) == '{"n":2,"text":"y"}'
    assert read_source_row(csv, 0) == '"a\nb",1'
    assert read_source_row(csv, 1) == "c,2"
    with pytest.raises(SourceError, match="has no row 99"):
        read_source_row(lines, 99)
    os.utime(tmp_path / "a.jsonl")
    assert read_source_row(lines, 3) == '{"text": "two"}'
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text":  "ONE"}\r\nbad \xff line\n{"text": "two"}\n')
    with pytest.raises(SourceError, match="not what it was"):
        read_source_row(lines, 1)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SourceError, match="does not exist"):
        read_source_row(lines, 1)


def test_memory_sources_are_a_corpus(local: Store) -> None:
    with fsspec.open("memory://corpus-test/a.jsonl.gz", "wb", compression="gzip") as file:
        file.write(jsonl(make_rows(300)))
    corpus = corpus_of("memory://corpus-test/**/*.gz")
    version = ingest_all(local, corpus)
    assert version.rows == 300
    assert ingest_all(local, corpus) == version
    assert read_record(local, version.sources[0].record).rows == 300


@pytest.mark.s3
def test_a_corpus_on_s3_is_the_local_one(s3_bucket: str, tmp_path: Path) -> None:
    bucket = Store(f"s3://{s3_bucket}")
    for name, rows in (("a.jsonl", make_rows(3000)), ("deep/b.parquet", make_rows(50, seed=1))):
        bucket.create_from_file(f"raw/{name}", write_as(tmp_path / "raw" / name, rows))
    there_corpus = corpus_of(f"s3://{s3_bucket}/raw/**/*.*")
    there = ingest_all(Store(f"s3://{s3_bucket}/store"), there_corpus)
    here = ingest_all(Store(str(tmp_path / "store")), corpus_of(tmp_path / "raw" / "**" / "*.*"))
    assert there.snapshot_id == here.snapshot_id
    assert [entry.record for entry in there.sources] == [entry.record for entry in here.sources]
    diff = diff_sources(list_sources(there_corpus), there, there.ingest_fingerprint)
    assert (len(diff.unchanged), diff.added, diff.changed) == (2, (), ())
    assert read_source_row(there.sources[0], 7) == read_source_row(here.sources[0], 7)
