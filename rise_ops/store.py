"""The store: write-once objects under one root, on a local disk or in a bucket.

Every key is created exclusively and never changed. What a key's name says about its content (a hash) is
true, so two writers of the same key write the same bytes and the second simply finds it done. Nothing
here caches: the object store is the truth.

The same code runs on local folders and on S3 (through obstore); Google and Azure URLs go the same way but
are not tested. Credentials and endpoints come from the usual `AWS_*` variables and are never shown.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as obstore_errors

from rise_ops.errors import (
    ConfigError,
    CurationError,
    IntegrityError,
    MissingObjectError,
    StoreError,
    TransientError,
)
from rise_ops.hashing import canonical_json

if TYPE_CHECKING:
    import polars as pl
    from zarr.storage import ObjectStore

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
_MULTIPART_BYTES = 64 * 2**20
_RETRIES: dict[str, Any] = {"max_retries": 5}


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

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    @property
    def _backend(self) -> Any:
        if self._connected is None:
            self._connected = self._connect("")
        return self._connected

    def _connect(self, prefix: str, *, mkdir: bool = False) -> Any:
        root = self.url(prefix) if prefix else self.uri
        if not self.is_local:
            return obstore.store.from_url(root, **_remote_options(root))
        if mkdir:
            os.makedirs(root, exist_ok=True)
        elif not os.path.isdir(root):
            raise FileNotFoundError(root)
        return obstore.store.LocalStore(root)

    def _writable(self) -> Any:
        if self._connected is None:
            self._connected = self._connect("", mkdir=True)
        return self._connected

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

    def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether this call wrote it.

        Raises
        ------
        StoreError, TransientError
        """
        with named_errors(self, key):
            try:
                obstore.put(self._writable(), key, data, mode="create", use_multipart=False)
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
        if self.is_local and not os.path.isdir(self.uri):
            return
        with named_errors(self, prefix):
            for batch in obstore.list(self._backend, prefix=prefix.rstrip("/")):
                for item in batch:
                    yield str(item["path"]), int(item["size"])

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

        storage = None if self.is_local else _polars_options(self.uri)
        return pl.scan_parquet([self.url(key) for key in keys], storage_options=storage, glob=False, **options)

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
        """Remove objects. Only maintenance and the probe do this."""
        with named_errors(self, keys[0] if keys else ""):
            obstore.delete(self._backend, list(keys))


def _remote_options(uri: str) -> dict[str, Any]:
    options: dict[str, Any] = {"retry_config": _RETRIES}
    if uri.startswith(("s3://", "s3a://")):
        endpoint = _s3_endpoint()
        options["region"] = _s3_region()
        if endpoint:
            options["endpoint"] = endpoint
            options["client_options"] = {"allow_http": endpoint.startswith("http://")}
    return options


def _polars_options(uri: str) -> dict[str, str]:
    if not uri.startswith(("s3://", "s3a://")):
        return {}
    options = {"aws_region": _s3_region(), "aws_virtual_hosted_style_request": "false"}
    endpoint = _s3_endpoint()
    if endpoint:
        options |= {"aws_endpoint_url": endpoint, "aws_allow_http": str(endpoint.startswith("http://")).lower()}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        if os.environ.get(name):
            options[name.lower()] = os.environ[name]
    return options


def _s3_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _s3_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


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
    if "No space left" in text:
        return StoreError(f"no space left while writing {where}; free some and run again")
    if store.is_local or isinstance(error, _PERMANENT):
        return StoreError(f"{where}: {_first_line(text)}")
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
