"""Filling an index while blocks are read and written: the same index, and nothing is lost where a step fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rise_ops import index, indexing
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import IntegrityError, StoreError
from rise_ops.index import BlockRecord, index_id, list_indexed
from rise_ops.memory import blocks_at_once, sketch_memory
from rise_ops.model_files import model_fingerprint
from rise_ops.session import block_rows
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, make_rows, write_as
from tests.test_reuse import DIM, FakeSigner, check_index, config, local

__all__ = ["config", "local"]  # fixtures

WAIT = 60


@pytest.fixture
def version(local: Store, config: CurationConfig, tmp_path: Path) -> CorpusVersion:
    return ingest_all(local, corpus_of(write_as(tmp_path / "in" / "a.jsonl", make_rows(120))))


def _fill(store: Store, config: CurationConfig, version: CorpusVersion, signer: FakeSigner, at_once: int,
          seen: list[int] | None = None) -> list[BlockRecord]:  # fmt: skip
    identity = index_id(model_fingerprint(config.model), config.sketch)
    return indexing.sketch_blocks(
        store, identity, list(block_rows(store, version)), dim=DIM, signer=lambda: signer, at_once=at_once,
        progress=lambda done, _: None if seen is None else seen.append(done),
    )  # fmt: skip


@pytest.mark.parametrize("at_once", [1, 2])
def test_blocks_come_in_their_order(local: Store, config: CurationConfig, version: CorpusVersion, at_once: int) -> None:
    signer, seen = FakeSigner(), list[int]()
    records = _fill(local, config, version, signer, at_once, seen)
    rows_of = block_rows(local, version)
    assert [record.block_id for record in records] == list(rows_of)
    assert len(signer.asked) == seen[-1] == 120 and seen == sorted(seen) and len(seen) == len(rows_of)
    check_index(local, config, version)
    again = FakeSigner()
    assert _fill(local, config, version, again, at_once) == records
    assert again.asked == []


def test_a_block_is_written_while_the_next_is_computed(
    local: Store, config: CurationConfig, version: CorpusVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, total = index.write_block, len(block_rows(local, version))
    assert total > 3
    began = [threading.Event() for _ in range(total)]
    computed, written = list[int](), list[int]()

    class Announcing(FakeSigner):
        def encoded_rows(self, encoded: Sequence[Any], **_: object) -> RowSignatures:
            began[len(computed)].set()
            computed.append(len(encoded))
            return self.rows(encoded)

    def write_once_the_next_began(*args: Any, **options: Any) -> BlockRecord:
        written.append(1)
        assert began[min(len(written), total - 1)].wait(WAIT)
        return write(*args, **options)

    monkeypatch.setattr(indexing, "write_block", write_once_the_next_began)
    _fill(local, config, version, Announcing(), 2)
    check_index(local, config, version)


@pytest.mark.parametrize("at_once", [1, 2])
def test_what_a_failed_step_leaves_is_whole(
    local: Store, config: CurationConfig, version: CorpusVersion, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Writing the third block fails: the first two are there, and the next try computes the others."""
    write, written = index.write_block, []

    def failing(store: Store, identity: str, block_id: str, *args: Any, **options: Any) -> BlockRecord:
        written.append((identity, block_id))
        if len(written) == 3:
            raise StoreError("the disk is full")
        return write(store, identity, block_id, *args, **options)

    monkeypatch.setattr(indexing, "write_block", failing)
    with pytest.raises(StoreError, match="disk is full"):
        _fill(local, config, version, FakeSigner(), at_once)
    monkeypatch.setattr(indexing, "write_block", write)
    rows_of = block_rows(local, version)
    there = list_indexed(local, written[0][0], rows_of, dim=DIM)
    assert {block for _, block in written[:2]} <= there
    assert written[2][1] not in there
    signer = FakeSigner()
    _fill(local, config, version, signer, at_once)
    assert len(signer.asked) == sum(rows for block, rows in rows_of.items() if block not in there)
    check_index(local, config, version)


def test_a_damaged_block_stops_the_work_after_what_is_done(
    local: Store, config: CurationConfig, version: CorpusVersion
) -> None:
    third = list(block_rows(local, version))[2]
    local.delete([f"blocks/{third}.parquet"])
    with pytest.raises(IntegrityError, match=f"block {third} is missing"):
        _fill(local, config, version, FakeSigner(), 2)
    check_index(local, config, version, held=list(block_rows(local, version))[:2])


def test_two_blocks_are_held_where_there_is_memory() -> None:
    assert blocks_at_once(2**29, dim=24_576) == 1
    assert blocks_at_once(8 * 2**30, dim=24_576) == 2
    for memory in (2**29, 2**30, 2**31, 2**33):
        plan, rest = sketch_memory(memory, dim=24_576)
        assert plan.bytes <= memory
        assert rest >= memory // 4
