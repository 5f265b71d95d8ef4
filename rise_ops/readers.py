"""Source objects as rows: one reader per format, all streaming, all with the same face.

| suffix | reader | a row is | source_row counts |
|---|---|---|---|
| `.jsonl` `.ndjson` `.json`, also `.gz` `.zst` | here | one line with one JSON object | physical lines |
| `.csv`, also `.gz` `.zst` | `readers_csv` | one record below the header | records |
| `.parquet` | `readers_arrow` | one row | rows |
| `.arrow` `.feather` | `readers_arrow` | one row | rows |

`source_row` is 0-based; messages count from 1. A row that cannot be read comes out as a `RowFault` in its
place: the caller counts it. Blank lines are not rows. An object that is damaged as a whole (truncated,
corrupt, wrong header) raises SourceError instead.

JSON numbers are 64-bit floats or integers of any size; a name that occurs twice in one object is a fault,
because one of the two values would be lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol
from urllib.parse import urlsplit

from rise_ops.errors import SourceError
from rise_ops.expansion import Expansion
from rise_ops.rows import RowFault
from rise_ops.sources import SourceObject, open_object
from rise_ops.streams import DamagedError, HashingReader, decompressed, lines

MAX_DEPTH = 100
"""Deepest nesting of a JSON row. Fixed, so that it does not depend on the interpreter's stack."""

MAX_COLUMNS = 10_000
"""Most distinct columns of one object: they become columns of the export."""

MAX_NAME_BYTES = 1_000
"""Longest name of a column: names are kept for each object."""

_SUFFIX = re.compile(
    r"\.(?P<format>jsonl|ndjson|json|csv)(?:\.(?P<codec>gz|zst))?$|\.(?P<table>parquet|arrow|feather)$"
)
_BOM = b"\xef\xbb\xbf"


class SourceRow(NamedTuple):
    """One row of a source, or what is wrong with it."""

    source_row: int
    """0-based place: physical line, record or row."""
    number: int
    """1-based line (or row, in a table) for messages."""
    value: dict[str, Any] | RowFault
    """Its columns, or the fault."""
    raw: bytes | None
    """Its bytes (or their beginning) in a text format."""


class Reader(Protocol):
    """Rows of one object, in order; iterate once."""

    unit: str
    """What `SourceRow.number` counts: "line" or "row"."""
    total: int | None
    """Number of rows, where the format says so up front."""
    columns: dict[str, str]
    """Columns seen so far and their Arrow types, "json" where the format has none."""

    def __iter__(self) -> Iterator[SourceRow]: ...

    def sha256(self) -> str:
        """SHA-256 of the object's stored bytes, in hexadecimal; call it after the last row."""


class Format(NamedTuple):
    """What a name's ending says."""

    name: str
    """jsonl, json, csv, parquet or arrow."""
    codec: str
    """"", gz or zst."""


def format_of(uri: str) -> Format:
    """Format by the name's ending.

    Raises
    ------
    SourceError
        It is not a known one.
    """
    path = urlsplit(uri).path if uri.startswith(("http://", "https://")) else uri
    match = _SUFFIX.search(path.lower())
    if match is None:
        raise SourceError(
            f"source {uri}: format not known by its name; known are .jsonl, .ndjson, .json and .csv (each also .gz or "
            ".zst), .parquet, .arrow, .feather. Narrow the glob or convert the object"
        )
    name = match["format"] or match["table"]
    return Format({"ndjson": "jsonl", "feather": "arrow"}.get(name, name), match["codec"] or "")


def open_rows(source: SourceObject, *, row_bytes: int, memory: int | None = None) -> AbstractContextManager[Reader]:
    """A reader for one object, closed with the context.

    Parameters
    ----------
    source
        The object, as listed.
    row_bytes
        Longest row; a longer one comes out as a `too_long` fault and is never held whole.
    memory
        Bytes that a page of every column of a table, or one of its batches, may have; by default a GiB.

    Raises
    ------
    SourceError
        The object is missing, damaged or of an unknown format.
    """
    form = format_of(source.uri)
    if form.name in ("parquet", "arrow"):
        from rise_ops.readers_arrow import open_table

        return open_table(source, form=form.name, row_bytes=row_bytes, memory=memory)
    return _open_text(source, form, row_bytes)


@contextmanager
def _open_text(source: SourceObject, form: Format, row_bytes: int) -> Iterator[Reader]:
    with open_object(source.uri, listed=source) as file:
        stored = HashingReader(file)
        if form.name == "csv":
            from rise_ops.readers_csv import CsvReader

            yield CsvReader(stored, uri=source.uri, codec=form.codec, row_bytes=row_bytes)
        else:
            whole = form.name == "json"
            yield JsonLinesReader(stored, uri=source.uri, codec=form.codec, row_bytes=row_bytes, may_be_array=whole)


class JsonLinesReader:
    """One JSON object a line; see `Reader`."""

    unit: str = "line"
    total: int | None = None

    def __init__(
        self, stored: HashingReader, *, uri: str, codec: str = "", row_bytes: int, may_be_array: bool = False
    ) -> None:
        self.columns: dict[str, str] = {}
        self._stored = stored
        self._uri = uri
        self._codec = codec
        self._row_bytes = row_bytes
        self._may_be_array = may_be_array

    def __iter__(self) -> Iterator[SourceRow]:
        chunks = guarded(self._uri, self._stored, self._codec)
        number, first, limit = 0, True, self._row_bytes
        with damage_named(self._uri, lambda: number):
            for line, length, _ in text_lines(chunks, limit=limit):
                number += 1
                if line[-1:] == b"\r":
                    line, length = line[:-1], length - 1
                if not line.strip(b" \t\r"):
                    continue
                if first:
                    first = False
                    self._refuse_array(line)
                yield SourceRow(number - 1, number, self._value(line, length), line)

    def sha256(self) -> str:
        """SHA-256 of the stored bytes."""
        return self._stored.sha256()

    def _value(self, line: bytes, length: int) -> dict[str, Any] | RowFault:
        if length > self._row_bytes:
            return too_long(length, self._row_bytes)
        try:
            row = parse_json(line)
        except RowFault as fault:
            return fault
        if not row.keys() <= self.columns.keys():
            faults = map(name_fault, row.keys() - self.columns.keys())
            if (wrong := next(filter(None, faults), None)) is not None:
                return wrong
            self._add_columns(row)
        return row

    def _add_columns(self, row: dict[str, Any]) -> None:
        self.columns |= dict.fromkeys(row, "json")
        refuse_many(self._uri, len(self.columns))

    def _refuse_array(self, line: bytes) -> None:
        if self._may_be_array and line.lstrip().startswith(b"["):
            raise SourceError(
                f"source {self._uri} is one JSON array, not one object a line; convert it, "
                "for example with: jq -c '.[]' file.json > file.jsonl"
            )


def text_lines(chunks: Iterable[bytes], *, limit: int) -> Iterator[tuple[bytes, int, bool]]:
    """`streams.lines` of a text file without its byte order mark; a carriage return stays at the line's end."""
    found = lines(chunks, limit=limit + len(_BOM) + 1)
    for line, length, ended in found:
        if line.startswith(_BOM):
            line, length = line[len(_BOM) :], length - len(_BOM)
        yield line, length, ended
        break
    yield from found


def guarded(uri: str, stored: HashingReader, codec: str) -> Iterator[bytes]:
    """The decompressed chunks of an object, as long as they are not a bomb's."""
    if not codec:
        yield from stored
        return
    guard = Expansion(uri)
    for chunk in decompressed(stored, codec):
        guard.add(len(chunk), stored=stored.size, rows=chunk.count(b"\n"))
        yield chunk


def name_fault(name: str) -> RowFault | None:
    """What is wrong with the name of a column, if anything."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        code = f"\\u{ord(name[error.start]):04x}"
        return RowFault("bad_unicode", f"has a column whose name holds the lone surrogate {code}")
    if size > MAX_NAME_BYTES:
        return RowFault("bad_name", f"has a column whose name has {size:,} bytes, the most is {MAX_NAME_BYTES:,}")
    return None


def refuse_many(uri: str, columns: int) -> None:
    """Raise SourceError where an object has too many columns."""
    if columns > MAX_COLUMNS:
        raise SourceError(
            f"source {uri} has more than {MAX_COLUMNS:,} different columns; put the varying ones into one "
            "column that holds an object"
        )


def refuse_columns(uri: str, names: Sequence[str]) -> None:
    """Raise SourceError where a table has too many columns, two of one name, or names that cannot be kept."""
    refuse_many(uri, len(names))
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise SourceError(f"source {uri} has two columns named '{min(twice)[:100]}'; rename one")
    for name in names:
        if (fault := name_fault(name)) is not None:
            raise SourceError(f"source {uri} {fault.reason}; rename it")


@contextmanager
def damage_named(uri: str, count: Any) -> Iterator[None]:
    """Say which object is damaged and after which line."""
    try:
        yield
    except DamagedError as error:
        raise SourceError(f"source {uri} is {error} after line {count():,}; upload it again") from error


def too_long(length: int, row_bytes: int) -> RowFault:
    """The fault of a line over the limit."""
    return RowFault("too_long", f"has {length:,} bytes, limits.row_bytes is {row_bytes:,}")


def parse_json(line: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises
    ------
    RowFault
        not_utf8, bad_json, bad_number, nested_too_deep or not_an_object.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault("not_utf8", f"is not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}") from None
    try:
        value = _decode(text)
    except json.JSONDecodeError as error:
        raise RowFault("bad_json", f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowFault("nested_too_deep", f"is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:  # int() refuses thousands of digits
        raise RowFault("bad_number", "holds an integer of more than 4,300 digits") from None
    if not isinstance(value, dict):
        raise RowFault("not_an_object", f"is {_KINDS.get(type(value), 'a value')}, not a JSON object")
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
        raise RowFault("nested_too_deep", f"is nested deeper than {MAX_DEPTH} levels")
    return value


_KINDS: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise RowFault("bad_json", f"names '{twice[:100]}' twice in one object")
    return value


def _not_a_number(token: str) -> NoReturn:
    raise RowFault("bad_number", f"holds {token}, which JSON does not have")


_decode = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_not_a_number).decode


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return deepest
