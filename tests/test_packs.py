"""Packs: small objects share blocks, whatever their order, and a change stays local."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from rise_ops.blocks import MAX_ROWS, read_block
from rise_ops.corpus import placements
from rise_ops.hashing import sha256_hex
from rise_ops.objects import ObjectRecord
from rise_ops.packs import plan_packs
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, jsonl, make_rows


def _records(count: int, *, most: int, seed: int = 0) -> list[ObjectRecord]:
    generator = random.Random(seed)
    return [_record(f"{seed}-{place}", generator.randint(1, most)) for place in range(count)]


def _record(name: str, rows: int) -> ObjectRecord:
    sha = sha256_hex(name.encode())
    return ObjectRecord(sha, sha, rows, 0, 10 * rows, 100 * rows, (), {}, small=True)


def _names(records: list[ObjectRecord]) -> set[tuple[str, ...]]:
    return {tuple(member.record for member in pack) for pack in plan_packs(records)}


@pytest.mark.parametrize("most", [1, 20, 255])
def test_packs_are_filled_and_bounded(most: int) -> None:
    records = _records(100_000 // most, most=most)
    sizes = [sum(member.rows for member in pack) for pack in plan_packs(records)]
    assert sum(sizes) == sum(record.rows for record in records)
    assert max(sizes) <= MAX_ROWS
    assert sum(sizes) / len(sizes) > 1000


def test_order_and_copies_do_not_matter() -> None:
    records = _records(500, most=100)
    assert _names(records[::-1] + records[:50]) == _names(records)


@pytest.mark.parametrize("most", [1, 20, 255])
def test_one_changed_object_repacks_few(most: int) -> None:
    records = _records(60_000 // most, most=most)
    before = _names(records)
    touched = []
    for place in range(0, len(records), len(records) // 8):
        changed = [*records[:place], _record(f"new {place}", records[place].rows), *records[place + 1 :]]
        touched.append(len(_names(changed) - before))
    assert sum(touched) / len(touched) <= 4


def test_content_bounds_a_pack() -> None:
    heavy = [dataclasses.replace(record, size=40 * 2**20) for record in _records(10, most=5)]
    assert all(len(pack) == 1 for pack in plan_packs(heavy))


def test_large_and_empty_objects_are_left_out() -> None:
    large = dataclasses.replace(_record("large", 10), small=False)
    assert plan_packs([large, _record("empty", 0)]) == []


def test_rows_of_packed_objects_are_found_again(store: Store, tmp_path: Path) -> None:
    rows = make_rows(50)
    for place in range(10):
        (tmp_path / f"{place}.jsonl").write_bytes(b"\n" * place + jsonl(rows[5 * place : 5 * place + 5]))
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "3.jsonl").read_bytes())
    version = ingest_all(store, corpus_of(tmp_path / "*.jsonl"))
    (block,) = {block for entry in version.sources for block in entry.blocks}
    assert version.rows == 55
    assert len(version.sources) == 11
    texts = read_block(store, block)["text"].to_list()
    assert len(texts) == 50
    found = {
        (Path(uri).name, source_row): texts[block_row]
        for _, block_row, uri, source_row in placements(store, version, [block]).iter_rows()
    }
    expected = {
        (f"{place}.jsonl", place + number): rows[5 * place + number]["text"]
        for place in range(10)
        for number in range(5)
    }
    expected |= {("copy.jsonl", 3 + number): rows[15 + number]["text"] for number in range(5)}
    assert found == expected


def test_packing_again_writes_nothing(tmp_path: Path) -> None:
    for place in range(4):
        (tmp_path / f"{place}.jsonl").write_bytes(jsonl(make_rows(20, seed=place)))
    store = Store(str(tmp_path / "store"))
    first = ingest_all(store, corpus_of(tmp_path / "*.jsonl"))
    before = sorted(store.list("blocks"))
    (tmp_path / "0.jsonl").rename(tmp_path / "9.jsonl")
    second = ingest_all(store, corpus_of(tmp_path / "*.jsonl"))
    assert sorted(store.list("blocks")) == before
    assert (second.version, second.snapshot_id) == (2, first.snapshot_id)
