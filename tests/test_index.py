"""The index: what is written is read, what is damaged is noticed, and whoever writes, it is consistent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import google_crc32c
import numpy as np
import pytest
import zarr

from rise_ops import index
from rise_ops.checksums import crc32c
from rise_ops.config import ModelConfig
from rise_ops.damage import damage_of, heal, note_damage
from rise_ops.errors import DamagedError, IntegrityError, ModelError
from rise_ops.index import (
    BlockRecord,
    iter_signatures,
    list_indexed,
    map_chunk,
    read_counts,
    read_index,
    read_record,
    read_records,
    write_block,
)
from rise_ops.signatures import RowSignatures
from rise_ops.status import store_status
from rise_ops.store import Store
from tests.indexed import DIM, INDEX, signed, unit

BLOCK = "b" * 64
GROUP = f"indexes/{INDEX}/blocks/{BLOCK}.zarr"
RECORD = f"indexes/{INDEX}/blocks/{BLOCK}.json"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows a chunk at most."""
    monkeypatch.setattr(index, "CHUNK_BYTES", 10 * DIM * 2)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _write(store: Store, signatures: RowSignatures) -> BlockRecord:
    return write_block(store, INDEX, BLOCK, signatures, seconds=1.5, producer={"device": "cpu"})


def _read(store: Store, record: BlockRecord | None = None) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    found = record or read_record(store, INDEX, BLOCK)
    return np.concatenate(list(iter_signatures(store, INDEX, found)))


def _counts(store: Store, record: BlockRecord) -> object:
    return read_counts(store, INDEX, record)


def _listed(store: Store, rows: int) -> bool:
    return list_indexed(store, INDEX, {BLOCK: rows}, dim=DIM) == {BLOCK}


def _replace(store: Store, key: str, data: bytes) -> None:
    store.delete([key])
    store.create(key, data)


@pytest.mark.usefixtures("small_chunks")
def test_round_trip(store: Store) -> None:
    written = signed(37, silent=[3])
    record = _write(store, written)
    assert (record.rows, record.dim, record.seconds) == (37, DIM, 1.5)
    assert record.tokens == written.tokens.sum()
    assert read_records(store, INDEX, [BLOCK]) == {BLOCK: record}
    np.testing.assert_array_equal(_read(store, record), written.signature)
    tokens, chunks = read_counts(store, INDEX, record)
    np.testing.assert_array_equal(tokens, written.tokens)
    np.testing.assert_array_equal(chunks, written.chunks)
    assert _listed(store, 37)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_are_mapped_and_checked(local: Store) -> None:
    written = signed(37)
    record = _write(local, written)
    for chunk in range(4):
        rows, check = map_chunk(local, INDEX, record, chunk)
        np.testing.assert_array_equal(rows, written.signature[chunk * record.chunk_rows :][: record.chunk_rows])
        check(crc32c(rows.data.cast("B")))
        with pytest.raises(DamagedError, match="does not match the checksum"):
            check(crc32c(rows[1:].data.cast("B")))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b"", None])
def test_a_chunk_of_another_size_is_not_mapped(local: Store, change: Callable[[bytes], bytes] | None) -> None:
    record = _write(local, signed(5))
    key = f"{GROUP}/signature/c/0/0"
    if change is None:
        Path(local.url(key)).unlink()
    else:
        _replace(local, key, change(local.get(key)))
    with pytest.raises(DamagedError, match="is missing" if change is None else "bytes, .* were written"):
        map_chunk(local, INDEX, record, 0)


def test_full_size_rows_round_trip(store: Store) -> None:
    written = signed(400, 24_576)
    record = _write(store, written)
    assert record.chunk_rows == 200
    np.testing.assert_array_equal(_read(store, record), written.signature)


@pytest.mark.usefixtures("small_chunks")
def test_any_zarr_reader_opens_a_block(local: Store) -> None:
    written = signed(37)
    record = _write(local, written)
    group = zarr.open_group(local.url(GROUP), mode="r")
    assert group.metadata.zarr_format == 3
    assert set(group.array_keys()) == {"signature", "tokens", "chunks"}
    for name in ("signature", "tokens", "chunks"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.compressors == ()
        assert array.shards is None
        np.testing.assert_array_equal(array[...], getattr(written, name))
    signature = group["signature"]
    assert isinstance(signature, zarr.Array)
    assert signature.dtype == np.float16 and signature.chunks == (record.chunk_rows, DIM) == (10, DIM)
    assert math.isnan(float(signature.fill_value))
    sizes = {key.removeprefix(f"{GROUP}/"): size for key, size in local.list(GROUP)}
    assert {name: size for name, size in sizes.items() if "/c/" in name} == {
        **{f"signature/c/{chunk}/0": 10 * DIM * 2 for chunk in range(4)},  # 37 rows, padded to 40
        "tokens/c/0": 37 * 4,
        "chunks/c/0": 37 * 4,
    }
    assert set(record.crc32c) == set(sizes)


@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 8), (341, 24_576), (342, 24_576), (1024, 24_576), (4096, 24_576), (3, 10**8)]
)
def test_chunks_are_bounded_and_even(rows: int, dim: int) -> None:
    chunk_rows, chunks = index._chunking(rows, dim)
    assert (chunks - 1) * chunk_rows < rows <= chunks * chunk_rows
    assert chunk_rows == 1 or chunk_rows * dim * 2 <= index.CHUNK_BYTES
    if rows * dim * 2 > index.CHUNK_BYTES:
        assert chunk_rows * chunks - rows < chunks


def test_the_record_comes_last(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, "checksums", killed)
        with pytest.raises(KeyboardInterrupt):
            _write(local, signed(20))
    assert dict(local.list(GROUP)) and not _listed(local, 20)
    with pytest.raises(IntegrityError, match="not in index"):
        read_record(local, INDEX, BLOCK)
    _write(local, signed(20))
    assert _listed(local, 20)


def test_a_second_write_changes_nothing(store: Store) -> None:
    first, second = signed(20, seed=1), signed(20, seed=2)
    record = _write(store, first)
    assert _write(store, second) == record
    np.testing.assert_array_equal(_read(store), first.signature)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["signature/c/1/0", "tokens/c/0", "chunks/c/0", "signature/zarr.json"])
def test_a_missing_object_is_computed_again(store: Store, name: str) -> None:
    written = signed(37)
    record = _write(store, written)
    store.delete([f"{GROUP}/{name}"])
    assert not _listed(store, 37)
    if name.startswith("signature/c"):
        with pytest.raises(IntegrityError, match="missing"):
            _read(store, record)
    _heal(store, written)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("recorded", [True, False])
def test_a_truncated_chunk_is_computed_again(local: Store, recorded: bool) -> None:
    written = signed(37)
    record = _write(local, written)
    _replace(local, f"{GROUP}/signature/c/2/0", b"short")
    assert not _listed(local, 37)
    with pytest.raises(IntegrityError, match="checksum"):
        _read(local, record)
    if not recorded:
        local.delete([RECORD])
    _heal(local, written)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["signature/c/0/0", "tokens/c/0", "chunks/c/0"])
def test_a_flipped_byte_is_noticed_and_its_remedy_works(local: Store, name: str) -> None:
    written = signed(37)
    record = _write(local, written)
    key = f"{GROUP}/{name}"
    data = bytearray(local.get(key))
    data[7] ^= 1
    _replace(local, key, bytes(data))
    reader = _read if name.startswith("signature") else _counts
    with pytest.raises(DamagedError, match="does not match the checksum") as caught:
        reader(local, record)
    damage = damage_of(local, caught.value)
    assert damage is not None and damage.key == key
    note_damage(local, [damage])
    assert heal(local) == [key]
    _heal(local, written)


def test_repair_checks_what_else_is_damaged(local: Store) -> None:
    written = signed(37)
    _write(local, written)
    data = bytearray(local.get(f"{GROUP}/signature/c/0/0"))
    data[0] ^= 1
    _replace(local, f"{GROUP}/signature/c/0/0", bytes(data))
    local.delete([f"{GROUP}/tokens/c/0"])
    _heal(local, written)


def _heal(store: Store, written: RowSignatures) -> None:
    record = _write(store, written)
    assert _listed(store, len(written.tokens))
    np.testing.assert_array_equal(_read(store, record), written.signature)
    tokens, chunks = read_counts(store, INDEX, record)
    np.testing.assert_array_equal(tokens, written.tokens)
    np.testing.assert_array_equal(chunks, written.chunks)


@pytest.mark.usefixtures("small_chunks")
def test_two_writers_end_consistent(store: Store) -> None:
    writers = 4
    ready = Barrier(writers)
    versions = [signed(83, seed=seed) for seed in range(writers)]

    def write(number: int) -> BlockRecord:
        ready.wait()
        return _write(Store(store.uri), versions[number])

    with ThreadPoolExecutor(writers) as pool:
        records = list(pool.map(write, range(writers)))
    assert all(record == records[0] for record in records)
    for name, checksum in records[0].crc32c.items():
        assert google_crc32c.value(store.get(f"{GROUP}/{name}")) == checksum
    stored = _read(store)
    for start in range(0, 83, records[0].chunk_rows):  # each chunk is one writer's
        part = slice(start, start + records[0].chunk_rows)
        assert any(np.array_equal(stored[part], version.signature[part]) for version in versions)


def test_a_newer_format_is_refused(local: Store) -> None:
    _write(local, signed(5))
    record = json.loads(local.get(RECORD))
    _replace(local, RECORD, json.dumps(record | {"format_version": 99}).encode())
    with pytest.raises(IntegrityError, match="format version 99"):
        read_record(local, INDEX, BLOCK)


def test_an_index_that_is_not_there_is_explained(local: Store) -> None:
    model = ModelConfig(name="some/model")
    with pytest.raises(ModelError, match="It has: none"):
        read_index(local, INDEX, model=model)
    local.create_json(
        f"indexes/{INDEX}/index.json",
        {
            "index_id": INDEX,
            "tables_sha256": "0" * 64,
            "model": {"name": "other/model", "fingerprint": "f" * 64},
            "sketch": {"temperature": 0.5},
            "dim": 99,
        },
    )
    local.create(f"indexes/{'2' * 64}/tables.zarr/zarr.json", b"{}")  # its creation was interrupted
    with pytest.raises(ModelError, match=r"other/model \(ffffffffffff\), temperature 0.5, 99 wide\. Run"):
        read_index(local, "3" * 64, model=model)
    assert [item["index_id"] for item in store_status(local)["indexes"]] == [INDEX]


def test_unit_rows_stay_unit(local: Store) -> None:
    record = _write(local, signed(64, 512))
    norms = np.linalg.norm(_read(local, record).astype(np.float32), axis=1)
    np.testing.assert_allclose(norms, np.linalg.norm(unit(64, 512), axis=1), atol=1e-3)
