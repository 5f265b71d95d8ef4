"""Blocks: runs of canonical rows, cut by content and named by content.

A block ends at a row whose `doc_id`, read as an integer, has its low 11 bits zero (every 2,048th row on
average), but holds at least 256 and at most 4,096 rows. A block of long rows ends before: from 4 MiB on, at a row
whose `doc_id`, modulo 4 MiB, is below the row's size (once in 4 MiB on average), and at 16 MiB (`MAX_BYTES`) in any
case, so that it fits in memory. Cutting starts afresh at each source object. Inserting, changing or removing a row
therefore touches one block or two, not all that follow.

    block_id = sha256 over the lines  doc_id TAB json(text_field) TAB meta NEWLINE  of its rows, in order

`blocks/<block_id>.parquet` (zstd, one row group) has the columns doc_id, text, prompt, text_field, meta, and
no source location: equal content gives the same block wherever it was found.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring as _quoted
from typing import TYPE_CHECKING, Any

from rise_ops.errors import DamagedError, IntegrityError, MissingObjectError
from rise_ops.rows import CanonicalRow
from rise_ops.store import Store

if TYPE_CHECKING:
    import polars as pl

BLOCK_FORMAT = 1
MIN_ROWS = 256
MAX_ROWS = 4096
MAX_BYTES = 16 * 2**20
"""Canonical content of a block, in bytes, at which it ends."""

_COLUMNS = ("doc_id", "text", "prompt", "text_field", "meta")
_TYPES = dict.fromkeys((*_COLUMNS, "block_id", "object_sha"), "String") | {
    "rows": "UInt32",
    "characters": "UInt64",
    "block_row": "UInt32",
    "source_row": "Int64",
}
"""Types that columns have in every table of the store."""

_MASK = 2047
_BATCH_ROWS = 64  # a page ends between batches: with Arrow's 1,024 rows, one of long texts would be as large as all
_LARGE_BYTES = MAX_BYTES // 4
_HIGH_DIGITS = 12
_LOW_DIGITS = 3  # of the hexadecimal doc_id: twelve bits, of which eleven are looked at

FORMAT_KEY = "rise_ops.format_version"
"""Key of the format version in a Parquet file's metadata."""


def ends_block(doc_id: str, *, rows: int, size: int, row_size: int = 0) -> bool:
    """Whether a block of `rows` rows and `size` bytes ends with the row `doc_id`, which has `row_size` of them."""
    if rows >= MAX_ROWS or size >= MAX_BYTES:
        return True
    if size >= _LARGE_BYTES and int(doc_id[:_HIGH_DIGITS], 16) % _LARGE_BYTES < row_size:
        return True
    return rows >= MIN_ROWS and int(doc_id[-_LOW_DIGITS:], 16) & _MASK == 0


@dataclass(slots=True)
class RowBuffer:
    """Canonical rows that are becoming a block."""

    doc_id: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt: list[str | None] = field(default_factory=list)
    text_field: list[str | None] = field(default_factory=list)
    meta: list[str] = field(default_factory=list)
    size: int = 0
    """Canonical bytes."""
    characters: int = 0
    """Characters of text."""

    def __len__(self) -> int:
        return len(self.doc_id)

    def append(self, row: CanonicalRow) -> None:
        """Add one row."""
        self.doc_id.append(row.doc_id)
        self.text.append(row.text)
        self.prompt.append(row.prompt)
        self.text_field.append(row.text_field)
        self.meta.append(row.meta_json)
        self.size += row.size
        self.characters += len(row.text)

    def block_id(self) -> str:
        """SHA-256 over the canonical content of the rows, in order."""
        digest = hashlib.sha256()
        for doc_id, name, meta in zip(self.doc_id, self.text_field, self.meta, strict=True):
            digest.update(f"{doc_id}\t{_json(name)}\t{meta}\n".encode())
        return digest.hexdigest()

    def columns(self) -> dict[str, Any]:
        """The rows as named columns."""
        return {name: getattr(self, name) for name in ("doc_id", "text", "prompt", "text_field", "meta")}


def block_key(block_id: str) -> str:
    """Where a block is in the store."""
    return f"blocks/{block_id}.parquet"


def write_block(store: Store, rows: RowBuffer) -> str:
    """Store the rows as a block, unless it is there already; returns its id."""
    block_id = rows.block_id()
    key = block_key(block_id)
    if not store.exists(key):
        store.create(key, parquet_bytes(rows.columns(), block_schema()))
    return block_id


def read_block(store: Store, block_id: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Rows of a block, in block order.

    Parameters
    ----------
    store
        Where it is.
    block_id
        Its id.
    columns
        Of doc_id, text, prompt, text_field, meta; all by default.

    Raises
    ------
    IntegrityError
        The block is missing, is not Parquet, has a newer format, or is not what its name says (where all columns are
        read) or what its doc_ids say (where they, texts and prompts are).
    """
    key = block_key(block_id)
    try:
        frame = read_stored(store, key, columns=columns or _COLUMNS, known_format=BLOCK_FORMAT)
    except MissingObjectError as error:
        raise DamagedError(
            f"block {block_id} is missing: {store.url(key)} is not in the store; `curate run` makes it again from "
            "its sources",
            store.url(key),
        ) from error
    if (columns is None and _id_of(frame) != block_id) or not _texts_are_named(frame):
        raise DamagedError(f"{store.url(key)} does not hold the content that its name says; run again", store.url(key))
    return frame


def _texts_are_named(frame: pl.DataFrame) -> bool:
    """Whether texts have their doc_ids, where all that these are made of was read."""
    if not {"doc_id", "text", "prompt"} <= set(frame.columns):
        return True
    names: list[str] = frame["doc_id"].to_list()
    return names == doc_ids(frame["text"].to_list(), frame["prompt"].to_list())


def _id_of(frame: pl.DataFrame) -> str | None:
    """The id that the content of a block has; none where it lacks values that every row has."""
    if any(frame[name].null_count() for name in ("doc_id", "text", "meta")):
        return None
    columns: dict[str, Any] = {name: frame[name].to_list() for name in _COLUMNS}
    return RowBuffer(**columns).block_id()


def read_doc_ids(store: Store, block_id: str) -> pl.Series:
    """doc_ids of a block's rows, in order; nothing else of it is read.

    Raises
    ------
    IntegrityError
        The block is missing or damaged.
    """
    key = block_key(block_id)
    try:
        return store.collected(key, lambda: store.scan_parquet([key]).select("doc_id").collect()["doc_id"])
    except (IntegrityError, MissingObjectError) as error:
        raise DamagedError(f"{store.url(key)} is missing or damaged ({error})", store.url(key)) from error


def read_texts(store: Store, block_id: str) -> list[str]:
    """Texts of a block's rows, in order, each checked against its doc_id.

    Raises
    ------
    IntegrityError
        The block is missing, or holds other rows than its doc_ids name.
    """
    texts: list[str] = read_block(store, block_id, columns=["doc_id", "text", "prompt"])["text"].to_list()
    return texts


def doc_ids(texts: Sequence[str], prompts: Sequence[str | None]) -> list[str]:
    """Identities of rows: the SHA-256 of text and prompt (`rise_ops.rows`)."""
    pairs = zip(map(_json, texts), map(_json, prompts), strict=True)  # hashing.canonical_json would take twice the time
    return [hashlib.sha256(f"[{text},{prompt}]".encode()).hexdigest() for text, prompt in pairs]


def _json(value: str | None) -> str:
    return "null" if value is None else _quoted(value)


def block_schema(*extra: tuple[str, Any]) -> Any:
    """Arrow schema of a block, with `extra` columns after it."""
    import pyarrow as pa

    names = ("doc_id", "text", "prompt", "text_field", "meta")
    return pa.schema([*((name, pa.large_string()) for name in names), *extra])


def parquet_bytes(columns: dict[str, Any], schema: Any, *, format_version: int = BLOCK_FORMAT) -> bytes:
    """Columns as a Parquet file (zstd) that carries its format version."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns, schema=schema.with_metadata({FORMAT_KEY: str(format_version)}))
    sink = pa.BufferOutputStream()
    repeating = [name for name in table.column_names if name not in ("doc_id", "text", "meta")]
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=max(1, table.num_rows),
        use_dictionary=repeating,
        write_statistics=repeating,
        write_batch_size=_BATCH_ROWS,
    )
    del table  # columns and file together are more than a block needs
    written: bytes = sink.getvalue().to_pybytes()
    return written


def read_stored(store: Store, key: str, *, known_format: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A Parquet object of the store, read whole.

    Raises
    ------
    MissingObjectError, IntegrityError, StoreError, TransientError
    """

    def read() -> pl.DataFrame:
        return read_parquet(store.get(key), where=store.url(key), columns=columns, known_format=known_format)

    return store.checked(key, read)


def read_parquet(data: bytes, *, where: str, known_format: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """A Parquet file of the store, refused where it is damaged or newer than `known_format`."""
    import polars as pl

    try:
        version = int(pl.read_parquet_metadata(io.BytesIO(data)).get(FORMAT_KEY, "0"))
        if version > known_format:
            raise IntegrityError(
                f"{where} has format version {version}, this program reads up to {known_format}; upgrade it"
            )
        frame = pl.read_parquet(io.BytesIO(data), columns=None if columns is None else list(columns))
    except (pl.exceptions.PolarsError, ValueError) as error:
        raise DamagedError(f"{where} is damaged ({str(error).partition(chr(10))[0]}); run again", where) from error
    for name, kind in frame.schema.items():
        if str(kind) != _TYPES.get(name, str(kind)):
            raise DamagedError(f"{where} is damaged (column {name} is {kind}); run again", where)
    return frame
