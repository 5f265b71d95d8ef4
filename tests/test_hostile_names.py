"""Names and links of sources: nothing in a name leads out, and what was listed is what is read."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import fsspec
import pytest

from rise_ops import folders
from rise_ops.errors import SourceError
from rise_ops.readers import open_rows
from rise_ops.sources import list_objects, open_object
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, jsonl
from tests.hostile import MIB


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


_NAMES = [
    "-rf.jsonl", "%2e%2e%2fx.jsonl", "..jsonl.jsonl", "a\nb.jsonl", "a\x1b[31mb.jsonl", "[a]*?.jsonl", " .jsonl",
    "caf\u00e9.jsonl", "cafe\u0301.jsonl", "a .jsonl", "a.jsonl", "a::b.jsonl", "~.jsonl", "a#1.jsonl",
    "\u202elnosj.jsonl",
    "<script>.jsonl", "a&b?c=d.jsonl", "s3:\\x.jsonl", "n" * 240 + ".jsonl",
]  # fmt: skip


def test_strange_names_are_different_sources(local: Store, tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for place, name in enumerate(_NAMES):
        (folder / name).write_bytes(jsonl([{"text": f"row {place}"}]))
    version = ingest_all(local, corpus_of(folder / "*.jsonl"))
    assert sorted(entry.uri for entry in version.sources) == sorted(f"{folder}/{name}" for name in _NAMES)
    assert version.rows == len(_NAMES)
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "store"}


def test_a_name_that_is_not_utf8_is_refused_readably(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(b"{}")
    with pytest.raises(SourceError, match=r"caf\\xe9\.jsonl has a name that is not UTF-8; rename it") as caught:
        list_objects([f"{tmp_path}/*.jsonl"])
    str(caught.value).encode()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "x.jsonl").write_bytes(b"{}")
    inside = tmp_path / "raw" / "deep"
    inside.mkdir(parents=True)
    (inside / "a.jsonl").write_bytes(b"{}")
    root = f"{tmp_path}/raw"
    for target, name in (
        (tmp_path / "secret" / "x.jsonl", "x.jsonl"),
        (tmp_path / "secret", "folder"),
        (tmp_path, "up"),
    ):
        link = inside / name
        link.symlink_to(target)
        with pytest.raises(SourceError, match=rf"{name} is a symbolic link out of {root}, to {target}; name the real"):
            list_objects([f"{root}/**/*.jsonl"])
        link.unlink()
    assert [item.uri for item in list_objects([f"{root}/**/*.jsonl"])] == [f"{inside}/a.jsonl"]


@pytest.mark.parametrize("pattern", ["*/a.jsonl", "*/*.jsonl", "dee?/a.jsonl", "*/out/a.jsonl", "**/out/*"])
def test_a_link_anywhere_in_a_glob_is_looked_at(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "raw" / "real").mkdir(parents=True)
    (tmp_path / "raw" / "deep").symlink_to(tmp_path / "secret")
    (tmp_path / "raw" / "real" / "out").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="is a symbolic link out of"):
        list_objects([f"{tmp_path}/raw/{pattern}"])


def test_links_within_the_folder_and_named_ones_are_followed(tmp_path: Path) -> None:
    (tmp_path / "raw" / "real").mkdir(parents=True)
    (tmp_path / "raw" / "real" / "a.jsonl").write_bytes(b"{}")
    (tmp_path / "raw" / "also").symlink_to("real")
    (tmp_path / "raw" / "b.jsonl").symlink_to("real/a.jsonl")
    (tmp_path / "named").symlink_to(tmp_path / "raw")
    (tmp_path / "named.jsonl").symlink_to("raw/real/a.jsonl")
    assert len(list_objects([f"{tmp_path}/raw/**/*.jsonl"])) == 3
    assert len(list_objects([f"{tmp_path}/named/**/*.jsonl"])) == 3
    assert len(list_objects([f"{tmp_path}/named.jsonl", f"{tmp_path}/named/also/a.jsonl"])) == 2


def test_links_that_lead_to_each_other_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_LINKS", 200)
    names = "abcdefgh"
    for name in names:
        (tmp_path / name).mkdir()
        for other in names:
            (tmp_path / name / other).symlink_to(tmp_path / other)
    with pytest.raises(SourceError, match="followed more than 200 symbolic links"):
        list_objects([f"{tmp_path}/**/*.jsonl"])
    for name in names[2:]:
        shutil.rmtree(tmp_path / name)
        for other in names[:2]:
            (tmp_path / other / name).unlink()
    (tmp_path / "a" / "x.jsonl").write_bytes(b"{}")
    found = [item.uri.removeprefix(f"{tmp_path}/") for item in list_objects([f"{tmp_path}/**/*.jsonl"])]
    assert found == ["a/x.jsonl", "b/a/x.jsonl"]


def test_a_file_that_is_swapped_after_listing_is_not_read(local: Store, tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_bytes(b'{"text": "secret"}\n')
    for name in ("a.jsonl", "a.parquet", "a.arrow"):
        path = tmp_path / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b'{"text": "public"}\n')
        (seen,) = list_objects([f"{tmp_path}/raw/{name[0]}*{path.suffix}"])
        path.unlink()
        path.symlink_to(tmp_path / "secret.jsonl")
        os.utime(path, ns=(seen.mtime or 0, seen.mtime or 0))
        with pytest.raises(SourceError, match="is not the file that was listed"), open_rows(seen, row_bytes=MIB):
            pass


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path)  # a socket's path may have 107 characters
        try:
            server.bind("socket.jsonl")
        finally:
            os.chdir(here)
        (tmp_path / "folder.jsonl").mkdir()
        for path in ("pipe.jsonl", "socket.jsonl", "folder.jsonl"):
            with pytest.raises(SourceError):
                list_objects([f"{tmp_path}/{path}"])
            with pytest.raises(SourceError), open_object(f"{tmp_path}/{path}"):
                pass
    for device in ("/dev/zero", "/dev/stdin"):
        with pytest.raises(SourceError), open_object(device):
            pass


@pytest.mark.parametrize("name", ["../x.jsonl", "a/../../x.jsonl", "a/./x.jsonl"])
def test_a_remote_name_with_a_detour_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    files = fsspec.filesystem("memory")
    found = {f"/bucket/raw/{name}": {"name": f"/bucket/raw/{name}", "type": "file", "size": 1}}
    monkeypatch.setattr(type(files), "glob", lambda *_, **__: found)
    with pytest.raises(SourceError, match=r"with '\.' or '\.\.' between slashes is ambiguous"):
        list_objects(["memory://bucket/raw/**"])


@pytest.mark.s3
def test_keys_with_odd_names_on_s3(s3_bucket: str) -> None:
    names = [
        "%2e%2e/x.jsonl",
        "a%2fb.jsonl",
        "-a.jsonl",
        "a b .jsonl",
        "caf\u00e9.jsonl",
        "cafe\u0301.jsonl",
        "[x].jsonl",
    ]
    bucket = Store(f"s3://{s3_bucket}")
    for place, name in enumerate(names):
        bucket.create(f"raw/{name}", jsonl([{"text": f"row {place}"}]))
    version = ingest_all(Store(f"s3://{s3_bucket}/store"), corpus_of(f"s3://{s3_bucket}/raw/**"))
    assert sorted(entry.uri for entry in version.sources) == sorted(f"s3://{s3_bucket}/raw/{name}" for name in names)
    assert version.rows == len(names)
