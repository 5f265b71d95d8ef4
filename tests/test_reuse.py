"""Row reuse: what an index holds is copied bit by bit, the rest computed, and damage is never copied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rise_ops import blocks, index, reuse
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, parent_version
from rise_ops.hashing import sha256_hex
from rise_ops.index import IndexListing, index_id, index_key, iter_signatures, read_counts, read_record, tables_key
from rise_ops.index_plan import IndexWork, plan_work
from rise_ops.indexing import sketch_blocks
from rise_ops.model_files import model_fingerprint
from rise_ops.reuse import candidate_blocks, find_rows, read_reuse, write_reuse
from rise_ops.session import block_rows
from rise_ops.signatures import RowSignatures, Signer
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, make_rows, write_as
from tests.curation import load, write_curation

DIM = 16


class FakeSigner(Signer):
    """Signatures that follow from the text; remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    @property
    def trunk(self) -> FakeSigner:  # type: ignore[override]
        return self

    device, dtype = "cpu", "torch.float32"

    def rows(self, texts: Sequence[str], **_: object) -> RowSignatures:
        self.asked += texts
        return signatures_of(texts)

    def encode(self, texts: Sequence[str], **_: object) -> Any:
        return texts

    encoded_rows: Any = rows


def signatures_of(texts: Sequence[str]) -> RowSignatures:
    drawn = [np.random.default_rng(int(sha256_hex(text.encode())[:8], 16)).standard_normal(DIM) for text in texts]
    lengths = np.array([len(text) for text in texts], np.int32)
    return RowSignatures(np.array(drawn, np.float16).reshape(-1, DIM), lengths, np.ones(len(texts), np.int32))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CurationConfig:
    """A configuration whose signatures are 16 long, in small blocks and smaller chunks."""
    monkeypatch.setattr(blocks, "MIN_ROWS", 8)
    monkeypatch.setattr(blocks, "_MASK", 15)
    monkeypatch.setattr("rise_ops.objects.MIN_ROWS", 8)
    monkeypatch.setattr(index, "CHUNK_BYTES", 5 * DIM * 2)
    path = write_curation(tmp_path, sketch={"channels": ["rh"], "dim_r": 4, "dim_h": 4})
    return load(path)


@pytest.fixture
def local(config: CurationConfig) -> Store:
    return Store(config.store)


def fill(store: Store, config: CurationConfig, version: CorpusVersion, run_id: str) -> tuple[IndexWork, FakeSigner]:
    """Index a version; what was to do, and what was computed."""
    signer = FakeSigner()
    work = plan_work(store, config, version, run_id=run_id)
    found = read_reuse(store, set(work.reuse.values()), work.missing)
    sketch_blocks(store, work.index_id, work.missing, dim=DIM, signer=lambda: signer, reuse=found)
    store.create_json(index_key(work.index_id), {"format_version": 1})
    store.create(tables_key(work.index_id), b"{}")
    return work, signer


def check_index(
    store: Store, config: CurationConfig, version: CorpusVersion, held: Sequence[str] | None = None
) -> None:
    """Every row of a version, or of some of its blocks, has the signature that follows from its text."""
    identity = index_id(model_fingerprint(config.model), config.sketch)
    for block in block_rows(store, version) if held is None else held:
        expected = signatures_of(blocks.read_texts(store, block))
        record = read_record(store, identity, block)
        np.testing.assert_array_equal(
            np.concatenate(list(iter_signatures(store, identity, record))), expected.signature
        )
        np.testing.assert_array_equal(read_counts(store, identity, record)[0], expected.tokens)
        assert record.tokens == expected.tokens.sum()


def test_a_changed_row_is_the_only_one_computed(local: Store, config: CurationConfig, tmp_path: Path) -> None:
    rows = make_rows(300)
    path = write_as(tmp_path / "in" / "a.jsonl", rows)
    corpus = corpus_of(path)
    first = ingest_all(local, corpus)
    work, signer = fill(local, config, first, "one")
    assert (work.rows_to_sketch, len(signer.asked), work.reuse) == (300, 300, {})

    rows[150] = {"id": "x", "text": "a corrected row"}
    write_as(path, rows)
    second = ingest_all(local, corpus)
    work, signer = fill(local, config, second, "two")
    assert signer.asked == ["a corrected row"]
    assert work.rows_to_sketch == 1
    assert 1 <= len(work.missing) <= 2
    check_index(local, config, second)
    (changed,) = [read_record(local, work.index_id, block) for block in work.missing][:1]
    assert changed.rows_sketched <= 1


@pytest.mark.parametrize("change", ["insert", "delete", "append", "reverse", "split", "metadata"])
def test_rows_that_only_moved_are_not_computed(
    local: Store, config: CurationConfig, tmp_path: Path, change: str
) -> None:
    rows = make_rows(200)
    path = write_as(tmp_path / "in" / "a.jsonl", rows)
    corpus = corpus_of(tmp_path / "in" / "*.jsonl")
    fill(local, config, ingest_all(local, corpus), "one")
    new = [{"id": "new", "text": "something new"}]
    if change == "split":
        write_as(path, rows[:77])
        write_as(tmp_path / "in" / "b.jsonl", rows[77:])
    else:
        write_as(
            path,
            {
                "insert": [*new, *rows],
                "delete": [*rows[:100], *rows[101:]],
                "append": [*rows, *new],
                "reverse": rows[::-1],
                "metadata": [{**row, "label": "seen"} for row in rows],
            }[change],
        )
    second = ingest_all(local, corpus)
    _, signer = fill(local, config, second, "two")
    assert signer.asked == (["something new"] if change in ("insert", "append") else [])
    check_index(local, config, second)


def test_nothing_is_copied_from_damaged_chunks(local: Store, config: CurationConfig, tmp_path: Path) -> None:
    path = write_as(tmp_path / "in" / "a.jsonl", make_rows(40))
    corpus = corpus_of(path)
    work, _ = fill(local, config, ingest_all(local, corpus), "one")
    for block in work.blocks:
        key = f"indexes/{work.index_id}/blocks/{block}.zarr/signature/c/0/0"
        data = bytearray(local.get(key))
        data[0] ^= 1
        local.delete([key])
        local.create(key, bytes(data))
    write_as(path, [{"text": "first"}, *make_rows(40)])
    second = ingest_all(local, corpus)
    work, _ = fill(local, config, second, "two")
    check_index(local, config, second, work.missing)


def test_only_what_is_lost_of_a_block_is_computed(local: Store, config: CurationConfig, tmp_path: Path) -> None:
    path = write_as(tmp_path / "in" / "a.jsonl", make_rows(40))
    version = ingest_all(local, corpus_of(path))
    work, _ = fill(local, config, version, "one")
    block, rows = max(zip(work.blocks, work.rows, strict=True), key=lambda pair: pair[1])
    assert rows > 5
    local.delete([f"indexes/{work.index_id}/blocks/{block}.zarr/signature/c/1/0"])
    work, signer = fill(local, config, version, "two")
    record = read_record(local, work.index_id, block)
    lost = [row for row in range(rows) if row // record.chunk_rows == 1]
    assert (work.missing, work.rows_to_sketch, len(signer.asked)) == ([block], len(lost), len(lost))
    assert record.rows_sketched == len(lost)
    check_index(local, config, version)


def test_rows_of_another_corpus_are_found(local: Store, config: CurationConfig, tmp_path: Path) -> None:
    rows = make_rows(100)
    fill(local, config, ingest_all(local, corpus_of(write_as(tmp_path / "in" / "a.jsonl", rows))), "one")
    other = corpus_of(write_as(tmp_path / "in" / "b.jsonl", [*rows[50:], {"text": "only here"}]))
    version = ingest_all(local, other.model_copy(update={"name": "other"}))
    _, signer = fill(local, config, version, "two")
    assert signer.asked == ["only here"]


def test_candidates_come_in_the_order_of_their_promise(local: Store, tmp_path: Path) -> None:
    path = write_as(tmp_path / "in" / "a.jsonl", make_rows(600))
    corpus = corpus_of(path)
    first = ingest_all(local, corpus)
    write_as(path, [{"text": "more"}, *make_rows(600)])
    second = ingest_all(local, corpus)
    write_as(path, [{"text": "other"}, *make_rows(600)])
    third = ingest_all(local, corpus)
    lost, now = first.sources[0].blocks[0], third.sources[0].blocks[0]
    assert parent_version(local, third) == second
    recorded = sorted([lost, now, "0" * 64])
    # the parent's own blocks were never indexed: its parent's are the likely ones
    assert candidate_blocks(local, recorded, third.sources[0].blocks, earlier=second) == [lost, "0" * 64, now]
    local.delete(["corpora/corpus/versions/000000000001.json"])
    others = candidate_blocks(local, recorded, third.sources[0].blocks, earlier=second)
    assert others == [*sorted([lost, "0" * 64]), now]


def test_the_search_ends_where_looking_on_costs_more(
    local: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = ingest_all(local, corpus_of(write_as(tmp_path / "in" / "a.jsonl", make_rows(3000))))
    held = list(version.sources[0].blocks)
    wanted = blocks.read_doc_ids(local, held[-1])
    missing = [("new", wanted.head(3))]
    assert sum(found.height for found in find_rows(local, missing, held, memory=2**20)) == 3
    monkeypatch.setattr(reuse, "FREE_LOOKS", 0)
    monkeypatch.setattr(reuse, "LOOKS_PER_ROW", 1)
    monkeypatch.setattr(reuse, "_SMALLEST_BATCH", 1)
    assert list(find_rows(local, missing, held, memory=2**20)) == []


def test_little_memory_gives_the_same_answer(local: Store, tmp_path: Path) -> None:
    version = ingest_all(local, corpus_of(write_as(tmp_path / "in" / "a.jsonl", make_rows(3000))))
    held = list(version.sources[0].blocks)
    missing = [(f"new{number}", blocks.read_doc_ids(local, block).reverse()) for number, block in enumerate(held)]
    frames = [
        pl.concat(find_rows(local, missing, held, memory=memory)).sort("block_id", "block_row")
        for memory in (2**30, reuse.ROW_BYTES)
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].height == 3000
    keys, rows = write_reuse(local, "run", iter(frames[:1]))
    assert rows == 3000
    assert len(keys) == len(held)
    again = read_reuse(local, set(keys.values()), ["new1"])
    assert again["new1"].equals(frames[0].filter(pl.col("block_id") == "new1").drop("block_id"))


def test_a_listing_knows_what_is_recorded(local: Store) -> None:
    for name in ("b", "a"):
        local.create(f"indexes/{'1' * 64}/blocks/{name}.json", b"{}")
    local.create(f"indexes/{'1' * 64}/blocks/c.zarr/zarr.json", b"{}")
    assert IndexListing(local, "1" * 64).recorded == ["a", "b"]
