"""CRC-32C (Castagnoli) of buffers and of stored objects: what the records of the store hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    from rise_ops.store import Store

_PIECE_BYTES = 2**18
_RANGE_BYTES = 16 * 2**20


def crc32c(data: memoryview, value: int = 0) -> int:
    """CRC-32C of a buffer, going on from `value`.

    In pieces that stay in cache: the library takes nothing but `bytes`, which is a copy.
    """
    for start in range(0, len(data), _PIECE_BYTES):
        value = google_crc32c.extend(value, bytes(data[start : start + _PIECE_BYTES]))
    return value


def stored_crc32c(store: Store, key: str) -> int:
    """CRC-32C of an object as it is stored, whoever wrote it; some megabytes of it are in memory at a time.

    Raises
    ------
    MissingObjectError, StoreError, TransientError
    """
    size = store.size(key)
    if not size:
        return crc32c(store.get_buffer(key))
    value = 0
    for start in range(0, size, _RANGE_BYTES):
        value = crc32c(store.get_range(key, start, min(_RANGE_BYTES, size - start)), value)
    return value
