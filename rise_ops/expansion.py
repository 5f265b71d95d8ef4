"""How much a source object may become: the bound on decompression bombs.

Memory stays flat whatever an object expands to (`rise_ops.streams`, `rise_ops.row_sizes`); this bounds the time.
An object may always become `FREE_BYTES`, and beyond that `RATIO` times its stored bytes. Gzip stays below
1,032, text that a person would train on below 50; a few kilobytes of zstd, or of Parquet's run lengths, can
stand for terabytes.
"""

from __future__ import annotations

from rise_ops.errors import SourceError

RATIO = 1_000
"""Most bytes that one stored byte may become."""
FREE_BYTES = 2**31
"""Bytes that every object may become."""
ROW_BYTES = 256
"""What a row counts besides its bytes: so much work an empty one costs."""


class Expansion:
    """What an object has become so far."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._total = 0

    def add(self, count: int, *, stored: int, rows: int = 0) -> None:
        """Take in more of it: bytes, and rows among them; `stored` are the bytes that it comes from.

        Raises
        ------
        SourceError
            It is a bomb.
        """
        self._total += count + ROW_BYTES * rows
        if self._total > max(FREE_BYTES, RATIO * stored):
            raise SourceError(
                f"source {self._uri} expands to more than {RATIO:,} times its {stored:,} stored bytes, as a "
                "decompression bomb does; if it is meant to, store it decompressed"
            )
