"""Where rows come from: listing and opening source objects on any fsspec URL.

A source is a glob: a local path, `s3://bucket/key`, `memory://…` or any other URL that fsspec opens. What
identifies the state of an object without reading it is its size with its ETag, or, where there is none
(local files), with its modification time in nanoseconds. Listings are never cached. S3 endpoint and
credentials come from the usual `AWS_*` variables; no message shows them.

Requests are repeated inside the budget of `rise_ops.retry`. An object that ends before its listed size is never
taken for whole, whatever the server says about its length.

This module does not know formats (`rise_ops.readers`) and does not interpret bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from rise_ops.connections import s3fs_options
from rise_ops.counters import count
from rise_ops.errors import ConfigError, SourceError, TransientError, is_transient
from rise_ops.folders import MAGIC, inode_of, matching_files, open_regular, regular_status
from rise_ops.redaction import disarm
from rise_ops.retry import retried
from rise_ops.spool import spool

CHUNK_BYTES = 1 << 20
"""Bytes read from a source at a time."""

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
    inode: str | None = field(default=None, compare=False)
    """Which file of this machine it is. No part of its state: a copy that is moved into its place is a new one."""

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
        for item in retried(partial(_found, pattern)):
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
    return retried(partial(_stat, uri))


def refuse_changed(source: SourceObject) -> None:
    """Raise SourceError where an object is not, or not certainly, what its listing showed."""
    now = stat_object(source.uri)
    unknown = source.etag is None and source.mtime is None
    if now.size != source.size if unknown else not now.same_state(source):
        raise SourceError(f"source {source.uri} changed while it was read; run again when its writer has finished")


def _stat(uri: str) -> SourceObject:
    with named_errors(uri):
        protocol, filesystem, path = _resolve(uri)
        if protocol in _LOCAL:
            return _local(path)
        return _remote(protocol, filesystem, path, filesystem.info(path))


class SourceFile:
    """An object's bytes from its beginning. What passes is tried again; an end in the wrong place is an error."""

    def __init__(self, uri: str, file: Any, listed: SourceObject | None) -> None:
        self._uri = uri
        self._file = file
        self._listed = listed
        size = getattr(file, "size", None) if listed is None else listed.size
        self._size = -1 if size is None or (listed is None and is_local(uri)) else int(size)
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`; none at the end.

        Raises
        ------
        SourceError, TransientError
        """
        # without a size, an end after a failure could not be told from the object's
        data = retried(partial(self._read, size)) if self._size >= 0 else self._read(size)
        self._count += len(data)
        count("source_read_bytes", len(data))
        if (not data or size < 0) and self._size not in (-1, self._count):
            self._refuse_end()
        return data

    def _read(self, size: int) -> bytes:
        with named_errors(self._uri):
            return bytes(self._file.read(size))

    def _refuse_end(self) -> None:
        if self._listed is not None:
            refuse_changed(self._listed)
        raise TransientError(
            f"source {self._uri} ended after {self._count:,} of {self._size:,} bytes; the server did not answer as "
            "expected"
        )


@contextmanager
def open_object(uri: str, *, listed: SourceObject | None = None) -> Iterator[SourceFile]:
    """The object's bytes as a file, which must be as long as `listed` says, or the server when it is opened."""
    with retried(partial(_opened, uri, listed)) as file:
        yield SourceFile(uri, file, listed)


def _opened(uri: str, listed: SourceObject | None) -> Any:
    with named_errors(uri):
        protocol, filesystem, path = _resolve(uri)
        options: dict[str, Any] = {"block_size": 4 * CHUNK_BYTES, "cache_type": "readahead"} if protocol in _S3 else {}
        if protocol in _LOCAL:
            return open_regular(path, inode=None if listed is None else listed.inode)
        return filesystem.open(path, "rb", **options)


def hash_object(uri: str, *, listed: SourceObject | None = None) -> str:
    """SHA-256 of the object's bytes, in hexadecimal; of the file that was listed, where that is known."""
    digest = hashlib.sha256()
    with open_object(uri, listed=listed) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def local_copy(source: SourceObject, *, spooled: bool = False) -> Iterator[tuple[Path, str]]:
    """A local path with the object's bytes, and their SHA-256.

    A remote object is spooled to a temporary file; a local one only if `spooled` asks for it. Otherwise the path
    of a local one is that of the file as it was opened, whatever its name means by then.
    """
    if is_local(source.uri) and not spooled:
        with _opened(source.uri, source) as held:
            count("source_read_bytes", os.fstat(held.fileno()).st_size)
            yield Path(f"/dev/fd/{held.fileno()}"), hashlib.file_digest(held, "sha256").hexdigest()
        return
    digest = hashlib.sha256()
    with spool() as folder:
        path_of_copy = folder / "object"
        with open_object(source.uri, listed=source) as file, path_of_copy.open("wb") as copy:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
        yield path_of_copy, digest.hexdigest()


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
        disarm(error)
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
        filesystem = fsspec.filesystem(protocol or "file", **(s3fs_options() if protocol in _S3 else {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"source {uri}: cannot open '{protocol}://' ({error})") from error
    if protocol in _S3:
        filesystem.retries = 1  # its own tries have no jitter and multiply with those of its client
    return protocol, filesystem, str(filesystem._strip_protocol(uri))


def _found(pattern: str) -> list[SourceObject]:
    with named_errors(pattern):
        matches = _matches(pattern)
        if not matches:
            raise SourceError(_nothing(pattern))
        return matches


def _matches(pattern: str) -> list[SourceObject]:
    protocol, filesystem, path = _resolve(pattern)
    local = protocol in _LOCAL
    kind = _kind(filesystem, path)
    if kind == "file":  # also a name that happens to hold glob characters
        return [_stat(pattern)]
    if not any(sign in path for sign in MAGIC):
        if kind == "directory":
            raise SourceError(f"source {pattern} is a folder; say which files, such as {pattern.rstrip('/')}/*.jsonl")
        return [_local(path)] if local and os.path.lexists(path) else []
    if any("**" in part and part != "**" for part in path.split("/")):
        raise ConfigError(f"source {pattern}: '**' stands for folders and must be between slashes, as in a/**/*.jsonl")
    if local:
        return [_local(name) for name in matching_files(path)]
    found = filesystem.glob(path, detail=True)
    files = [_remote(protocol, filesystem, name, info) for name, info in found.items() if info["type"] != "directory"]
    for item in files:
        _refuse_detour(item.uri)
    return files


def _refuse_detour(uri: str) -> None:
    """Raise SourceError for a listed name that a client or server could take for a way to another object."""
    path = uri.split("://", 1)[-1]
    if _protocol(uri) in ("http", "https"):
        path = unquote(unquote(path))
    if any(part in (".", "..") for part in path.split("/")):
        raise SourceError(f"source {uri}: a name with '.' or '..' between slashes is ambiguous; copy it elsewhere")


def _kind(filesystem: Any, path: str) -> str:
    """What is at a path. fsspec's own `isfile` takes every failure of a server for a no."""
    try:
        return str(filesystem.info(path)["type"])
    except FileNotFoundError:
        return ""


def _local(path: str) -> SourceObject:
    status = regular_status(path)
    return SourceObject(os.path.abspath(path), status.st_size, None, status.st_mtime_ns, inode_of(status))


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
        except PermissionError:
            pass  # who may list below a prefix may still not ask for the bucket
    if any(sign in path for sign in MAGIC):
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
    if _protocol(uri) in _S3 and getattr(error, "errno", None) == errno.EINVAL and detail.endswith("Bad Request"):
        return SourceError(_refused(uri))  # an answer to HEAD has no body to say more
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
