"""What decompressing an Arrow file or stream will need, read off its buffers before one is decompressed.

Every message is a FlatBuffer that lists its buffers; a compressed one begins with its decompressed length. The
largest sum of a message is what reading it takes. (Arrow allocates what the buffer says, and fails where it is
longer.) In a file, the messages are those that its footer names; a stream is read message after message.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"ARROW1"
_CONTINUES = 0xFFFFFFFF
_RECORD_BATCH, _DICTIONARY_BATCH = 3, 2
_MOST_METADATA = 2**28
_EARLY_COMPRESSION = b"ARROW:experimental_compression"  # how the first writers said it; Arrow still reads it

Block = tuple[int, int]
"""Where a message begins, and the length of its metadata with what precedes them."""


class MessageError(Exception):
    """A message that cannot be read."""


def decoded_bytes(path: Path) -> int:
    """Most bytes that the buffers of one message become.

    Raises
    ------
    MessageError
        A message is not what Arrow prescribes, or lies outside the file.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        is_file = file.read(len(_MAGIC)) == _MAGIC
        try:
            blocks = _footer(file, size) if is_file else _stream(file, size)
            return max((_needed(file, place, length) for place, length in blocks), default=0)
        except (struct.error, IndexError, OverflowError) as error:
            raise MessageError("a message lies outside the file") from error


def _footer(file: BinaryIO, size: int) -> Iterator[Block]:
    """The blocks that a file's footer names: offset, length of the metadata and length of the body, 24 bytes each."""
    (length,) = struct.unpack("<i", _read(file, size - len(_MAGIC) - 4, 4))
    footer = _Table.root(_read(file, size - len(_MAGIC) - 4 - length, length))
    for field in (2, 3):
        for place in footer.structs(field, 24):
            offset, metadata = struct.unpack_from("<qi", footer.data, place)
            yield offset, metadata


def _stream(file: BinaryIO, size: int) -> Iterator[Block]:
    place = 0
    while place + 4 <= size:
        head = _read(file, place, min(8, size - place))
        length, prefix = struct.unpack_from("<I", head)[0], 4
        if length == _CONTINUES:
            length, prefix = struct.unpack_from("<I", head, 4)[0], 8
        if length == 0:
            return
        yield place, prefix + length
        body = _Table.root(_read(file, place + prefix, length)).long(3)
        if body < 0:
            raise MessageError("a message has a negative length")
        place += prefix + length + body


def _needed(file: BinaryIO, place: int, length: int) -> int:
    """Bytes that the compressed buffers of one message become."""
    data = _read(file, place, length)
    prefix = 8 if data[:4] == b"\xff\xff\xff\xff" else 4
    message = _Table.root(data[prefix:])
    kind, batch = message.byte(1), message.table(2)
    if kind == _DICTIONARY_BATCH and batch is not None:
        batch = batch.table(1)
    elif kind != _RECORD_BATCH:
        return 0
    if batch is None or (batch.table(3) is None and _EARLY_COMPRESSION not in data):
        return 0
    needed = 0
    for buffer in batch.structs(2, 16):
        offset, stored = struct.unpack_from("<qq", batch.data, buffer)
        if stored > 0:
            (becomes,) = struct.unpack("<q", _read(file, place + length + offset, 8))
            needed += stored if becomes < 0 else becomes
    return needed


def _read(file: BinaryIO, place: int, length: int) -> bytes:
    if place < 0 or not 0 <= length <= _MOST_METADATA:
        raise MessageError("a message lies outside the file")
    data = os.pread(file.fileno(), length, place)
    if len(data) < length:
        raise MessageError("a message lies outside the file")
    return data


class _Table:
    """A table of a FlatBuffer: its fields by number."""

    def __init__(self, data: bytes, place: int) -> None:
        self.data = data
        self._place = place
        self._fields = place - struct.unpack_from("<i", data, place)[0]

    @classmethod
    def root(cls, data: bytes) -> _Table:
        """The outermost table."""
        return cls(data, struct.unpack_from("<I", data)[0])

    def byte(self, field: int) -> int:
        """A small number; 0 where it is left out."""
        place = self._find(field)
        return self.data[place] if place else 0

    def long(self, field: int) -> int:
        """A 64-bit number; 0 where it is left out."""
        place = self._find(field)
        return int(struct.unpack_from("<q", self.data, place)[0]) if place else 0

    def table(self, field: int) -> _Table | None:
        """A table within."""
        place = self._find(field)
        return _Table(self.data, place + self._offset(place)) if place else None

    def structs(self, field: int, width: int) -> range:
        """Places of a vector's structs."""
        place = self._find(field)
        if not place:
            return range(0)
        start = place + self._offset(place)
        count = self._offset(start)
        if start + 4 + count * width > len(self.data):
            raise MessageError("a message is cut off")
        return range(start + 4, start + 4 + count * width, width)

    def _offset(self, place: int) -> int:
        return int(struct.unpack_from("<I", self.data, place)[0])

    def _find(self, field: int) -> int:
        """Where a field is; 0 where it is left out."""
        if self._fields < 0:
            raise MessageError("a message lies outside the file")
        entry = 4 + 2 * field
        (size,) = struct.unpack_from("<H", self.data, self._fields)
        if entry >= size:
            return 0
        (offset,) = struct.unpack_from("<H", self.data, self._fields + entry)
        return self._place + int(offset) if offset else 0
