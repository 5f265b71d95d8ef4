"""Where rows come from: listing and opening source objects on any fsspec URL.

A source is a glob: a local path, `s3://bucket/key`, `memory://…` or any other URL that fsspec opens. What
identifies the state of an object without reading it is its size with its ETag, or, where there is none
(local files), with its modification time in nanoseconds. Listings are never cached. S3 endpoint and
credentials come from the usual `AWS_*` variables; no message shows them.

This module does not know formats (`rise_ops.readers`) and does not interpret bytes.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fsspec

from rise_ops.errors import ConfigError, SourceError, TransientError, is_transient

CHUNK_BYTES = 1 << 20
"""Bytes read from a source at a time."""

_MAGIC = "*?["
_S3 = ("s3", "s3a")
_LOCAL = ("", "file", "local")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_PASSING = {errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EPIPE, errno.EAGAIN}
_PASSING |= {getattr(errno, "EREMOTEIO", errno.EIO)}


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object as a listing shows it."""

    uri: str
    """Absolute local path, or URL with its scheme."""
    size: int
    """Bytes; -1 where the server does not say."""
    etag: str | None
    """The server's tag of the content, without quotes."""
    mtime: int | None
    """Last modification, nanoseconds since 1970."""

    def same_state(self, other: SourceObject) -> bool:
        """Whether both sightings show the same bytes, as far as a listing can tell."""
        if self.size != other.size or self.etag != other.etag:
            return False
        return self.etag is not None or (self.mtime is not None and self.mtime == other.mtime)


def list_objects(globs: Sequence[str], *, outside: str | None = None) -> list[SourceObject]:
    """Every object that at least one glob matches, once each, sorted by uri.

    Parameters
    ----------
    globs
        Paths or URLs; `*`, `?`, `[…]` and `**` as in a shell, hidden files included.
    outside
        Root of a store; sources may not lie in it.

    Raises
    ------
    SourceError
        A glob matches nothing, or access is refused.
    ConfigError
        A source lies in the store.
    TransientError
        The server did not answer.
    """
    found: dict[str, SourceObject] = {}
    for pattern in globs:
        with named_errors(pattern):
            matches = _matches(pattern)
            if not matches:
                raise SourceError(_nothing(pattern))
        for item in matches:
            if outside is not None:
                refuse_inside(item.uri, outside)
            found[item.uri] = item
    return [found[uri] for uri in sorted(found)]


def refuse_inside(uri: str, root: str) -> None:
    """Raise ConfigError where `uri` lies below the store's `root`: a run must not read what runs write."""
    source, store = _comparable(uri), _comparable(root).rstrip("/")
    if source == store or source.startswith(store + "/"):
        raise ConfigError(f"corpus.sources: {uri} lies in the store {root}; narrow the glob or move the store")


def stat_object(uri: str) -> SourceObject:
    """One object's present state.

    Raises
    ------
    SourceError, TransientError
    """
    with named_errors(uri):
        protocol, filesystem, path = _resolve(uri)
        if protocol in _LOCAL:
            return _local(path)
        return _remote(protocol, filesystem, path, filesystem.info(path))


@contextmanager
def open_object(uri: str) -> Iterator[BinaryIO]:
    """The object's bytes as a file, read from its beginning; errors while reading are named too."""
    with named_errors(uri):
        protocol, filesystem, path = _resolve(uri)
        options: dict[str, Any] = {"block_size": 4 * CHUNK_BYTES, "cache_type": "readahead"} if protocol in _S3 else {}
        with filesystem.open(path, "rb", **options) as file:
            yield file


def hash_object(uri: str) -> str:
    """SHA-256 of the object's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open_object(uri) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def local_copy(uri: str) -> Iterator[tuple[Path, str]]:
    """A local path with the object's bytes, and their SHA-256. A remote object is spooled to a temporary file."""
    protocol, _, path = _resolve(uri)
    if protocol in _LOCAL:
        yield Path(path), hash_object(uri)
        return
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        spool = Path(folder) / "object"
        with open_object(uri) as file, spool.open("wb") as copy:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
        yield spool, digest.hexdigest()


def is_local(uri: str) -> bool:
    """Whether the object is a file of this machine."""
    return _protocol(uri) in _LOCAL


@contextmanager
def named_errors(uri: str) -> Iterator[None]:
    """Turn what fsspec and its clients raise into errors that name the object and the remedy."""
    try:
        yield
    except (SourceError, ConfigError):
        raise
    except _client_errors(uri) as error:
        raise _named(uri, error) from error


def _protocol(uri: str) -> str:
    head, separator, _ = uri.partition("://")
    if separator and "::" in head:
        raise ConfigError(f"source {uri}: chained URLs ('::') are not supported; give the object's own URL")
    return head.lower() if separator else ""


def _resolve(uri: str) -> tuple[str, Any, str]:
    """(protocol, filesystem, path in it)."""
    protocol = _protocol(uri)
    try:
        filesystem = fsspec.filesystem(protocol or "file", **(_s3_options() if protocol in _S3 else {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"source {uri}: cannot open '{protocol}://' ({error})") from error
    return protocol, filesystem, str(filesystem._strip_protocol(uri))


def _s3_options() -> dict[str, Any]:
    # The keys are passed on so that fsspec's cache of filesystems tells one set of credentials from another.
    environment = os.environ.get
    options: dict[str, Any] = {
        "key": environment("AWS_ACCESS_KEY_ID"),
        "secret": environment("AWS_SECRET_ACCESS_KEY"),
        "token": environment("AWS_SESSION_TOKEN"),
        "endpoint_url": environment("AWS_ENDPOINT_URL_S3") or environment("AWS_ENDPOINT_URL") or None,
        "use_listings_cache": False,
    }
    region = environment("AWS_REGION") or environment("AWS_DEFAULT_REGION") or "us-east-1"
    return options | {"client_kwargs": {"region_name": region}}


def _matches(pattern: str) -> list[SourceObject]:
    protocol, filesystem, path = _resolve(pattern)
    local = protocol in _LOCAL
    if filesystem.isfile(path):  # also a name that happens to hold glob characters
        return [stat_object(pattern)]
    if not any(sign in path for sign in _MAGIC):
        if filesystem.isdir(path):
            raise SourceError(f"source {pattern} is a folder; say which files, such as {pattern.rstrip('/')}/*.jsonl")
        return [_local(path)] if local and os.path.lexists(path) else []
    if any("**" in part and part != "**" for part in path.split("/")):
        raise ConfigError(f"source {pattern}: '**' stands for folders and must be between slashes, as in a/**/*.jsonl")
    if local:
        return [_local(name) for name in dict.fromkeys(_expanded("/", path.strip("/").split("/")))]
    found = filesystem.glob(path, detail=True)
    return [_remote(protocol, filesystem, name, info) for name, info in found.items() if info["type"] != "directory"]


def _expanded(folder: str, parts: list[str]) -> Iterator[str]:
    """Files below `folder` that match. fsspec's own glob passes over folders that it may not read; this raises."""
    head, *rest = parts
    if head == "**":
        yield from _expanded(folder, rest or ["*"])
        for entry in _entries(folder):
            if entry.is_dir() and not _is_loop(folder, entry):
                yield from _expanded(entry.path, parts)
    elif any(sign in head for sign in _MAGIC):
        for entry in _entries(folder):
            if fnmatch.fnmatchcase(entry.name, head):
                if rest and entry.is_dir():
                    yield from _expanded(entry.path, rest)
                elif not rest and not entry.is_dir():
                    yield entry.path
    else:
        path = os.path.join(folder, head)
        if rest and os.path.isdir(path):
            yield from _expanded(path, rest)
        elif not rest and os.path.lexists(path) and not os.path.isdir(path):
            yield path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_loop(folder: str, entry: os.DirEntry[str]) -> bool:
    """Whether a link leads back to a folder above it."""
    inside = os.path.realpath(folder) + "/"
    return entry.is_symlink() and inside.startswith(os.path.realpath(entry.path).rstrip("/") + "/")


def _local(path: str) -> SourceObject:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"source {path} is not a regular file")
    return SourceObject(os.path.abspath(path), status.st_size, None, status.st_mtime_ns)


def _remote(protocol: str, filesystem: Any, path: str, info: dict[str, Any]) -> SourceObject:
    uri = str(filesystem.unstrip_protocol(path))
    if protocol == "memory" or protocol in _S3:
        uri = f"{'s3' if protocol in _S3 else protocol}://{path.lstrip('/')}"
    etag = info.get("ETag") or info.get("etag")
    size = info.get("size")
    times = (info.get(key) for key in ("LastModified", "last_modified", "mtime", "updated", "created"))
    moment = next((time for time in times if time is not None), None)
    return SourceObject(uri, -1 if size is None else int(size), str(etag).strip('"') if etag else None, _ns(moment))


def _ns(moment: object) -> int | None:
    if isinstance(moment, datetime):
        since = moment.replace(tzinfo=moment.tzinfo or UTC) - _EPOCH
        return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
    # Some filesystems give seconds as a float in one place and a datetime in another: microseconds agree.
    return round(moment * 10**6) * 1000 if isinstance(moment, (int, float)) else None


def _nothing(pattern: str) -> str:
    protocol, filesystem, path = _resolve(pattern)
    if protocol in _S3:
        bucket = path.split("/", 1)[0]
        try:
            filesystem.call_s3("head_bucket", Bucket=bucket)
        except FileNotFoundError:
            return f"source {pattern}: the bucket {bucket} does not exist; check its name and AWS_ENDPOINT_URL"
    if any(sign in path for sign in _MAGIC):
        return f"source {pattern} matches nothing; check the path ('**' descends into folders)"
    return f"source {pattern} does not exist"


def _comparable(uri: str) -> str:
    if is_local(uri):
        return os.path.realpath(os.path.expanduser(uri.removeprefix("file://")))
    return "s3://" + uri.split("://", 1)[1] if _protocol(uri) in _S3 else uri


def _client_errors(uri: str) -> tuple[type[Exception], ...]:
    protocol = _protocol(uri)
    errors: tuple[type[Exception], ...] = (OSError,)
    if protocol in _S3:
        from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

        errors += (BotoCoreError, ClientError)
    if protocol in (*_S3, "http", "https"):
        from aiohttp import ClientError as HttpError

        errors += (HttpError,)
    return errors


def _named(uri: str, error: Exception) -> Exception:
    kind, text = type(error).__name__, str(error).strip()
    detail = (text.splitlines() or [kind])[0][:300]
    if isinstance(error, FileNotFoundError):
        return SourceError(f"source {uri} does not exist or was removed while it was read")
    if isinstance(error, PermissionError) or kind in ("NoCredentialsError", "PartialCredentialsError"):
        return SourceError(_refused(uri))
    if kind == "FileExpired":
        return SourceError(f"source {uri} changed while it was read; run again when its writer has finished")
    if is_transient(error) or (not is_local(uri) and getattr(error, "errno", None) in _PASSING):
        return TransientError(f"source {uri}: {kind}: {detail}; the server did not answer as expected")
    return SourceError(f"source {uri} cannot be read: {kind}: {detail}")


def _refused(uri: str) -> str:
    if _protocol(uri) in _S3:
        return (
            f"source {uri}: access refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and "
            "AWS_ENDPOINT_URL, and that they may list and read this bucket"
        )
    return f"source {uri}: permission denied; check who may read it"
