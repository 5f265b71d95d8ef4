"""CSV (RFC 4180, comma, UTF-8, header first) as rows; see `rise_ops.readers`.

Python's strict csv parser reads one record at a time from lines that are handed to it. A record that is
malformed, too long, or whose quote never closes costs exactly its first line: reading goes on at the next
one, so one stray quote cannot swallow the rest of the object. Values are strings; nothing is guessed.
"""

from __future__ import annotations

import csv
from collections import Counter, deque
from collections.abc import Iterator

from rise_ops.errors import SourceError
from rise_ops.readers import SourceRow, damage_named, guarded, refuse_columns, text_lines, too_long
from rise_ops.rows import RowFault
from rise_ops.streams import HashingReader

_Line = tuple[bytes, int]


class CsvReader:
    """Records below the header; see `rise_ops.readers.Reader`."""

    unit: str = "line"
    total: int | None = None

    def __init__(self, stored: HashingReader, *, uri: str, codec: str = "", row_bytes: int) -> None:
        self.columns: dict[str, str] = {}
        self._stored = stored
        self._uri = uri
        self._feed = _Feed(text_lines(guarded(uri, stored, codec), limit=row_bytes), row_bytes)
        if csv.field_size_limit() < row_bytes:
            csv.field_size_limit(row_bytes)  # one setting for the process; the feed keeps the real bound

    def __iter__(self) -> Iterator[SourceRow]:
        with damage_named(self._uri, lambda: self._feed.line):
            names = self._header()
            index = 0
            while (record := self._record()) is not None:
                number, cells, raw = record
                if cells == []:
                    continue
                value = cells if isinstance(cells, RowFault) else _row(names, cells)
                yield SourceRow(index, number, value, raw)
                index += 1

    def sha256(self) -> str:
        """SHA-256 of the stored bytes."""
        return self._stored.sha256()

    def _header(self) -> list[str]:
        record = self._record()
        while record is not None and record[1] == []:
            record = self._record()
        if record is None:
            return []
        number, names, _ = record
        if isinstance(names, RowFault):
            raise SourceError(f"source {self._uri}: its header, line {number}, {names.reason}")
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice or "" in names:
            what = f"names column '{twice[0]}' twice" if twice and twice[0] else "has a column without a name"
            raise SourceError(f"source {self._uri}: its header, line {number}, {what}; correct the header")
        refuse_columns(self._uri, names)
        self.columns = dict.fromkeys(names, "string")
        return names

    def _record(self) -> tuple[int, list[str] | RowFault, bytes] | None:
        """(line number, cells or fault, bytes) of the next record; None at the end."""
        feed = self._feed
        number = feed.begin()
        try:
            # A parser of its own for each record: an error leaves no state behind.
            cells = next(csv.reader(feed, strict=True), None)
            if cells is None:
                return None
            raw = feed.taken()
            if feed.undecoded:
                "".join(cells).encode()
        except RowFault as fault:
            return number, fault, feed.give_back()
        except csv.Error as error:
            return number, RowFault("bad_csv", f"is not valid CSV: {_explained(error)}"), feed.give_back()
        except UnicodeEncodeError:
            return number, _not_utf8(raw), raw
        return number, cells, raw


class _Feed:
    """Lines for the parser, with those of the present record kept so that they can be given again."""

    def __init__(self, lines: Iterator[tuple[bytes, int, bool]], row_bytes: int) -> None:
        self.line = 0
        """Complete physical lines of the object that were read."""
        self.undecoded = False
        """Whether the present record holds bytes that are not UTF-8."""
        self._lines = lines
        self._row_bytes = row_bytes
        self._again: deque[_Line] = deque()
        self._record: list[_Line] = []
        self._bytes = 0

    def begin(self) -> int:
        """Start a record; returns its 1-based line."""
        self._record, self._bytes, self.undecoded = [], 0, False
        return self.line - len(self._again) + 1

    def taken(self) -> bytes:
        """Bytes of the present record."""
        return b"\n".join(line for line, _ in self._record).rstrip(b"\r")

    def give_back(self) -> bytes:
        """Return all lines but the first to the feed; gives the first one."""
        self._again.extendleft(reversed(self._record[1:]))
        return self._record[0][0].rstrip(b"\r")

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if self._again:
            line, length = self._again.popleft()
        else:
            line, length, _ = next(self._lines)
            self.line += 1
        self._record.append((line, length))
        self._bytes += length + 1
        if self._bytes > self._row_bytes + 2:  # its line end does not count
            raise too_long(length, self._row_bytes) if len(self._record) == 1 else self._unclosed()
        try:
            return line.decode("utf-8") + "\n"
        except UnicodeDecodeError:
            self.undecoded = True
            return line.decode("utf-8", "surrogateescape") + "\n"

    def _unclosed(self) -> RowFault:
        return RowFault("too_long", f"opens a quote that does not close within {self._row_bytes:,} bytes")


def _row(names: list[str], cells: list[str]) -> dict[str, str] | RowFault:
    if len(cells) != len(names):
        return RowFault("bad_csv", f"has {len(cells)} columns, the header has {len(names)}")
    return dict(zip(names, cells, strict=True))


def _not_utf8(raw: bytes) -> RowFault:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return RowFault("not_utf8", f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}")
    raise AssertionError("only called for bytes that do not decode")


def _explained(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end of data" in text:
        return "it opens a quote that never closes"
    if "expected after" in text:
        return "a quote in the middle of a quoted value; double it"
    return text
