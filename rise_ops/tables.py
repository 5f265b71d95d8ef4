"""Large Parquet tables in pieces: one row group is in memory at a time, whatever the file's size.

Polars' streaming engine reads ahead by the number of cores; here memory depends on the row groups alone,
which every table of ours keeps small.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from rise_ops.blocks import FORMAT_KEY
from rise_ops.errors import DamagedError, IntegrityError
from rise_ops.store import Store


def iter_table(store: Store, key: str, *, columns: Sequence[str], rows: int, known: int | None = None,
               ) -> Iterator[pl.DataFrame]:  # fmt: skip
    """A stored table from top to bottom, at most `rows` rows at a time.

    Parameters
    ----------
    known
        Newest format version that the caller can read, where the table has one.

    Raises
    ------
    IntegrityError, StoreError, TransientError
    """
    size = store.size(key)
    if size is None:
        raise DamagedError(f"{store.url(key)} is missing; run again", store.url(key))
    source = pa.PythonFile(_StoredFile(store, key, size), mode="r")
    try:
        file = pq.ParquetFile(source, pre_buffer=True)
        version = int((file.schema_arrow.metadata or {}).get(FORMAT_KEY.encode(), b"0"))
        if known is not None and version > known:
            raise IntegrityError(
                f"{store.url(key)} has format version {version}, this program reads up to {known}; upgrade it"
            )
        yield from _pieces(file, columns, rows)
    except (pa.ArrowException, OSError) as error:
        text = str(error).splitlines()[0][:300]
        raise DamagedError(f"{store.url(key)} is damaged ({text}); run again", store.url(key)) from error


def iter_file(path: Path, *, columns: Sequence[str] | None = None, rows: int) -> Iterator[pl.DataFrame]:
    """A local table, likewise."""
    with pa.OSFile(str(path), "rb") as source:
        yield from _pieces(pq.ParquetFile(source), columns, rows)


def _pieces(file: Any, columns: Sequence[str] | None, rows: int) -> Iterator[pl.DataFrame]:
    names = None if columns is None else list(columns)
    for group in range(file.metadata.num_row_groups):
        for batch in file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
            frame = pl.from_arrow(batch)
            if isinstance(frame, pl.DataFrame):
                yield frame


class TableWriter:
    """A local Parquet file, written frame by frame; a row group holds at most one of them.

    Parameters
    ----------
    path
        The file; not there where nothing was written.
    group_rows
        Rows of a row group, at most.
    """

    def __init__(self, path: Path, *, compression: str = "zstd", group_rows: int = 2**20,
                 format_version: int | None = None) -> None:  # fmt: skip
        self._path = path
        self._compression = compression
        self._group_rows = group_rows
        self._format_version = format_version
        self._writer: Any = None

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, table: pa.Table) -> None:
        """Add rows; all tables have the same columns."""
        if self._writer is None:
            schema = table.schema
            if self._format_version is not None:
                schema = schema.with_metadata({FORMAT_KEY: str(self._format_version)})
            self._writer = pq.ParquetWriter(self._path, schema, compression=self._compression)
        table = pa.Table.from_arrays(table.columns, schema=self._writer.schema)
        self._writer.write_table(table, row_group_size=max(1, min(self._group_rows, table.num_rows)))


class _StoredFile(io.RawIOBase):
    """An object as a file that can be read at any place."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store = store
        self._key = key
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The place."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from here on."""
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._store.get_range(self._key, self._at, count)
        self._at += count
        return count
