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

import mmap
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as obstore_errors

from rise_ops import retry
from rise_ops.client_errors import REFUSED, first_line, store_error
from rise_ops.connections import obstore_options, polars_options
from rise_ops.counters import count
from rise_ops.documents import document, sealed
from rise_ops.errors import (
    ConfigError,
    IntegrityError,
    MissingObjectError,
    StoreError,
    TransientError,
)
from rise_ops.keys import refuse_key
from rise_ops.redaction import disarm
from rise_ops.spool import is_full

if TYPE_CHECKING:
    import polars as pl
    from zarr.storage import ObjectStore

_SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
_MULTIPART_BYTES = 64 * 2**20
_PIECE_BYTES = 2**20
_RANGE_BYTES = 16 * 2**20

T = TypeVar("T")

STORE_FOLDERS = frozenset(
    ("alive", "attributions", "blocks", "comparisons", "corpora", "damage", "exports", "indexes", "loops", "objects",
     "quarantine", "runs", "scores", "snapshots", "targets", "tunings")
)  # fmt: skip
"""What lies at the root of a store."""


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

    def _connect(self, prefix: str, *, mkdir: bool = False, tries: int = 1) -> Any:
        """A backend; unless `tries` says otherwise it asks once, because what fails is repeated here (`_asked`)."""
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

    def _asked(self, key: str, request: Callable[[], T]) -> T:
        """The answer to a request, repeated within the budget, with our errors."""

        def ask() -> T:
            count("requests")
            with named_errors(self, key):
                return request()

        return retry.retried(ask)

    def url(self, key: str) -> str:
        """Full URI of a key: what other tools open."""
        refuse_key(self.uri, key)
        return f"{self.uri}/{key}"

    def get(self, key: str) -> bytes:
        """All bytes of an object.

        Raises
        ------
        MissingObjectError, StoreError, TransientError
        """
        return bytes(self.get_buffer(key))

    def get_buffer(self, key: str, *, size: int | None = None) -> memoryview:
        """All bytes of an object, which are `size` where that is known, as they arrived, without a copy."""
        return self._asked(key, lambda: self._sized(key, self._whole(key), size))

    def _whole(self, key: str) -> Any:
        """All bytes; of a local file by the system's own read, which is twice as fast as the client's."""
        if not self.is_local:
            return obstore.get(self._backend, key).bytes()
        with open(self.url(key), "rb", buffering=0) as file:
            return file.read()

    def pieces(self, key: str, *, size: int | None = None) -> Iterator[memoryview]:
        """All bytes of an object, which are `size` where that is known, in consecutive pieces.

        A piece of a local file is small enough to stay in a processor's cache, and the next one overwrites it: fresh
        memory takes several times as long as the reading.

        Raises
        ------
        MissingObjectError, StoreError, TransientError
        """
        if self.is_local:
            yield from self._local_pieces(key)
            return
        if size is None:
            size = self.size(key)
        if not size or size <= _RANGE_BYTES:
            yield self.get_buffer(key, size=size or None)
            return
        for start in range(0, size, _RANGE_BYTES):
            yield self.get_range(key, start, min(_RANGE_BYTES, size - start))

    def _local_pieces(self, key: str) -> Iterator[memoryview]:
        room = memoryview(bytearray(_PIECE_BYTES))
        count("requests")
        with named_errors(self, key), open(self.url(key), "rb", buffering=0) as file:
            while length := file.readinto(room):
                count("store_read_bytes", length)
                yield room[:length]

    def mapped(self, key: str) -> memoryview:
        """All bytes of an object on a disk, where the system has or will have them: nothing is copied.

        Objects are written once and never cut, so what is mapped stays; a disk that fails meanwhile ends the process.
        Where a file system maps nothing, the bytes are read.

        Raises
        ------
        MissingObjectError, StoreError
        """
        with named_errors(self, key), open(self.url(key), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            count("requests")
            count("store_read_bytes", size)
            if not size:
                return memoryview(b"")
            try:
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except OSError:
                return memoryview(file.read())

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        """Some bytes of an object; else like `get`."""
        return self._asked(
            key, lambda: self._sized(key, obstore.get_range(self._backend, key, start=start, length=length), length)
        )

    def _sized(self, key: str, data: Any, size: int | None) -> memoryview:
        buffer = memoryview(data)
        count("store_read_bytes", len(buffer))
        if size is not None and len(buffer) != size and not self.is_local:
            raise TransientError(f"{self.url(key)}: {len(buffer):,} bytes were sent, not {size:,}")
        return buffer

    def create(self, key: str, data: bytes | memoryview) -> bool:
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

    def _put(self, key: str, data: bytes | memoryview) -> bool:
        count("requests")
        with named_errors(self, key):
            try:
                obstore.put(self._writable(), key, data, mode="create", use_multipart=False)
            except (obstore_errors.AlreadyExistsError, obstore_errors.PreconditionError):
                return False
        count("store_written_bytes", len(data))
        return True

    def create_from_file(self, key: str, path: Path) -> bool:
        """Write a local file as an object unless it exists; streams, so memory stays flat."""
        if path.stat().st_size <= _MULTIPART_BYTES:
            return self.create(key, path.read_bytes())
        if self.exists(key):
            return False
        with named_errors(self, key):  # an upload in parts becomes visible whole, at its end; its client repeats parts
            obstore.put(self._connect("", mkdir=True, tries=retry.BUDGET.tries), key, path)
        count("requests")
        count("store_written_bytes", path.stat().st_size)
        return True

    def create_json(self, key: str, value: Any) -> bool:
        """Write a JSON document, sealed with a checksum, unless the key exists. Returns whether this call wrote it."""
        return self.create(key, sealed(value))

    def get_json(
        self,
        key: str,
        *,
        format_version: int | None = None,
        shape: type[Any] | None = None,
        holds: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Read a JSON document that is what the options of `rise_ops.documents.document` say.

        Raises
        ------
        MissingObjectError, IntegrityError, StoreError, TransientError
        """
        options: dict[str, Any] = {"format_version": format_version, "shape": shape, "holds": holds}
        return self.checked(key, lambda: document(self.get(key), where=self.url(key), **options))

    def exists(self, key: str) -> bool:
        """Whether an object is there."""
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        """Size of an object in bytes, or None where there is none."""
        try:
            return int(self._asked(key, lambda: obstore.head(self._backend, key)["size"]))
        except MissingObjectError:
            return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Keys below a folder-like prefix and their sizes, in no particular order."""
        for key, size, _ in self.list_times(prefix):
            yield key, size

    def list_times(self, prefix: str) -> Iterator[tuple[str, int, datetime]]:
        """Like `list`, with the time at which each object was written, by the server's clock."""
        if self.is_local and not os.path.isdir(self.uri):
            return
        last: str | None = None
        stream: Any = None

        def ask() -> Any:
            nonlocal stream
            count("requests")
            try:
                with named_errors(self, prefix):
                    stream = stream or iter(obstore.list(self._backend, prefix=prefix.rstrip("/"), offset=last))
                    return next(stream, None)
            except TransientError:
                stream = None  # a bucket lists in order: the next try goes on after the last key
                raise

        while (batch := retry.retried(ask)) is not None:
            for item in batch:
                last = str(item["path"])
                yield last, int(item["size"]), item["last_modified"]

    def children(self, prefix: str) -> Sequence[str]:
        """Names directly below a folder-like prefix, sorted."""
        if self.is_local and not os.path.isdir(self.uri):
            return []
        found = self._asked(prefix, lambda: obstore.list_with_delimiter(self._backend, prefix.rstrip("/")))
        names = [str(path) for path in found["common_prefixes"]] + [str(item["path"]) for item in found["objects"]]
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in names})

    def zarr(self, key: str, *, read_only: bool = False) -> ObjectStore[Any]:
        """The prefix `key` as a Zarr store of its own, in which a written chunk or node stays as it is."""
        from rise_ops.write_once import WriteOnceStore

        with named_errors(self, key):
            backend = self._connect(key, mkdir=not read_only, tries=retry.BUDGET.tries)
            return WriteOnceStore(backend, read_only=read_only)

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
            disarm(error)
            raise store_error(error, root=self.uri, where=self.url(key)) from error

    def collected(self, key: str, read: Callable[[], T]) -> T:
        """Result of `read`, which collects frames of `scan_parquet`, as `checked` and with errors that name `key`.

        Raises
        ------
        MissingObjectError, IntegrityError, StoreError, TransientError
        """

        def attempt() -> T:
            with self.scanning(key):
                return read()

        return self.checked(key, attempt)

    def checked(self, key: str, read: Callable[[], T]) -> T:
        """Result of `read`, which reads `key`; over a network, where it finds damage, that of a second call.

        What passes is waited for within the budget, where the requests in `read` have not done so themselves.

        Raises
        ------
        IntegrityError
            The second time too.
        TransientError
            The second time too, and the server sends fewer bytes than it says that there are.
        """
        try:
            return retry.retried(read)
        except IntegrityError:
            if self.is_local:
                raise
        try:
            return retry.retried(read)
        except IntegrityError:
            size = self.size(key)
            if size is not None:
                self.get_buffer(key, size=size)
            raise

    def require(self) -> None:
        """Raise ConfigError where nothing looks like a store: a mistyped path must not pass for an empty one."""
        if not set(self.children("")) & STORE_FOLDERS:
            raise ConfigError(f"there is no store at {self.uri}; check the path")

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
        for key in keys:
            refuse_key(self.uri, key)
        if not self.is_local:
            try:
                self._asked(keys[0] if keys else "", lambda: obstore.delete(self._backend, list(keys)))
            except StoreError as error:
                if REFUSED not in str(error):
                    raise
                raise StoreError(f"{error}, and remove what is there (deployments/s3-policy)") from error
            return
        with named_errors(self, keys[0] if keys else ""):
            for key in keys:
                with suppress(FileNotFoundError, obstore_errors.NotFoundError):
                    obstore.delete(self._backend, key)


@contextmanager
def named_errors(store: Store, key: str) -> Iterator[None]:
    """Turn the client's errors into ours, and let no wrong key pass."""
    refuse_key(store.uri, key)
    try:
        yield
    except (obstore_errors.BaseError, OSError) as error:
        disarm(error)
        raise store_error(error, root=store.uri, where=store.url(key)) from error


@contextmanager
def zarr_errors(store: Store, key: str) -> Iterator[None]:
    """`named_errors` for zarr, which makes a ValueError of a description or a chunk that ends too early."""
    with named_errors(store, key):
        try:
            yield
        except ValueError as error:
            raise IntegrityError(
                f"{store.url(key)} is damaged ({first_line(str(error))}); delete it and run again"
            ) from error


def _scan_errors() -> tuple[type[Exception], ...]:
    """What collecting a scan may raise."""
    import polars as pl

    return (OSError, pl.exceptions.PolarsError)
