"""Parquet and Arrow (file or stream, also called Feather) as rows; see `rise_ops.readers`.

A remote object is spooled to a temporary file while it is hashed, because both formats keep their directory
at the end. Parquet is decoded a few rows at a time, so that a batch stays near `BATCH_BYTES` however large
the row groups are; Arrow batches are read from a memory map and sliced. What cannot be split is one
compressed Arrow batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from rise_ops.arrow_json import json_values
from rise_ops.errors import SourceError
from rise_ops.readers import SourceRow
from rise_ops.rows import RowFault
from rise_ops.sources import SourceObject, local_copy

BATCH_BYTES = 16 * 2**20
"""Decoded bytes that a batch of rows aims at."""

_BATCH_ROWS = 2048
_IPC_FILE_MAGIC = b"ARROW1"


@contextmanager
def open_table(source: SourceObject, *, form: str) -> Iterator[TableReader]:
    """A reader for one Parquet or Arrow object."""
    with local_copy(source.uri) as (path, sha256), ExitStack() as stack:
        try:
            total, schema, batches = (_parquet if form == "parquet" else _arrow)(path, stack)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(source.uri, error) from error
        yield TableReader(batches, uri=source.uri, schema=schema, total=total, sha256=sha256)


class TableReader:
    """Rows of a table; see `rise_ops.readers.Reader`."""

    unit: str = "row"

    def __init__(self, batches: Iterator[Any], *, uri: str, schema: Any, total: int | None, sha256: str) -> None:
        names = list(schema.names)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SourceError(f"source {uri} has two columns named '{twice[0]}'; rename one")
        self.total = total
        self.columns = {name: str(schema.field(name).type) for name in names}
        self._names = names
        self._uri = uri
        self._batches = batches
        self._sha256 = sha256

    def __iter__(self) -> Iterator[SourceRow]:
        place = 0
        while True:
            try:
                batch = next(self._batches, None)
                if batch is None:
                    return
                values = _rows(self._names, batch)
            except (pa.ArrowException, OSError) as error:
                raise _damaged(self._uri, error, after=place) from error
            for value in values:
                yield SourceRow(place, place + 1, value, None)
                place += 1

    def sha256(self) -> str:
        """SHA-256 of the stored bytes."""
        return self._sha256


def _rows(names: list[str], batch: Any) -> list[dict[str, Any] | RowFault]:
    columns = [json_values(batch.column(place)) for place in range(batch.num_columns)]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [_checked(row) for row in rows] if _has_escapes(columns) else list(rows)


def _has_escapes(columns: list[list[Any]]) -> bool:
    return any(_escaped(column) for column in columns)


def _checked(row: dict[str, Any]) -> dict[str, Any] | RowFault:
    for name, value in row.items():
        if _escaped(value):
            return RowFault("not_utf8", f"is not UTF-8 in column '{name}'")
    return row


def _escaped(value: Any) -> bool:
    """Whether a string in here carries bytes that are not UTF-8."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value)
    if isinstance(value, dict):
        return any(_escaped(item) for item in value.values())
    return isinstance(value, list) and any(_escaped(item) for item in value)


def _parquet(path: Path, stack: ExitStack) -> tuple[int | None, Any, Iterator[Any]]:
    # Without pre_buffer the file is read as it is decoded, not a whole row group at once.
    file = stack.enter_context(pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20))
    rows = _BATCH_ROWS
    for group in range(file.metadata.num_row_groups):
        described = file.metadata.row_group(group)
        if described.total_byte_size > 0 and described.num_rows > 0:
            rows = min(rows, BATCH_BYTES * described.num_rows // described.total_byte_size)
    return file.metadata.num_rows, file.schema_arrow, file.iter_batches(batch_size=max(16, rows), use_threads=False)


def _arrow(path: Path, stack: ExitStack) -> tuple[int | None, Any, Iterator[Any]]:
    mapped = stack.enter_context(pa.memory_map(str(path), "r"))
    if mapped.size() == 0:
        raise pa.ArrowInvalid("the file is empty")
    if mapped.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC:
        file = stack.enter_context(pa.ipc.open_file(mapped))
        whole = (file.get_batch(place) for place in range(file.num_record_batches))
        return None, file.schema, _sliced(whole)
    mapped.seek(0)
    stream = stack.enter_context(pa.ipc.open_stream(mapped))
    return None, stream.schema, _sliced(iter(stream))


def _sliced(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        rows = _BATCH_ROWS
        if batch.num_rows and batch.nbytes:
            rows = max(16, min(rows, BATCH_BYTES * batch.num_rows // batch.nbytes))
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _damaged(uri: str, error: Exception, *, after: int | None = None) -> SourceError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    where = "" if after is None else f" after row {after:,}"
    return SourceError(f"source {uri} is damaged{where} ({detail}); upload it again")
