"""The contract of a store, the same for every backend.

Exclusive creates are what runs rely on to never overwrite each other, so they are tried with many threads
at once. Errors are tried for real: a folder without write permission, a server that refuses.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import obstore
import polars as pl
import pytest
import zarr

from rise_ops import store as store_module
from rise_ops.checksums import stored_crc32c
from rise_ops.errors import (
    ConfigError,
    CurationError,
    IntegrityError,
    MissingObjectError,
    StoreError,
    TransientError,
    is_transient,
)
from rise_ops.retry import BUDGET
from rise_ops.store import Store
from tests.conftest import s3_filesystem
from tests.servers import Credentials, S3Server, read_only_policy

THREADS = 16
NOBODY = 65534


def test_an_object_is_read_as_it_was_written(store: Store) -> None:
    assert store.create("a/b/c.bin", b"\x00\x01\xff")
    assert store.get("a/b/c.bin") == b"\x00\x01\xff"
    assert store.size("a/b/c.bin") == 3
    assert store.exists("a/b/c.bin")


def _refused(*_: object, **__: object) -> None:
    raise OSError(errno.ENODEV, "No such device")


@pytest.mark.parametrize("size", [0, 1, 2**18, 2**18 + 1])
def test_an_object_is_read_in_pieces(store: Store, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_RANGE_BYTES", 2**17)
    data = os.urandom(size)
    store.create("a/b", data)
    assert b"".join(bytes(piece) for piece in store.pieces("a/b")) == data
    assert b"".join(bytes(piece) for piece in store.pieces("a/b", size=size)) == data
    if store.is_local:
        mapped = store.mapped("a/b")
        assert mapped == data and mapped.readonly
        monkeypatch.setattr("mmap.mmap", _refused)
        assert store.mapped("a/b") == data
        with pytest.raises(MissingObjectError):
            store.mapped("a/c")
    assert stored_crc32c(store, "a/b") == google_crc32c.value(data)
    with pytest.raises(MissingObjectError):
        stored_crc32c(store, "a/c")
    with pytest.raises(MissingObjectError):
        stored_crc32c(store, "a")


def test_an_empty_object_exists(store: Store) -> None:
    assert store.create("empty", b"")
    assert store.exists("empty")
    assert store.get("empty") == b""


def test_what_exists_is_never_changed(store: Store) -> None:
    assert store.create("key", b"first")
    assert not store.create("key", b"second")
    assert not store.create_json("key", {"third": 3})
    assert store.get("key") == b"first"


def test_one_of_many_writers_wins(store: Store) -> None:
    start = threading.Barrier(THREADS)

    def write(number: int) -> bool:
        start.wait()
        return store.create("contested", b"%d" % number)

    with ThreadPoolExecutor(THREADS) as pool:
        won = list(pool.map(write, range(THREADS)))
    assert sum(won) == 1
    assert store.get("contested") == b"%d" % won.index(True)


def test_one_of_many_stores_wins(store: Store) -> None:
    """As above, each writer with a connection of its own, as in several processes."""
    start = threading.Barrier(THREADS)

    def write(number: int) -> bool:
        own = Store(store.uri)
        start.wait()
        return own.create("contested", b"%d" % number)

    with ThreadPoolExecutor(THREADS) as pool:
        won = list(pool.map(write, range(THREADS)))
    assert sum(won) == 1
    assert store.get("contested") == b"%d" % won.index(True)


def test_a_missing_key_is_named(store: Store) -> None:
    with pytest.raises(MissingObjectError, match=r"no/such\.json is not in the store"):
        store.get("no/such.json")
    store.create("other", b"1")
    with pytest.raises(MissingObjectError, match=r"no/such\.json"):
        store.get("no/such.json")
    assert store.size("no/such.json") is None
    assert not store.exists("no/such.json")


def test_an_empty_store_lists_nothing(store: Store) -> None:
    assert list(store.list("runs")) == []
    assert store.children("runs") == []


def test_a_mistyped_path_is_no_store(store: Store) -> None:
    with pytest.raises(ConfigError, match="there is no store at"):
        store.require()
    store.create("notes/mine.txt", b"1")
    with pytest.raises(ConfigError, match="there is no store at"):
        store.require()
    store.create("corpora/a/versions/000000000001.json", b"{}")
    store.require()


def test_listing_is_deep_and_children_are_shallow(store: Store) -> None:
    for key in ("runs/b/run.json", "runs/a/run.json", "runs/a/x/y", "runsX/c", "runs/top.json"):
        store.create(key, key.encode())
    assert sorted(store.list("runs")) == [
        ("runs/a/run.json", 15),
        ("runs/a/x/y", 10),
        ("runs/b/run.json", 15),
        ("runs/top.json", 13),
    ]
    assert store.children("runs") == store.children("runs/") == ["a", "b", "top.json"]
    assert store.children("runs/a") == ["run.json", "x"]


def test_listing_sees_more_than_one_page(store: Store) -> None:
    keys = [f"many/{number:04d}" for number in range(1_100)]
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(lambda key: store.create(key, b"x"), keys))
    assert sorted(key for key, _ in store.list("many")) == keys
    assert len(store.children("many")) == len(keys)


def test_json_is_canonical_and_versioned(store: Store) -> None:
    assert store.create_json("v.json", {"name": "größe", "format_version": 3})
    text = '{"format_version":3,"name":"größe"}'
    seal = f'"checksum":"crc32c:{google_crc32c.value(text.encode()):08x}"'
    assert store.get("v.json").decode() == f"{text[:-1]},{seal}}}\n"
    assert store.get_json("v.json", format_version=3) == {"format_version": 3, "name": "größe"}
    with pytest.raises(IntegrityError, match="format version 3, this program reads up to 2; upgrade"):
        store.get_json("v.json", format_version=2)


@pytest.mark.parametrize("place", range(5, 30, 6))
def test_a_document_that_changed_is_refused(store: Store, place: int) -> None:
    store.create_json("v.json", {"name": "abcdefghijklmnop", "rows": 12345})
    data = bytearray(store.get("v.json"))
    data[place] ^= 1
    store.delete(["v.json"])
    store.create("v.json", bytes(data))
    with pytest.raises(IntegrityError):
        store.get_json("v.json")


def test_documents_without_a_checksum_are_read(store: Store) -> None:
    store.create("empty.json", b"{}")
    store.create("old.json", b'{"a":1}\n')
    assert (store.get_json("empty.json"), store.get_json("old.json")) == ({}, {"a": 1})
    store.create_json("sealed.json", {})
    assert store.get_json("sealed.json") == {}


@pytest.mark.parametrize("damaged", [b"", b'{"a": 1', b"[1, 2]", b"\xff\xfe", b"null"])
def test_damaged_json_is_refused(store: Store, damaged: bytes) -> None:
    store.create("bad.json", damaged)
    with pytest.raises(IntegrityError, match=r"bad\.json"):
        store.get_json("bad.json")


@pytest.mark.parametrize("size", [0, 1_000, 9 * 2**20 + 1])
def test_a_file_is_stored_whole(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(store_module, "_MULTIPART_BYTES", 2**20)
    file = tmp_path / "data.bin"
    data = np.random.default_rng(0).bytes(size)
    file.write_bytes(data)
    assert store.create_from_file("data/file.bin", file)
    assert store.get("data/file.bin") == data
    file.write_bytes(b"changed")
    assert not store.create_from_file("data/file.bin", file)
    assert store.get("data/file.bin") == data


def test_a_large_file_is_not_overwritten_by_a_second_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_MULTIPART_BYTES", 2**20)
    store.create("data/file.bin", b"first")
    file = tmp_path / "data.bin"
    file.write_bytes(bytes(2 * 2**20))
    assert not store.create_from_file("data/file.bin", file)
    assert store.get("data/file.bin") == b"first"


def test_a_zarr_group_round_trips(store: Store) -> None:
    values = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float16)
    group = zarr.create_group(store.zarr("indexes/i/b.zarr"), attributes={"format_version": 1})
    array = group.create_array("signature", shape=values.shape, chunks=(100, 64), dtype="float16", compressors=None)
    array[:] = values
    again = zarr.open_group(store.zarr("indexes/i/b.zarr", read_only=True), mode="r")
    read = again["signature"]
    assert isinstance(read, zarr.Array)
    np.testing.assert_array_equal(read[:], values)
    assert again.attrs["format_version"] == 1
    assert "signature" in store.children("indexes/i/b.zarr")


def test_a_zarr_group_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises((MissingObjectError, FileNotFoundError)):
        zarr.open_group(store.zarr("indexes/none.zarr", read_only=True), mode="r")


def test_parquet_objects_are_scanned_as_one(store: Store, tmp_path: Path) -> None:
    for number in range(3):
        file = tmp_path / f"{number}.parquet"
        pl.DataFrame({"part": [number] * 5, "row": range(5)}).write_parquet(file)
        store.create_from_file(f"runs/r/scores/{number}.parquet", file)
    frame = store.scan_parquet([f"runs/r/scores/{number}.parquet" for number in range(3)])
    assert frame.filter(pl.col("row") == 4).select("part").collect()["part"].to_list() == [0, 1, 2]


def test_a_store_travels_to_another_process(store: Store) -> None:
    store.create("key", b"1")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(store.get, ("key",)) == b"1"


def test_deleted_objects_are_gone(store: Store) -> None:
    for key in ("a", "b", "c"):
        store.create(key, b"1")
    store.delete(["a", "b"])
    assert not store.exists("a")
    assert store.exists("c")
    store.delete([])


def test_the_probe_accepts_and_leaves_nothing(store: Store) -> None:
    store.probe()
    store.probe()
    assert list(store.list("")) == []


def test_the_probe_refuses_a_store_that_loses_writes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real_put = obstore.put

    def careless_put(backend: Any, key: str, data: bytes, **_: object) -> object:
        return real_put(backend, key, data, mode="overwrite")

    monkeypatch.setattr(obstore, "put", careless_put)
    with pytest.raises(StoreError, match=r"let two writers create the same object.*If-None-Match"):
        store.probe()


@pytest.mark.parametrize("uri", ["http://host/x", "memory://x", "ftp://host/x"])
def test_a_store_needs_a_place_that_keeps_it(uri: str) -> None:
    with pytest.raises(ConfigError, match="use a folder or s3://bucket/prefix"):
        Store(uri)


def test_local_uris_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store("here").uri == str(tmp_path / "here")
    assert Store("~/there").uri == str(tmp_path / "home" / "there")
    assert Store(f"file://{tmp_path}/x").uri == str(tmp_path / "x")
    assert Store("here").url("a/b") == str(tmp_path / "here" / "a" / "b")


def test_reading_creates_no_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "none"))
    assert not store.exists("x")
    assert list(store.list("x")) == []
    assert not (tmp_path / "none").exists()


def test_a_folder_without_write_permission_is_named() -> None:
    # Not below pytest's temporary folder, which no other user may enter.
    root = Path(tempfile.mkdtemp(prefix="rise-ops-"))
    try:
        store = Store(str(root / "store"))
        store.create("there", b"1")
        for folder in (root, root / "store"):
            folder.chmod(0o555)
        with without_root():
            assert store.get("there") == b"1"
            for action in (lambda: store.create("new", b"1"), store.probe, Store(str(root / "other")).probe):
                with pytest.raises(StoreError, match="permission denied or read-only; check the folder's owner"):
                    action()
    finally:
        for folder in (root, root / "store"):
            folder.chmod(0o755)
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EROFS, "permission denied or read-only"), (errno.ENOSPC, "no space left"), (errno.EIO, "Input/output")],
)
def test_a_failing_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def failing_put(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(obstore, "put", failing_put)
    with pytest.raises(StoreError, match=words) as caught:
        Store(str(tmp_path / "store")).create("key", b"1")
    assert not is_transient(caught.value)


def test_a_store_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="file"):
        Store(str(tmp_path / "file")).create("key", b"1")


@pytest.mark.s3
def test_a_missing_bucket_is_named(s3_bucket: str) -> None:
    store = Store("s3://no-such-bucket-here/prefix")
    for action in (store.probe, lambda: store.get("key"), lambda: list(store.list("runs")), lambda: store.children("")):
        with pytest.raises(StoreError, match="bucket of s3://no-such-bucket-here/prefix does not exist"):
            action()


@pytest.mark.s3
@pytest.mark.parametrize("part", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_named_and_not_shown(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    if not s3_server.enforces_access:
        pytest.skip(f"{s3_server.kind} accepts any credentials")
    monkeypatch.setenv(part, "sesame-open")
    store = Store(f"s3://{s3_bucket}")
    actions = (store.probe, lambda: store.get("key"), lambda: list(store.list("")), lambda: store.exists("key"))
    for action in actions:
        with pytest.raises(StoreError, match="access refused; check AWS_ACCESS_KEY_ID") as caught:
            action()
        assert "sesame-open" not in str(caught.value)
        assert not is_transient(caught.value)


@pytest.mark.s3
def test_a_bucket_without_write_permission_is_named(
    s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3_server.enforces_access:
        pytest.skip(f"{s3_server.kind} keeps no policies")
    bucket = "read-only"
    files = s3_filesystem()
    files.mkdir(bucket)
    files.call_s3("put_bucket_policy", Bucket=bucket, Policy=read_only_policy(bucket, s3_server.guest_arn))
    Store(f"s3://{bucket}/x").create("there", b"1")
    use_credentials(monkeypatch, s3_server.guest)
    store = Store(f"s3://{bucket}/x")
    assert store.get("there") == b"1"
    with pytest.raises(StoreError, match="access refused"):
        store.probe()
    assert [key for key, _ in store.list("")] == ["there"]


def test_a_server_that_is_not_there_may_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("rise_ops.retry.BUDGET", replace(BUDGET, tries=1))
    use_credentials(monkeypatch, Credentials("a", "b"))
    with pytest.raises(TransientError) as caught:
        Store("s3://bucket/x").get("key")
    assert is_transient(caught.value)
    assert len(str(caught.value)) < 600


def use_credentials(environment: pytest.MonkeyPatch, credentials: Credentials) -> None:
    for name, value in credentials.environment.items():
        environment.setenv(name, value)


@contextmanager
def without_root() -> Iterator[None]:
    """Permissions mean nothing to root: give its rights up for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_every_error_of_a_store_is_a_curation_error() -> None:
    for kind in (StoreError, MissingObjectError, IntegrityError, TransientError):
        assert issubclass(kind, CurationError)
