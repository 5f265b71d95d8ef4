"""Parquet and Arrow (file or stream, also called Feather) as rows; see `rise_ops.readers`.

A remote object is spooled to a temporary file while it is hashed, because both formats keep their directory
at the end. Arrow is memory-mapped and always spooled: a map of a file that somebody truncates ends the process.
Parquet is decoded a few rows at a time, so that a batch stays near `BATCH_BYTES` however large the row groups
are; its page headers (`rise_ops.parquet_pages`) and Arrow's buffers (`rise_ops.arrow_buffers`) are looked at first,
and a file that would need more than `DECODED_BYTES` at once is refused. Text coded by a dictionary stays coded
until `rise_ops.row_sizes` has measured it. Offsets and indices are verified before a value is touched: those of
Arrow, and the indices of Parquet, come as their writer left them, and a wrong one would read any memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from rise_ops.arrow_buffers import MessageError, decoded_bytes
from rise_ops.arrow_json import as_bytes, json_values
from rise_ops.errors import SourceError
from rise_ops.expansion import Expansion
from rise_ops.hashing import canonical_json
from rise_ops.parquet_pages import PageError, page_needs
from rise_ops.readers import SourceRow, refuse_columns
from rise_ops.row_sizes import Sizes, pieces, row_sizes
from rise_ops.rows import RAW_CHARACTERS, RowFault
from rise_ops.sources import SourceObject, local_copy

BATCH_BYTES = 16 * 2**20
"""Decoded bytes that a batch of rows aims at."""
DECODED_BYTES = 2**30
"""Most bytes that are decoded in one piece: a page of every column of Parquet, a compressed batch of Arrow."""

_BATCH_ROWS = 2048
_PIECE_BYTES = 4 * 2**20
_MIXED_BYTES = 32 * 2**20
_ITEM_BYTES = 32  # what a value of a list costs where one row holds them all
_IPC_FILE_MAGIC = b"ARROW1"
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError, PageError, MessageError)


@contextmanager
def open_table(source: SourceObject, *, form: str, row_bytes: int, memory: int | None = None) -> Iterator[TableReader]:
    """A reader for one Parquet or Arrow object."""
    most = DECODED_BYTES if memory is None else min(memory, DECODED_BYTES)
    with local_copy(source, spooled=form == "arrow") as (path, sha256), ExitStack() as stack:
        try:
            table = (_parquet if form == "parquet" else _arrow)(source.uri, path, stack, most)
        except _DAMAGE as error:
            raise _damaged(source.uri, error) from error
        total, names, types, batches = table
        refuse_columns(source.uri, names)
        yield TableReader(
            batches,
            uri=source.uri,
            columns=dict(zip(names, types, strict=True)),
            total=total,
            sha256=sha256,
            row_bytes=row_bytes,
            stored=path.stat().st_size,
        )


class TableReader:
    """Rows of a table; see `rise_ops.readers.Reader`."""

    unit: str = "row"

    def __init__(
        self,
        batches: Iterator[Any],
        *,
        uri: str,
        columns: dict[str, str],
        total: int | None,
        sha256: str,
        row_bytes: int,
        stored: int,
    ) -> None:
        self.total = total
        self.columns = columns
        self._names = list(columns)
        self._uri = uri
        self._batches = batches
        self._sha256 = sha256
        self._row_bytes = row_bytes
        self._stored = stored

    def __iter__(self) -> Iterator[SourceRow]:
        place = 0
        found = self._pieces()
        while True:
            try:
                rows = next(found, None)
            except _DAMAGE as error:
                raise _damaged(self._uri, error, after=place) from error
            if rows is None:
                return
            for value, raw in rows:
                yield SourceRow(place, place + 1, value, raw)
                place += 1

    def sha256(self) -> str:
        """SHA-256 of the stored bytes."""
        return self._sha256

    def _pieces(self) -> Iterator[list[tuple[dict[str, Any] | RowFault, bytes | None]]]:
        guard = Expansion(self._uri)
        for batch in self._batches:
            for piece, sizes in pieces(batch, most_rows=_BATCH_ROWS, most_bytes=_PIECE_BYTES):
                guard.add(int(sizes.sum()), stored=self._stored, rows=piece.num_rows)
                if piece.num_rows == 1 and int(sizes[0]) > max(self._row_bytes, _PIECE_BYTES):
                    yield [(_too_long(sizes, self._row_bytes), _beginning(self._names, piece))]
                else:
                    yield [(value, None) for value in _rows(self._names, piece)]


def _too_long(sizes: Sizes, row_bytes: int) -> RowFault:
    return RowFault("too_long", f"has more than {int(sizes[0]):,} bytes, limits.row_bytes is {row_bytes:,}")


def _beginning(names: list[str], row: Any) -> bytes:
    """A row that is too long for its report: what is short, and the beginning of what is long."""
    columns: dict[str, Any] = {}
    for name, column in zip(names, row.columns, strict=True):
        if int(row_sizes(column)[0]) <= RAW_CHARACTERS:
            columns[name] = json_values(column)[0]
            continue
        value = column[0]
        while not hasattr(value, "as_buffer") and hasattr(value, "value"):
            value = value.value
        kept = bytes(value.as_buffer()[:RAW_CHARACTERS]) if hasattr(value, "as_buffer") else b""
        columns[name] = kept.decode("utf-8", "backslashreplace") + "…"
    shown = {name: value.reason if isinstance(value, RowFault) else value for name, value in columns.items()}
    return canonical_json(shown).encode("utf-8", "backslashreplace")


def _rows(names: list[str], batch: Any) -> list[dict[str, Any] | RowFault]:
    columns = [json_values(batch.column(place)) for place in range(batch.num_columns)]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
    return [_checked(row) for row in rows] if any(_flaw(column) for column in columns) else list(rows)


def _checked(row: dict[str, Any]) -> dict[str, Any] | RowFault:
    for name, value in row.items():
        if flaw := _flaw(value):
            return RowFault(flaw.error, f"{flaw.reason} in column '{name}'")
    return row


def _flaw(value: Any) -> RowFault | None:
    """What is wrong with a value: bytes that are not UTF-8 (they come as surrogates), or what its type cannot say."""
    if isinstance(value, str):
        wrong = not value.isascii() and any("\ud800" <= sign <= "\udfff" for sign in value)
        return RowFault("not_utf8", "is not UTF-8") if wrong else None
    if isinstance(value, dict):
        return next((flaw for item in value.values() if (flaw := _flaw(item))), None)
    if isinstance(value, list):
        return next((flaw for item in value if (flaw := _flaw(item))), None)
    return value if isinstance(value, RowFault) else None


Table = tuple[int | None, list[str], list[str], Iterator[Any]]
"""Number of rows, columns, their types as text, batches."""


def _parquet(uri: str, path: Path, stack: ExitStack, most: int) -> Table:
    # Without pre_buffer the file is read as it is decoded, not a whole row group at once.
    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}
    plain = stack.enter_context(pq.ParquetFile(path, **options))
    metadata, schema = plain.metadata, plain.schema_arrow
    leaves = [metadata.schema.column(place) for place in range(metadata.num_columns)]
    needs = page_needs(path, repeated=[leaf.max_repetition_level > 0 for leaf in leaves])
    _refuse_size(uri, needs.bytes, "a page of every column", most)
    Expansion(uri).add(needs.items * _ITEM_BYTES, stored=path.stat().st_size)
    texts = {
        leaf.path
        for leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type in ("STRING", "NONE")
    }
    coded = [name for name in needs.dictionaries if name in texts]
    file = stack.enter_context(pq.ParquetFile(path, metadata=metadata, read_dictionary=coded, **options))
    # a dictionary that is given back as one holds all values of a row group, also those that are not coded; where
    # there are such, every value counts as the largest that an index could stand for
    value = sum(size for name, size in needs.mixed.items() if name in texts)
    rows = min(_BATCH_ROWS, _MIXED_BYTES // max(1, value))
    for group in range(metadata.num_row_groups):
        described = metadata.row_group(group)
        if described.total_byte_size > 0 and described.num_rows > 0:
            rows = min(rows, BATCH_BYTES * described.num_rows // described.total_byte_size)
    batches = file.iter_batches(batch_size=max(16, rows), use_threads=False)
    return metadata.num_rows, *_described(schema), map(_verified_codes, batches)


def _arrow(uri: str, path: Path, stack: ExitStack, most: int) -> Table:
    mapped = stack.enter_context(pa.memory_map(str(path), "r"))
    if mapped.size() == 0:
        raise pa.ArrowInvalid("the file is empty")
    _refuse_size(uri, decoded_bytes(path), "a compressed batch", most)
    if mapped.read(len(_IPC_FILE_MAGIC)) == _IPC_FILE_MAGIC:
        file = stack.enter_context(pa.ipc.open_file(mapped))
        whole = (file.get_batch(place) for place in range(file.num_record_batches))
        return None, *_described(file.schema), map(_verified, whole)
    mapped.seek(0)
    stream = stack.enter_context(pa.ipc.open_stream(mapped))
    return None, *_described(stream.schema), map(_verified, iter(stream))


def _described(schema: Any) -> tuple[list[str], list[str]]:
    return list(schema.names), [str(field.type) for field in schema]


def _verified(batch: Any) -> Any:
    """A batch of which every offset and index is known to be good; text may still be other than UTF-8."""
    for column in batch.columns:
        _verify(column)
    return batch


def _verified_codes(batch: Any) -> Any:
    """A batch of which the indices into dictionaries are known to be good; the rest comes from Arrow's decoder."""
    for column in batch.columns:
        if pa.types.is_dictionary(column.type) or pa.types.is_nested(column.type):
            _verify(column)
    return batch


def _verify(column: Any) -> None:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        _as_bytes(column).validate(full=True)


def _as_bytes(column: Any) -> Any:
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary), safe=False)
    return column.view(as_bytes(column.type))


def _refuse_size(uri: str, needed: int, what: str, most: int) -> None:
    if needed > most:
        more = ", or raise limits.memory" if most < DECODED_BYTES else ""
        raise SourceError(
            f"source {uri} needs {needed:,} bytes of memory to decode {what}, the most is {most:,}; write it again "
            f"with smaller pages or batches, or store it decompressed{more}"
        )


def _damaged(uri: str, error: Exception, *, after: int | None = None) -> SourceError:
    detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    where = "" if after is None else f" after row {after:,}"
    return SourceError(f"source {uri} is damaged{where} ({detail}); upload it again")
