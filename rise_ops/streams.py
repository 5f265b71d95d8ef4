"""Bytes to lines in flat memory: hashing, decompression and bounded line splitting.

Everything is a generator over chunks; none holds more than one chunk and one line. A line longer than the
limit is never held: its beginning is kept for the report, its length is counted, the rest is dropped.
Gzip may have several members and zstd several frames; a stream that ends inside one is truncated.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import zstandard

from rise_ops.sources import CHUNK_BYTES

KEPT_BYTES = 2048
"""Beginning of an over-long line that is kept: 500 characters of up to 4 bytes."""

_ZSTD_INPUT = 1024  # four bytes of zstd can expand to 128 KiB: small bites bound the output to 32 MiB


class DamagedError(Exception):
    """A compressed stream that ends early or does not decode; the reader adds object and line."""


class Bytes(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """The next bytes, at most `size`; none at the end."""


class HashingReader:
    """Chunks of a file, hashed on the way.

    Parameters
    ----------
    file
        Where they come from, read from its present position.
    chunk_bytes
        Size of a chunk.
    size
        Bytes of the file, where they are known.
    """

    def __init__(self, file: Bytes, *, chunk_bytes: int = CHUNK_BYTES, size: int | None = None) -> None:
        self._size = size
        self._read = 0
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._file.read(self._chunk_bytes):
            self._digest.update(chunk)
            self._read += len(chunk)
            yield chunk

    @property
    def size(self) -> int:
        """Bytes of the file; where they are not known, those read so far."""
        return self._read if self._size is None else self._size

    def sha256(self) -> str:
        """SHA-256 of the whole file; reads what is left of it."""
        for _ in self:
            pass
        return self._digest.hexdigest()


def decompressed(chunks: Iterable[bytes], codec: str) -> Iterator[bytes]:
    """Chunks of the decompressed stream.

    Parameters
    ----------
    chunks
        The stored bytes.
    codec
        `""`, `"gz"` or `"zst"`.

    Raises
    ------
    DamagedError
        The stream is truncated or does not decode.
    """
    if codec == "gz":
        return _gunzip(chunks)
    if codec == "zst":
        return _unzstd(chunks)
    return iter(chunks)


def lines(chunks: Iterable[bytes], *, limit: int) -> Iterator[tuple[bytes, int, bool]]:
    """Physical lines, in order.

    Parameters
    ----------
    chunks
        Pieces of the stream, cut anywhere.
    limit
        Longest line, in bytes, that is given whole.

    Yields
    ------
    tuple
        The line without its newline (its first `KEPT_BYTES` bytes where it is longer than `limit`), its
        full length, and whether a newline ended it.
    """
    held: list[bytes] = []
    length = kept = 0
    for chunk in _bites(chunks):
        first, *others = chunk.split(b"\n")
        if kept <= max(limit, KEPT_BYTES):
            held.append(first)
            kept += len(first)
        length += len(first)
        if not others:
            continue
        yield _bounded(b"".join(held), length, limit), length, True
        last = others.pop()
        for line in others:
            yield _bounded(line, len(line), limit), len(line), True
        held, length, kept = [last], len(last), len(last)
    if length:
        yield _bounded(b"".join(held), length, limit), length, False


def _bites(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, at most a megabyte at a time: a chunk of nothing but newlines becomes as many objects."""
    for chunk in chunks:
        if len(chunk) <= CHUNK_BYTES:
            yield chunk
        else:
            yield from (chunk[start : start + CHUNK_BYTES] for start in range(0, len(chunk), CHUNK_BYTES))


def _bounded(line: bytes, length: int, limit: int) -> bytes:
    return line if length <= limit else line[:KEPT_BYTES]


def _gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    engine = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            data = chunk
            while data:
                if engine.eof:
                    data = data.lstrip(b"\0")  # tapes and some writers pad with zeros
                    if not data:
                        break
                    engine = zlib.decompressobj(wbits=31)
                out = engine.decompress(data, CHUNK_BYTES)
                if out:
                    yield out
                data = engine.unused_data if engine.eof else engine.unconsumed_tail
        while not engine.eof:
            out = engine.decompress(b"", CHUNK_BYTES)
            if not out:
                raise DamagedError("truncated")
            yield out
    except zlib.error as error:
        raise DamagedError(f"damaged ({_plain(error)})") from error


def _unzstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    engine, ended = decompressor.decompressobj(), False
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), _ZSTD_INPUT):
                data = chunk[start : start + _ZSTD_INPUT]
                while data:
                    if ended:
                        engine, ended = decompressor.decompressobj(), False
                    out = engine.decompress(data)
                    if out:
                        yield out
                    ended = engine.eof
                    data = engine.unused_data if ended else b""
    except zstandard.ZstdError as error:
        raise DamagedError(f"damaged ({_plain(error)})") from error
    if not ended:
        raise DamagedError("truncated")


def _plain(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
