"""Blocks: cut and named by content, so that an edit touches one or two of them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.blocks import MAX_BYTES, MAX_ROWS, MIN_ROWS, RowBuffer, block_key, ends_block, read_block, write_block
from rise_ops.config import FieldMap
from rise_ops.errors import IntegrityError
from rise_ops.hashing import sha256_hex
from rise_ops.rows import canonical_row
from rise_ops.store import Store
from tests.corpora import make_rows


def _cut(doc_ids: list[str], *, row_size: int = 0) -> list[tuple[str, ...]]:
    blocks: list[tuple[str, ...]] = []
    rows: list[str] = []
    for doc_id in doc_ids:
        rows.append(doc_id)
        if ends_block(doc_id, rows=len(rows), size=len(rows) * row_size, row_size=row_size):
            blocks.append(tuple(rows))
            rows = []
    return [*blocks, tuple(rows)] if rows else blocks


def _ids(count: int) -> list[str]:
    return [sha256_hex(str(place).encode()) for place in range(count)]


def _buffer(count: int) -> RowBuffer:
    buffer = RowBuffer()
    for row in make_rows(count):
        buffer.append(canonical_row(row, fields=FieldMap(), row_bytes=2**20))
    return buffer


def test_sizes() -> None:
    sizes = [len(block) for block in _cut(_ids(300_000))]
    assert min(sizes[:-1]) >= MIN_ROWS
    assert max(sizes) <= MAX_ROWS
    assert 1700 <= sum(sizes) / len(sizes) <= 2300


@given(place=st.integers(0, 20_000), edit=st.sampled_from(["insert", "remove", "change"]))
@settings(max_examples=30, deadline=None)
def test_an_edit_stays_local(place: int, edit: str) -> None:
    before = _ids(20_000)
    middle = [] if edit == "remove" else [sha256_hex(b"new")]
    after = before[:place] + middle + before[place + (edit != "insert") :]
    assert len(set(_cut(after)) - set(_cut(before))) <= 3


@given(place=st.integers(0, 3_000), edit=st.sampled_from(["insert", "remove", "change"]))
@settings(max_examples=30, deadline=None)
def test_an_edit_among_long_rows_stays_local(place: int, edit: str) -> None:
    before = _ids(3_000)
    middle = [] if edit == "remove" else [sha256_hex(b"new")]
    after = before[:place] + middle + before[place + (edit != "insert") :]
    cut = [_cut(ids, row_size=200_000) for ids in (before, after)]
    assert len(set(cut[1]) - set(cut[0])) <= 4
    sizes = [len(block) * 200_000 for block in cut[0]]
    assert max(sizes) < MAX_BYTES + 200_000
    assert 6 * 2**20 < sum(sizes) / len(sizes) < 10 * 2**20


def test_long_rows_end_a_block_early() -> None:
    assert ends_block("f" * 64, rows=3, size=MAX_BYTES)
    assert not ends_block("f" * 64, rows=3, size=MAX_BYTES - 1)


def test_a_block_comes_back(store: Store) -> None:
    buffer = _buffer(300)
    block_id = write_block(store, buffer)
    assert write_block(store, buffer) == block_id
    frame = read_block(store, block_id)
    assert frame.schema == dict.fromkeys(("doc_id", "text", "prompt", "text_field", "meta"), pl.String)
    assert frame["text"].to_list() == buffer.text
    assert frame["meta"].to_list() == buffer.meta
    assert read_block(store, block_id, ["text"]).columns == ["text"]


def test_the_id_covers_order_and_meta() -> None:
    one, two, three = _buffer(3), _buffer(3), _buffer(3)
    two.meta[1] = '{"id":"other"}'
    three.doc_id.reverse()
    three.meta.reverse()
    assert len({one.block_id(), two.block_id(), three.block_id()}) == 3
    assert one.block_id() == _buffer(3).block_id()


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="block abc is missing"):
        read_block(Store(str(tmp_path)), "abc")


def test_a_damaged_block_is_named(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create(block_key("abc"), b"PAR1 and then nothing that helps PAR1")
    with pytest.raises(IntegrityError, match=r"abc\.parquet is damaged"):
        read_block(store, "abc")


def test_a_newer_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))
    block_id = write_block(store, _buffer(3))
    monkeypatch.setattr("rise_ops.blocks.BLOCK_FORMAT", 0)
    with pytest.raises(IntegrityError, match="has format version 1, this program reads up to 0"):
        read_block(store, block_id)
