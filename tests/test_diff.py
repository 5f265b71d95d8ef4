"""Differences: what two versions tell apart, checked against the rows themselves."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rise_ops import blocks
from rise_ops.blocks import read_doc_ids
from rise_ops.corpus import CorpusVersion, read_snapshot
from rise_ops.diff import Change, diff_numbers, diff_versions
from rise_ops.errors import ConfigError
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, make_rows, write_as


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _published(store: Store, folder: Path, files: dict[str, list[Any]]) -> CorpusVersion:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in files:
            old.unlink()
    for name, rows in files.items():
        write_as(folder / name, rows)
    return ingest_all(store, corpus_of(folder / "*.jsonl"))


def _rows(store: Store, version: CorpusVersion) -> Counter[str]:
    snapshot = read_snapshot(store, version.snapshot_id)["block_id"].to_list()
    return Counter(doc_id for block in snapshot for doc_id in read_doc_ids(store, block).to_list())


def test_the_first_version_adds_everything(local: Store, tmp_path: Path) -> None:
    version = _published(local, tmp_path / "in", {"a.jsonl": make_rows(600), "b.jsonl": make_rows(3, seed=1)})
    found = diff_versions(local, None, version, memory=2**20)
    assert (found.objects, found.rows, found.moved) == (Change(2, 0, 0, 0), Change(603, 0, 0, 0), 0)
    assert found.rows_new == 603


def test_changes_are_told_apart(local: Store, tmp_path: Path) -> None:
    large, small, other = make_rows(9000), make_rows(20, seed=1), make_rows(700, seed=2)
    files = {"large.jsonl": large, "small.jsonl": small, "other.jsonl": other}
    first = _published(local, tmp_path / "in", files)
    changed = [*large[:4000], {"text": "corrected"}, *large[4001:], {"text": "one more"}]
    second = _published(
        local,
        tmp_path / "in",
        {"large.jsonl": changed, "small.jsonl": [*small[:19], {"text": "also corrected"}], "moved.jsonl": other},
    )
    found = diff_versions(local, first, second, memory=2**20)
    assert found.objects == Change(added=1, changed=2, removed=1, unchanged=0)
    assert found.moved == 1
    assert found.rows == Change(added=1, changed=2, removed=0, unchanged=9000 + 20 + 700 - 2)
    assert found.blocks.changed >= 2 and found.blocks.removed == 0
    back = diff_versions(local, second, first, memory=2**20)
    assert back.rows == Change(added=0, changed=2, removed=1, unchanged=found.rows.unchanged)


def test_rows_that_go_to_another_object_are_unchanged(local: Store, tmp_path: Path) -> None:
    rows = make_rows(2000)
    first = _published(local, tmp_path / "in", {"a.jsonl": rows[:1500], "b.jsonl": rows[1500:]})
    second = _published(local, tmp_path / "in", {"a.jsonl": rows[:1000], "b.jsonl": rows[1000:]})
    found = diff_versions(local, first, second, memory=2**20)
    assert found.rows == Change(0, 0, 0, 2000)
    assert found.objects == Change(0, 2, 0, 0)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_counts_are_those_of_the_rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("diff")
    store = Store(str(folder / "store"))
    pool = make_rows(60)
    states = data.draw(
        st.lists(
            st.dictionaries(
                st.sampled_from(["a.jsonl", "b.jsonl", "c.jsonl"]),
                st.lists(st.sampled_from(pool), min_size=1, max_size=60),
                min_size=1,
            ),
            min_size=2,
            max_size=2,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "MIN_ROWS", 4)
        patch.setattr("rise_ops.objects.MIN_ROWS", 4)
        patch.setattr("rise_ops.packs.MIN_ROWS", 4)
        patch.setattr(blocks, "_MASK", 7)
        old, new = (_published(store, folder / "in", state) for state in states)
        found, cautious = (diff_versions(store, old, new, memory=memory).rows for memory in (2**30, 64))
    before, after = _rows(store, old), _rows(store, new)
    assert found == cautious
    assert found.added + found.changed == (after - before).total()
    assert found.removed + found.changed == (before - after).total()
    assert found.unchanged == (after & before).total()
    assert min(found.added, found.changed, found.removed, found.unchanged) >= 0


def test_versions_by_number(local: Store, tmp_path: Path) -> None:
    for count in (300, 301, 303):
        _published(local, tmp_path / "in", {"a.jsonl": make_rows(count)})
    latest = diff_numbers(local, "corpus", old=None, new=None)
    assert (latest["from"], latest["to"], latest["rows"]["added"]) == (2, 3, 2)
    assert diff_numbers(local, "corpus", old=1, new=3)["rows"]["added"] == 3
    assert diff_numbers(local, "corpus", old=3, new=1)["rows"]["removed"] == 3
    assert diff_numbers(local, "corpus", old=0, new=2)["rows"]["added"] == 301
    with pytest.raises(ConfigError, match="no version 7 of corpus corpus; it has: 1, 2, 3"):
        diff_numbers(local, "corpus", old=7, new=None)
    with pytest.raises(ConfigError, match="no corpus nope; it has: corpus"):
        diff_numbers(local, "nope", old=None, new=None)
