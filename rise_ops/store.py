"""The store: write-once objects under one root, on a local disk or in a bucket.

Every key is created exclusively and never changed. What a key's name says about its content (a hash) is
true, so two writers of the same key write the same bytes and the second simply finds it done. Nothing
here caches: the object store is the truth.

The same code runs on local folders and on S3 (through obstore); Google and Azure URLs go the same way but
are not tested. Credentials and endpoints come from the usual `AWS_*` variables and are never shown.

Faults of the network are retried inside the budget of `rise_ops.retry`, and come out as TransientError when it
is spent. What parses wrongly or misses its checksum is read a second time over a network before it counts as
damaged (`Store.checked`): a body may have been cut on its way.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as obstore_errors

from rise_ops import retry
from rise_ops.connections import obstore_options, polars_options
from rise_ops.errors import (
    ConfigError,
    CurationError,
    IntegrityError,
    MissingObjectError,
    StoreError,
    TransientError,
)
from rise_ops.hashing import canonical_json
from rise_ops.spool import is_full

if TYPE_CHECKING:
    import polars as pl
    from zarr.storage import ObjectStore

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
_MULTIPART_BYTES = 64 * 2**20

T = TypeVar("T")


class Store:
    """Write-once objects under a root URI.

    Parameters
    ----------
    uri
        A folder or `s3://bucket/prefix`.

    Raises
    ------
    ConfigError
        The scheme is not one that can hold a store.
    """

    def __init__(self, uri: str) -> None:
        scheme = urlsplit(uri).scheme if "://" in uri else ""
        if scheme == "file":
            uri, scheme = uri.removeprefix("file://"), ""
        if scheme and scheme not in _SCHEMES:
            raise ConfigError(f"store {uri}: cannot keep a store on '{scheme}://'; use a folder or s3://bucket/prefix")
        self.is_local = not scheme
        self.uri = os.path.abspath(os.path.expanduser(uri)) if self.is_local else uri.rstrip("/")
        self._connected: Any = None
        self._connected_once: Any = None

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def _backend(self) -> Any:
        if self._connected is None:
            self._connected = self._connect("")
        return self._connected

    def _connect(self, prefix: str, *, mkdir: bool = False, tries: int | None = None) -> Any:
        root = self.url(prefix) if prefix else self.uri
        if not self.is_local:
            return obstore.store.from_url(root, **obstore_options(root, tries=tries))
        if mkdir:
            os.makedirs(root, exist_ok=True)
        elif not os.path.isdir(root):
            raise FileNotFoundError(root)
        return obstore.store.LocalStore(root)

    def _writable(self) -> Any:
        if self._connected is None:
            self._connected = self._connect("", mkdir=True)
        return self._connected

    def _trying_once(self) -> Any:
        """The backend for creates: the client must not try those again by itself, see `create`."""
        if self.is_local:
            return self._writable()
        if self._connected_once is None:
            self._connected_once = self._connect("", tries=1)
        return self._connected_once

    def url(self, key: str) -> str:
        """Full URI of a key: what other tools open."""
        return f"{self.uri}/{key}"

    def get(self, key: str) -> bytes:
        """All bytes of an object.

        Raises
        ------
        MissingObjectError, StoreError, TransientError
        """
        with named_errors(self, key):
            return bytes(obstore.get(self._backend, key).bytes())

    def get_buffer(self, key: str) -> memoryview:
        """All bytes of an object as they arrived, without a copy; else like `get`."""
        with named_errors(self, key):
            return memoryview(obstore.get(self._backend, key).bytes())

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """Some bytes of an object; else like `get`."""
        with named_errors(self, key):
            data = memoryview(obstore.get_range(self._backend, key, start=start, length=length))
        if len(data) != length and not self.is_local:
            raise TransientError(f"{self.url(key)}: of {length:,} bytes from {start:,} on, {len(data):,} were sent")
        return data

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether this call wrote it.

        The answer to a write may be lost although it was done. Then the next try finds the object there, and its
        bytes tell whether it is this call's.

        Raises
        ------
        StoreError, TransientError
        """
        in_doubt = False

        def put() -> bool:
            nonlocal in_doubt
            try:
                return self._put(key, data) or (in_doubt and self.get(key) == data)
            except TransientError:
                in_doubt = True
                raise

        return retry.retried(put)

    def _put(self, key: str, data: bytes) -> bool:
        with named_errors(self, key):
            try:
                obstore.put(self._trying_once(), key, data, mode="create", use_multipart=False)
            except (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError):
                return False
            return True

    def create_from_file(self, key: str, path: Path) -> bool:
        """Write a local file as an object unless it exists; streams, so memory stays flat."""
        if path.stat().st_size <= _MULTIPART_BYTES:
            return self.create(key, path.read_bytes())
        if self.exists(key):
            return False
        with named_errors(self, key):
            obstore.put(self._writable(), key, path)  # a multipart upload becomes visible whole, at its end
        return True

    def create_json(self, key: str, value: Any) -> bool:
        """Write a JSON document unless the key exists. Returns whether this call wrote it."""
        return self.create(key, (canonical_json(value) + "\n").encode("utf-8"))

    def get_json(self, key: str, *, format_version: int | None = None) -> dict[str, Any]:
        """Read a JSON document, refusing formats newer than `format_version`.

        Raises
        ------
        MissingObjectError, IntegrityError, StoreError, TransientError
        """
        return self.checked(lambda: self._json(key, format_version))

    def _json(self, key: str, format_version: int | None) -> dict[str, Any]:
        try:
            value = json.loads(self.get(key))
        except ValueError as error:
            raise IntegrityError(f"{self.url(key)} is not valid JSON ({error}); delete it and run again") from error
        if not isinstance(value, dict):
            raise IntegrityError(f"{self.url(key)} does not hold a JSON object; delete it and run again")
        if format_version is not None and int(value.get("format_version", 0)) > format_version:
            raise IntegrityError(
                f"{self.url(key)} has format version {value['format_version']}, this program reads up to "
                f"{format_version}; upgrade it"
            )
        return value

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Size of an object in bytes, or None where there is none."""
        with named_errors(self, key):
            try:
                return int(obstore.head(self._backend, key)["size"])
            except (obstore_errors.NotFoundError, FileNotFoundError):
                return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys below a folder-like prefix and their sizes, in no particular order."""
        for key, size, _ in self.list_times(prefix):
            yield key, size

    def list_times(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """Like `list`, with the time at which each object was written, by the server's clock."""
        if self.is_local and not os.path.isdir(self.uri):
            return
        with named_errors(self, prefix):
            for batch in obstore.list(self._backend, prefix=prefix.rstrip("/")):
                for item in batch:
                    yield str(item["path"]), int(item["size"]), item["last_modified"]

    def children(self, prefix: str) -> Sequence[str]:
        """Names directly below a folder-like prefix, sorted."""
        if self.is_local and not os.path.isdir(self.uri):
            return []
        with named_errors(self, prefix):
            found = obstore.list_with_delimiter(self._backend, prefix.rstrip("/"))
        names = [str(path) for path in found["common_prefixes"]] + [str(item["path"]) for item in found["objects"]]
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names})

    def zarr(self, key: str, *, read_only: bool = False) -> ObjectStore[Any]:
        """The prefix `key` as a Zarr store of its own, in which a written chunk or node stays as it is."""
        from rise_ops.write_once import WriteOnceStore

        with named_errors(self, key):
            return WriteOnceStore(self._connect(key, mkdir=not read_only), read_only=read_only)

    def scan_parquet(self, keys: Sequence[str], **options: Any) -> pl.LazyFrame:
        """Parquet objects as one Polars LazyFrame; nothing is read until it is collected."""
        import polars as pl

        storage = None if self.is_local else polars_options(self.uri)
        return pl.scan_parquet([self.url(key) for key in keys], storage_options=storage, glob=False, **options)

    @contextmanager
    def scanning(self, key: str) -> Iterator[None]:
        """Name what collecting a frame of `scan_parquet` raises, as `named_errors` does for our own requests.

        A full disk under a temporary file that it is written to is left to `rise_ops.spool`.
        """
        try:
            yield
        except _scan_errors() as error:
            if is_full(error):
                raise
            raise _named(error, self, self.url(key)) from error

    def collected(self, key: str, read: Callable[[], T]) -> T:
        """Result of `read`, which collects frames of `scan_parquet`, as `checked` and with errors that name `key`.

        Raises
        ------
        MissingObjectError, IntegrityError, StoreError, TransientError
        """

        def attempt() -> T:
            with self.scanning(key):
                return read()

        return self.checked(attempt)

    def checked(self, read: Callable[[], T]) -> T:
        """Result of `read`; over a network, where it finds damage, that of a second call.

        Raises
        ------
        IntegrityError
            The second time too.
        """
        try:
            return read()
        except IntegrityError:
            if self.is_local:
                raise
        return read()

    def probe(self) -> None:
        """Check that the store can be written and keeps exclusive creates.

        Raises
        ------
        StoreError
            It is read-only, refuses the credentials, or lets two writers create one key.
        """
        key = f".probe/{uuid.uuid4().hex}"
        first, second = self.create(key, b"1"), self.create(key, b"2")
        self.delete([key])
        if not first or second:
            raise StoreError(
                f"store {self.uri} let two writers create the same object; runs would overwrite each other. "
                "Use a server that honours conditional writes (If-None-Match)"
            )

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; one that is not there is gone already. Only maintenance, signs of life and probes do this."""
        with named_errors(self, keys[0] if keys else ""):
            if not self.is_local:
                obstore.delete(self._backend, list(keys))
                return
            for key in keys:
                with suppress(FileNotFoundError, obstore_errors.NotFoundError):
                    obstore.delete(self._backend, key)


_REFUSALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccessDenied")
_REFUSALS_LOCAL = ("Read-only file system", "Permission denied", "Operation not permitted")
_PERMANENT = (
    obstore_errors.InvalidPathError,
    obstore_errors.NotSupportedError,
    obstore_errors.UnknownConfigurationKeyError,
)


@contextmanager
def named_errors(store: Store, key: str) -> Iterator[None]:
    """Turn the client's errors into ours."""
    try:
        yield
    except (obstore_errors.BaseError, OSError) as error:
        raise _named(error, store, store.url(key)) from error


@contextmanager
def zarr_errors(store: Store, key: str) -> Iterator[None]:
    """`named_errors` for zarr, which makes a ValueError of a description or a chunk that ends too early."""
    with named_errors(store, key):
        try:
            yield
        except ValueError as error:
            raise IntegrityError(
                f"{store.url(key)} is damaged ({_first_line(str(error))}); delete it and run again"
            ) from error


def _scan_errors() -> tuple[type[Exception], ...]:
    """What collecting a scan may raise."""
    import polars as pl

    return (OSError, pl.exceptions.PolarsError)


def _named(error: Exception, store: Store, where: str) -> CurationError:
    """The error of ours that a client's error means; the clients' texts can be long and are cut."""
    text = str(error)
    if "NoSuchBucket" in text:
        return StoreError(f"the bucket of {store.uri} does not exist; create it first")
    if isinstance(error, (obstore_errors.NotFoundError, FileNotFoundError)):
        return MissingObjectError(f"{where} is not in the store")
    refused = (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError, PermissionError)
    if isinstance(error, refused) or any(mark in text for mark in (_REFUSALS_LOCAL if store.is_local else _REFUSALS)):
        return StoreError(_refusal(store, where))
    if is_full(error):
        return StoreError(f"no space left while writing {where}; free some and run again")
    if not isinstance(error, (obstore_errors.BaseError, OSError)):  # Polars' own: what it got is not what it wants
        return IntegrityError(f"{where} is damaged ({_first_line(text)}); `curate verify --deep` tells what is")
    if store.is_local or isinstance(error, _PERMANENT):
        return StoreError(f"{where}: {_first_line(text)}")
    if "400 Bad Request" in text and "RequestTimeout" not in text:  # an answer to HEAD has no body to say more
        return StoreError(_refusal(store, where))
    return TransientError(f"{where}: {_first_line(text)}; the server did not answer as expected")


def _refusal(store: Store, where: str) -> str:
    if store.is_local:
        return f"{where} cannot be accessed: permission denied or read-only; check the folder's owner and mount"
    return (
        f"{where}: access refused; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and "
        "AWS_ENDPOINT_URL, and that they may read and write this prefix"
    )


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:300] if text.strip() else "unknown error"
