"""Listing: globs on every kind of URL, exact states, and errors that name the remedy."""

from __future__ import annotations

import os
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from rise_ops.config import CorpusConfig
from rise_ops.corpus import list_sources
from rise_ops.errors import ConfigError, SourceError, TransientError
from rise_ops.retry import BUDGET
from rise_ops.sources import SourceObject, list_objects, local_copy, named_errors, open_object, stat_object
from rise_ops.store import Store


def _fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def _names(found: list[SourceObject], root: str) -> list[str]:
    return [item.uri.removeprefix(root + "/") for item in found]


def test_globs_of_local_files(tmp_path: Path) -> None:
    _fill(tmp_path, "a.jsonl", "b.csv", ".hidden.jsonl", "deep/er/c.jsonl", "deep/d.jsonl")
    root = str(tmp_path)
    assert _names(list_objects([f"{root}/*.jsonl"]), root) == [".hidden.jsonl", "a.jsonl"]
    assert _names(list_objects([f"{root}/**/*.jsonl"]), root) == [
        ".hidden.jsonl", "a.jsonl", "deep/d.jsonl", "deep/er/c.jsonl"
    ]  # fmt: skip
    both = list_objects([f"file://{root}/a.*", f"{root}/[ab].*"])
    assert _names(both, root) == ["a.jsonl", "b.csv"]


def test_states_of_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    (found,) = list_objects([str(path)])
    assert found == SourceObject(str(path), 2, None, 1_700_000_000_123_456_789)
    assert stat_object(str(path)).same_state(found)
    os.utime(path, ns=(1, 1_700_000_000_123_456_790))
    assert not stat_object(str(path)).same_state(found)


def test_states_with_tags_ignore_times() -> None:
    seen = SourceObject("s3://b/k", 1, "tag", 1)
    assert seen.same_state(SourceObject("s3://b/k", 1, "tag", 2))
    assert not seen.same_state(SourceObject("s3://b/k", 1, "other", 1))
    nothing_known = SourceObject("https://h/k", 1, None, None)
    assert not nothing_known.same_state(nothing_known)


def test_globs_follow_links_once(tmp_path: Path) -> None:
    _fill(tmp_path, "real/a.jsonl")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    root = str(tmp_path)
    assert _names(list_objects([f"{root}/**/*.jsonl"]), root) == ["linked/a.jsonl", "real/a.jsonl"]
    assert _names(list_objects([f"{root}/**"]), root) == ["linked/a.jsonl", "real/a.jsonl"]
    assert _names(list_objects([f"{root}/*/a.jsonl", f"{root}/r??l/*"]), root) == ["linked/a.jsonl", "real/a.jsonl"]


def test_names_that_look_like_globs(tmp_path: Path) -> None:
    _fill(tmp_path, "rows[1].jsonl", "rows1.jsonl")
    (found,) = list_objects([f"{tmp_path}/rows[1].jsonl"])
    assert found.uri.endswith("rows[1].jsonl")


def test_memory_objects() -> None:
    root = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{root}/a/b.jsonl", "wb") as file:
        file.write(b"123")
    (found,) = list_objects([f"{root}/**/*.jsonl"])
    assert (found.uri, found.size) == (f"{root}/a/b.jsonl", 3)
    assert found.same_state(stat_object(found.uri))
    with local_copy(found) as (path, sha256):
        assert path.read_bytes() == b"123"
        assert len(sha256) == 64
    assert not path.exists()


@pytest.mark.s3
def test_s3_objects(s3_bucket: str) -> None:
    bucket = Store(f"s3://{s3_bucket}")
    for name in ("a.jsonl", "deep/[b].jsonl", "deep/c d#?.jsonl"):
        bucket.create(f"raw/{name}", b"12")
    found = list_objects([f"s3://{s3_bucket}/raw/**/*.jsonl"])
    root = f"s3://{s3_bucket}/raw"
    assert _names(found, root) == ["a.jsonl", "deep/[b].jsonl", "deep/c d#?.jsonl"]
    for item in found:
        assert item.etag is not None
        assert item.same_state(stat_object(item.uri))
        with open_object(item.uri) as file:
            assert file.read() == b"12"
    bucket.create("raw/new.jsonl", b"3")
    assert len(list_objects([f"{root}/**/*.jsonl"])) == 4


@pytest.mark.s3
def test_s3_refusals(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="the bucket no-such-bucket does not exist"):
        list_objects(["s3://no-such-bucket/x/*.jsonl"])
    with pytest.raises(SourceError, match="matches nothing"):
        list_objects([f"s3://{s3_bucket}/none/*.jsonl"])
    Store(f"s3://{s3_bucket}").create("a.jsonl", b"1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    for uri in (f"s3://{s3_bucket}/*.jsonl", f"s3://{s3_bucket}/a.jsonl"):
        with pytest.raises(SourceError, match="check AWS_ACCESS_KEY_ID") as caught:
            list_objects([uri])
        assert "not-the-secret" not in str(caught.value)
    with pytest.raises(SourceError, match="access refused"), open_object(f"s3://{s3_bucket}/a.jsonl") as file:
        file.read()


def test_a_server_that_is_down_is_a_passing_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rise_ops.retry.BUDGET", replace(BUDGET, tries=1))
    with pytest.raises(TransientError, match=r"s3://bucket/\*\.jsonl"):
        list_objects(["s3://bucket/*.jsonl"])


def test_what_matches_nothing_is_named(tmp_path: Path) -> None:
    _fill(tmp_path, "folder/a.jsonl")
    for uri, message in (
        (f"{tmp_path}/none/*.jsonl", "matches nothing"),
        (f"{tmp_path}/none.jsonl", "does not exist"),
        (f"{tmp_path}/folder", "is a folder"),
        ("memory://none/*.jsonl", "matches nothing"),
    ):
        with pytest.raises(SourceError, match=message):
            list_objects([uri])
    with pytest.raises(SourceError, match="does not exist"):
        stat_object(f"{tmp_path}/none.jsonl")
    with pytest.raises(SourceError, match="was removed"), open_object(f"{tmp_path}/none.jsonl"):
        pass


def test_wrong_urls_are_named() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        list_objects(["nosuch://x/*.jsonl"])
    with pytest.raises(ConfigError, match="must be between slashes"):
        list_objects(["memory://x/**.jsonl"])
    with pytest.raises(ConfigError, match="chained"):
        list_objects(["simplecache::s3://b/*.jsonl"])


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(SourceError, match="not a regular file"):
        list_objects([f"{tmp_path}/*.jsonl"])


def test_a_broken_link_is_not_skipped(tmp_path: Path) -> None:
    _fill(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(SourceError):
        list_objects([f"{tmp_path}/*.jsonl"])


def test_an_unreadable_folder_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(tmp_path, "a.jsonl", "secret/b.jsonl")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).rstrip("/").endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match="permission denied"):
        list_objects([f"{tmp_path}/**/*.jsonl"])


def test_sources_may_not_lie_in_the_store(tmp_path: Path) -> None:
    _fill(tmp_path, "raw/a.jsonl", "store/quarantine/b.jsonl", "store2/c.jsonl")
    corpus = CorpusConfig(name="corpus", sources=(f"{tmp_path}/**/*.jsonl",))
    with pytest.raises(ConfigError, match=r"b\.jsonl lies in the store"):
        list_sources(corpus, store=Store(str(tmp_path / "store")))
    assert len(list_sources(corpus)) == 3


def test_unknown_formats_are_found_early(tmp_path: Path) -> None:
    _fill(tmp_path, "a.jsonl", "README.md")
    with pytest.raises(SourceError, match=r"README\.md: format not known"):
        list_sources(CorpusConfig(name="corpus", sources=(f"{tmp_path}/*",)))


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (FileNotFoundError(2, "x"), SourceError),
        (PermissionError(13, "x"), SourceError),
        (OSError(5, "x"), TransientError),
        (OSError(22, "x"), SourceError),
        (ConnectionResetError(), TransientError),
        (TimeoutError(), TransientError),
    ],
)
def test_client_errors_are_sorted(error: OSError, named: type[Exception]) -> None:
    with pytest.raises(named, match="s3://bucket/key"), named_errors("s3://bucket/key"):
        raise error
