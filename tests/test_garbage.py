"""Garbage collection: what is reached stays, what is not goes, and a store is never half of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.curate import curate
from rise_ops import garbage
from rise_ops.export import list_exports
from rise_ops.garbage import collect_garbage
from rise_ops.index import list_indexed
from rise_ops.runs import list_runs
from rise_ops.session import block_rows, open_corpus
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.corpora import corpus_of, ingest_all, make_rows, write_as
from tests.curation import ROWS, load, write_curation, write_lines

pytestmark = pytest.mark.usefixtures("prefect_harness")

ORPHANS = (
    f"blocks/{'0' * 64}.parquet",
    f"objects/{'0' * 64}.parquet",
    f"objects/{'0' * 64}.json",
    f"objects/seen/{'1' * 64}/{'0' * 64}",
    f"snapshots/{'0' * 64}.parquet",
    f"indexes/{'0' * 64}/tables.zarr/zarr.json",
    f"indexes/{'0' * 64}/blocks/{'0' * 64}.zarr/signature/c/0/0",
    f"targets/{'0' * 64}.zarr/zarr.json",
    f"targets/{'0' * 64}.json",
    f"scores/{'0' * 64}/{'0' * 64}.parquet",
    "runs/20260101T000000-tiny-dead/reuse-1.parquet",
    "quarantine/20260101T000000-tiny-dead/rejected.parquet",
    "exports/tiny/0002/data/train-00000.parquet",
    "exports/tiny/0002/lineage.json",
    "exports/tiny/0001/data/stray.parquet",
    ".probe/left",
)


def test_a_store_without_garbage_stays_as_it_is(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path))
    curate(config)
    curate(config)
    store = Store(config.store)
    before = sorted(store.list(""))
    found = collect_garbage(store)
    assert (found["objects"], found["removed"], found["kept"]) == (0, {}, {"tiny": [1]})
    assert sorted(store.list("")) == before


def test_orphans_go_and_nothing_else(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path))
    curate(config)
    store = Store(config.store)
    before = sorted(store.list(""))
    for key in (*ORPHANS, "notes/from-a-person.txt", "attributions/answer.json"):
        store.create(key, b"{}")
    dry = collect_garbage(store, dry_run=True)
    assert dry["keys"] == sorted(ORPHANS)
    assert {key for key, _ in store.list("")} >= set(ORPHANS)
    found = collect_garbage(store)
    assert (found["keys"], found["bytes"]) == (dry["keys"], 2 * len(ORPHANS))
    left = sorted(store.list(""))
    assert left == sorted([*before, ("attributions/answer.json", 2), ("notes/from-a-person.txt", 2)])
    assert verify_store(store, deep=True)["broken"] == []
    assert not (Path(config.store) / "runs" / "20260101T000000-tiny-dead").exists()


def test_old_versions_go_when_asked_but_not_those_of_exports(tmp_path: Path) -> None:
    path = write_curation(tmp_path)
    config = load(path)
    exported = curate(config)
    for number in range(2):
        write_lines(tmp_path / "raw" / f"more-{number}.jsonl", [{"text": f"a new row, the {number}."}])
        curate(config, "index")
    store = Store(config.store)
    found = collect_garbage(store, keep=1)
    assert found["kept"] == {"tiny": [1, 3]}
    assert found["needed"] == {"version 1 of tiny": ["export tiny/0001"]}
    assert [run_id for run_id in list_runs(store) if run_id == exported["run_id"]]
    assert len(list_runs(store)) == 2
    assert list_exports(store)[0]["run_id"] == exported["run_id"]
    version = open_corpus(store, config)
    assert version.rows == ROWS + 2
    rows_of = block_rows(store, version)
    assert list_indexed(store, exported["index_id"], rows_of, dim=config.sketch.dim) == set(rows_of)
    assert verify_store(store, deep=True)["broken"] == []
    again = curate(config)
    assert (again["rows_sketched"], again["rows"]) == (0, ROWS + 2)


def test_removed_rows_stay_readable_until_their_version_goes(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    path = write_as(tmp_path / "in" / "a.jsonl", make_rows(600))
    corpus = corpus_of(path)
    first = ingest_all(store, corpus)
    write_as(path, make_rows(600)[300:])
    ingest_all(store, corpus)
    assert collect_garbage(store)["objects"] == 0
    assert all(store.exists(f"blocks/{block}.parquet") for block in first.sources[0].blocks)
    found = collect_garbage(store, keep=1)
    assert found["kept"] == {"corpus": [2]}
    assert not any(store.exists(f"blocks/{block}.parquet") for block in first.sources[0].blocks)
    assert verify_store(store, deep=True)["broken"] == []


@pytest.mark.parametrize("after", range(5))
def test_a_collector_that_is_stopped_leaves_a_sound_store(
    tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(write_curation(tmp_path))
    curate(config, "ingest")
    write_lines(tmp_path / "raw" / "more.jsonl", [{"text": "a new row"}])
    curate(config, "ingest")
    store = Store(config.store)
    deleted: list[str] = []

    class Stopped(Exception):
        pass

    def delete(self: Store, keys: list[str]) -> None:
        for key in keys:
            if not key.startswith("alive/"):
                if len(deleted) == after:
                    raise Stopped
                deleted.append(key)
            (Path(self.uri) / key).unlink()

    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", delete)
        patch.setattr(garbage, "_AT_ONCE", 1)
        with pytest.raises(Stopped):
            collect_garbage(store, keep=1)
    assert verify_store(store, deep=True)["broken"] == []
    collect_garbage(store, keep=1)
    assert verify_store(store, deep=True)["broken"] == []
    assert curate(config, "ingest")["stages"]["ingest"]["cached"]


def test_folders_that_are_no_store_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    (tmp_path / "draft#1").write_text("mine")
    collect_garbage(Store(str(tmp_path)))
    assert (tmp_path / "empty" / "folder").is_dir() and (tmp_path / "draft#1").exists()


def test_what_killed_writers_leave_beside_their_objects_goes(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    ingest_all(store, corpus_of(write_as(tmp_path / "in" / "a.jsonl", make_rows(300))))
    litter = tmp_path / "store" / "blocks" / f"{'0' * 64}.parquet#3"
    litter.write_bytes(b"half")
    assert collect_garbage(store)["objects"] == 0
    assert not litter.exists()
