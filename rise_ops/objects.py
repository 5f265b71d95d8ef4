"""Object records: what the bytes of one source object became.

    record = sha256 of canonical_json([object_sha, ingest_fingerprint])

    objects/<record>.parquet       block_id, block_row, source_row of every accepted row;
                                   reason, error, raw of every rejected row (block_id null)
    objects/<record>.rows.parquet  small objects only: canonical rows and source_row, for packing
    objects/<record>.json          totals and the blocks in order; written last: it exists when all of the above,
                                   and every block, was written
    objects/seen/<state>/<record>  empty: the S3 object with this size and ETag has, under these settings, this record;
                                   so one that was renamed or copied is not downloaded

A record knows no location: a renamed or copied object has the same one. An object below 256 rows that filled
no block is small: `rise_ops.packs` puts it into a block with others, so its rows have no block_id here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rise_ops.blocks import FORMAT_KEY, MIN_ROWS, RowBuffer, block_schema, parquet_bytes, read_stored
from rise_ops.errors import DamagedError, MissingObjectError
from rise_ops.hashing import canonical_json, fingerprint
from rise_ops.rows import RowFault, raw_text, well_formed
from rise_ops.shapes import RecordShape
from rise_ops.sources import SourceObject
from rise_ops.spool import spool
from rise_ops.store import Store

if TYPE_CHECKING:
    import polars as pl

RECORD_FORMAT = 1
_CONTENT_TAG = re.compile(r"^[0-9a-f]{32}(-\d+)?$")
_REJECTED_AT_ONCE = 1024
_MESSAGE_CHARACTERS = 500

_PLACES = pa.schema(
    [
        ("block_id", pa.string()),
        ("block_row", pa.uint32()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("error", pa.string()),
        ("raw", pa.string()),
    ],
    metadata={FORMAT_KEY: str(RECORD_FORMAT)},
)


@dataclass(frozen=True, slots=True)
class BlockCount:
    """A block and how much is in it."""

    block_id: str
    rows: int
    characters: int


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    """The completion record of an object."""

    record: str
    """Its id."""
    object_sha: str
    """SHA-256 of the object's stored bytes."""
    rows: int
    """Accepted rows."""
    rejected: int
    """Rejected rows."""
    characters: int
    """Characters of text in accepted rows."""
    size: int
    """Canonical bytes of accepted rows."""
    blocks: tuple[BlockCount, ...]
    """Blocks in source order; none for a small object."""
    fields: Mapping[str, str]
    """Source columns and their Arrow types ("json" where the format has none)."""
    small: bool
    """Whether the rows wait for packing."""
    crc32c: Mapping[str, int] = field(default_factory=dict)
    """Checksums of the stored `places` and, where it is small, `rows`."""

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        counts = {
            "blocks": [block.block_id for block in self.blocks],
            "block_rows": [block.rows for block in self.blocks],
            "block_characters": [block.characters for block in self.blocks],
        }
        return (
            {"format_version": RECORD_FORMAT}
            | asdict(self)
            | {"fields": dict(self.fields), "crc32c": dict(self.crc32c)}
            | counts
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ObjectRecord:
        """Inverse of `to_json`."""
        names = ("record", "object_sha", "rows", "rejected", "characters", "size", "fields", "small")
        counts = zip(value["blocks"], value["block_rows"], value["block_characters"], strict=True)
        blocks = tuple(BlockCount(*count) for count in counts)
        return cls(blocks=blocks, crc32c=value.get("crc32c", {}), **{name: value[name] for name in names})


@dataclass(frozen=True, slots=True)
class IngestedObject:
    """A source object and what it became: the reference that crosses task borders."""

    uri: str
    size: int
    etag: str | None
    mtime: int | None
    object_sha: str
    record: str
    rows: int
    rejected: int
    blocks: tuple[str, ...]
    small: bool
    characters: int
    reused: bool = False
    """Whether the record was there already."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> IngestedObject:
        """Inverse of `to_json`."""
        return cls(**{**value, "blocks": tuple(value["blocks"])})


def record_id(object_sha: str, ingest_fingerprint: str) -> str:
    """Id of the record of these bytes under these settings."""
    return fingerprint([object_sha, ingest_fingerprint])


def places_key(record: str) -> str:
    """Where a record's rows are in the store."""
    return f"objects/{record}.parquet"


def rows_key(record: str) -> str:
    """Where the canonical rows of a small object are."""
    return f"objects/{record}.rows.parquet"


def record_key(record: str) -> str:
    """Where the completion record is."""
    return f"objects/{record}.json"


def read_record(store: Store, record: str) -> ObjectRecord:
    """The completion record.

    Raises
    ------
    IntegrityError
        It is missing or damaged.
    """
    key = record_key(record)
    options: dict[str, Any] = {"shape": RecordShape, "holds": {"record": record}}
    try:
        return ObjectRecord.from_json(store.get_json(key, format_version=RECORD_FORMAT, **options))
    except MissingObjectError as error:
        raise DamagedError(f"{store.url(key)} is missing; run again", store.url(key)) from error


def remember(store: Store, source: SourceObject, record: str, ingest_fingerprint: str) -> None:
    """Note which record the bytes behind an ETag have."""
    folder = _seen_folder(source, ingest_fingerprint)
    if folder is not None:
        store.create(f"{folder}/{record}", b"")


def recall(store: Store, source: SourceObject, ingest_fingerprint: str) -> str | None:
    """The record that was noted for an object's size and ETag, wherever the object stood."""
    folder = _seen_folder(source, ingest_fingerprint)
    return None if folder is None else next(iter(store.children(folder)), None)


def _seen_folder(source: SourceObject, ingest_fingerprint: str) -> str | None:
    """Only where an ETag is made of the content: on S3, the MD5 of the object or of its parts."""
    if not source.uri.startswith("s3://") or _CONTENT_TAG.match(source.etag or "") is None:
        return None
    return f"objects/seen/{fingerprint([source.size, source.etag, ingest_fingerprint])}"


def write_rows(store: Store, record: str, rows: RowBuffer, source_rows: Sequence[int]) -> None:
    """Store the canonical rows of a small object."""
    columns = rows.columns() | {"source_row": list(source_rows)}
    schema = block_schema(("source_row", pa.int64()))
    store.create(rows_key(record), parquet_bytes(columns, schema, format_version=RECORD_FORMAT))


def read_rows_doc_ids(store: Store, record: str) -> pl.Series:
    """doc_ids of the rows of a small object, in order.

    Raises
    ------
    MissingObjectError, IntegrityError
    """
    key = rows_key(record)
    return read_stored(store, key, columns=["doc_id"], known_format=RECORD_FORMAT)["doc_id"]


class PlaceWriter:
    """Spools the rows of a record to a file, one row group a block, so that memory stays flat."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, _PLACES, compression="zstd")
        self._rejected: list[tuple[int, str, str, str]] = []

    def accept(self, block_id: str | None, source_rows: Sequence[int]) -> None:
        """The rows of one block in order, or of a small object."""
        count = len(source_rows)
        blocks = pa.array([block_id], pa.string()).take(pa.array([0] * count, pa.int32()))
        rows = pa.array(range(count), pa.uint32()) if block_id is not None else pa.nulls(count, pa.uint32())
        empty = pa.nulls(count, pa.string())
        self._write([blocks, rows, pa.array(source_rows, pa.int64()), empty, empty, empty])

    def reject(self, source_row: int, *, where: str, fault: RowFault, raw: bytes | str) -> None:
        """One rejected row; `where` is its place for people, such as "line 7"."""
        reason = well_formed(f"{where} {fault.reason}"[:_MESSAGE_CHARACTERS])
        self._rejected.append((source_row, reason, fault.error, raw_text(raw)))
        if len(self._rejected) >= _REJECTED_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        count = len(self._rejected)
        if not count:
            return
        source_rows, reasons, errors, raws = zip(*self._rejected, strict=True)
        nothing = [pa.nulls(count, pa.string()), pa.nulls(count, pa.uint32())]
        texts = [pa.array(column, pa.string()) for column in (reasons, errors, raws)]
        self._write([*nothing, pa.array(source_rows, pa.int64()), *texts])
        self._rejected.clear()

    def _write(self, columns: list[Any]) -> None:
        self._writer.write_table(pa.Table.from_arrays(columns, schema=_PLACES), row_group_size=max(1, len(columns[0])))


@contextmanager
def spooled_places() -> Iterator[tuple[PlaceWriter, Path]]:
    """A `PlaceWriter` on a temporary file, and the file."""
    with spool() as folder:
        path = folder / "places.parquet"
        writer = PlaceWriter(path)
        try:
            yield writer, path
        finally:
            writer.close()


def is_small(rows: int, blocks: int) -> bool:
    """Whether an object waits for packing: it filled no block and is below the smallest one."""
    return blocks == 0 and rows < MIN_ROWS


def canonical_raw(value: Mapping[str, Any]) -> str:
    """A table's row as text for the report."""
    try:
        return canonical_json(value)
    except (ValueError, RecursionError):
        return str(dict(value))
