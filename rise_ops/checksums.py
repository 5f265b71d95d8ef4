"""CRC-32C (Castagnoli) of buffers and of stored objects: what the records of the store hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from awscrt import checksums

if TYPE_CHECKING:
    from rise_ops.store import Store


def crc32c(data: memoryview, value: int = 0) -> int:
    """CRC-32C of a buffer, going on from `value`. Other threads run meanwhile, and nothing is copied."""
    return int(checksums.crc32c(data, value))


def combine_crc32c(first: int, second: int, size: int) -> int:
    """CRC-32C of two buffers one after the other, from that of each and the bytes of the second."""
    return int(checksums.combine_crc32c(first, second, size))


def stored_crc32c(store: Store, key: str, *, size: int | None = None) -> int:
    """CRC-32C of an object as it is stored, whoever wrote it; some megabytes of it are in memory at a time.

    Parameters
    ----------
    size
        Bytes that the object has, where that is known.

    Raises
    ------
    MissingObjectError, StoreError, TransientError
    """
    value = 0
    for piece in store.pieces(key, size=size):
        value = crc32c(piece, value)
    return value
