"""What decoding a Parquet file will need, read off its page headers before a page is decoded.

The directory at a file's end says what its writer pleased. What binds a decoder is the header before each page
(Thrift, compact protocol): it gets exactly the memory that the header says and fails where the page is longer.
So the headers tell how much one page of each column takes, and which columns are coded by a dictionary: those
are read as indices, because one index of a few bits can stand for a megabyte. The directory is parsed here too,
because Arrow's own access to it ends the process where a column is encrypted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

_DICTIONARY_CODES = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY
_DATA_PAGES = {5: 2, 8: 4}
"""Fields of a page header that describe data (v1, v2), and the place of the encoding in them."""
_STRUCT, _LISTS, _BINARY = 12, (9, 10), 8
_DEEPEST = 16
_HEADER_BYTES = 4096
"""Read for a header at first: most have a few dozen bytes, but one may hold statistics of any length."""

Header = dict[int, Any]


class PageError(Exception):
    """A page header that cannot be read."""


class PageNeeds(NamedTuple):
    """What decoding takes."""

    bytes: int
    """The largest page of every column, decoded, at the same time; the most of any row group."""
    items: int
    """The most values of a column with lists in one row group: a single row may hold them all."""
    dictionaries: tuple[str, ...]
    """Columns of which some page holds indices into a dictionary; all do, or the column lies in a list."""
    mixed: Mapping[str, int]
    """Columns outside of lists of which some pages hold indices and others values, as writers leave them whose
    dictionary grew too large: bytes of the largest dictionary, which is the most that one value can have."""


def page_needs(path: Path, *, repeated: Sequence[bool]) -> PageNeeds:
    """Read the directory, and the header of every page.

    Parameters
    ----------
    path
        The file.
    repeated
        For each column without parts, in the schema's order, whether it lies in a list.

    Raises
    ------
    PageError
        Something is not what Parquet prescribes, lies outside the file, or is encrypted.
    """
    most = items = 0
    coded: dict[str, bool] = {}
    plain: set[str] = set()
    largest: dict[str, int] = {}
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for group in _row_groups(file, size):
            needed = 0
            for column, in_list in zip(group, repeated, strict=True):
                headers = list(_headers(file, column, size))
                needed += max((_number(header, 2) for header in headers), default=0)
                if in_list:
                    items = max(items, sum(map(_values, headers)))
                name = _path(column)
                if any(map(_is_coded, headers)):
                    coded[name] = in_list
                if any(map(_is_plain, headers)):
                    plain.add(name)
                dictionary = max((_number(header, 2) for header in headers if 7 in header), default=0)
                largest[name] = max(dictionary, largest.get(name, 0))
            most = max(most, needed)
    mixed = {name: largest[name] for name, in_list in coded.items() if name in plain and not in_list}
    return PageNeeds(most, items, tuple(name for name in coded if name not in mixed), mixed)


def _row_groups(file: BinaryIO, size: int) -> Iterator[list[Header]]:
    """The descriptions of the columns of each row group."""
    tail = os.pread(file.fileno(), 8, size - 8)
    length = int.from_bytes(tail[:4], "little")
    if length > size - 8:
        raise PageError("the directory is longer than the file")
    directory, _ = _Thrift(os.pread(file.fileno(), length, size - 8 - length)).struct()
    for group in directory.get(4) or ():
        chunks = group.get(1) if isinstance(group, dict) else None
        if not isinstance(chunks, list) or not all(isinstance(chunk, dict) for chunk in chunks):
            raise PageError("a row group does not describe its columns")
        if 8 in directory or any(8 in chunk for chunk in chunks):
            raise PageError("it is encrypted")
        columns = [chunk.get(3) for chunk in chunks]
        if not all(isinstance(column, dict) for column in columns):
            raise PageError("a row group does not describe its columns")
        yield columns


def _path(column: Header) -> str:
    parts = column.get(3)
    if not isinstance(parts, list) or not all(isinstance(part, bytes) for part in parts):
        raise PageError("a column has no name")
    return b".".join(parts).decode()


def _headers(file: BinaryIO, column: Header, size: int) -> Iterator[Header]:
    place = min(_number(column, field) for field in (9, 11) if field == 9 or column.get(field))
    end = place + _number(column, 7)
    if not 0 <= place <= end <= size:
        raise PageError("a column lies outside the file")
    while place < end:
        header, length = _header(file, place, end)
        stored = _number(header, 3)
        if stored < 0 or _number(header, 2) < 0 or place + length + stored > end:
            raise PageError("a page is longer than its column")
        yield header
        place += length + stored


def _header(file: BinaryIO, place: int, end: int) -> tuple[Header, int]:
    """The header at a place, and its length."""
    wanted = _HEADER_BYTES
    while True:
        data = os.pread(file.fileno(), min(wanted, end - place), place)
        try:
            return _Thrift(data).struct()
        except PageError:
            if wanted >= end - place:
                raise
            wanted *= 16


def _number(header: Header, field: int) -> int:
    value = header.get(field)
    if not isinstance(value, int):
        raise PageError(f"a header lacks its field {field}")
    return value


def _values(header: Header) -> int:
    parts = (header.get(field) for field in _DATA_PAGES)
    return sum(_number(part, 1) for part in parts if isinstance(part, dict))


def _is_coded(header: Header) -> bool:
    parts = ((header.get(field), place) for field, place in _DATA_PAGES.items())
    return any(isinstance(part, dict) and part.get(place) in _DICTIONARY_CODES for part, place in parts)


def _is_plain(header: Header) -> bool:
    parts = ((header.get(field), place) for field, place in _DATA_PAGES.items())
    return any(isinstance(part, dict) and part.get(place) not in _DICTIONARY_CODES for part, place in parts)


class _Thrift:
    """Values of Thrift's compact protocol: structures as their fields by number, text as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    def struct(self, depth: int = 0) -> tuple[Header, int]:
        """The fields of a structure by number, and the place where it ends."""
        if depth > _DEEPEST:
            raise PageError("a header is nested too deep")
        fields: Header = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._signed()
            fields[number] = self._value(kind & 15, depth)
        return fields, self._place

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (3, 7, _BINARY):
            return self._take({3: 1, 7: 8}.get(kind) or self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)[0]
        if kind in _LISTS:
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            item = 3 if head & 15 in (1, 2) else head & 15  # in a list, a boolean takes a byte
            return [self._value(item, depth + 1) for _ in range(count)]
        raise PageError("a header holds what Parquet does not know")

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._place:
            raise PageError("a header is cut off")
        self._place += count
        return self._data[self._place - count : self._place]

    def _byte(self) -> int:
        return self._take(1)[0]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise PageError("a header holds a number that is too long")
        return value | byte << shift

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
