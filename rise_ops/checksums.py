"""CRC-32C (Castagnoli) of buffers and of stored objects: what the records of the store hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c

if TYPE_CHECKING:
    from rise_ops.store import Store

_PIECE_BYTES = 2**18


def crc32c(data: memoryview, value: int = 0) -> int:
    """CRC-32C of a buffer, going on from `value`.

    The library lets other threads run only while it looks at `bytes`. What is not is copied piece by piece, in a
    processor's cache: less than it would cost the threads that multiply to wait.
    """
    whole: object = data.obj
    if isinstance(whole, bytes) and len(whole) == data.nbytes and data.contiguous:
        return int(google_crc32c.extend(value, whole))
    flat = data.cast("B")
    for start in range(0, len(flat), _PIECE_BYTES):
        value = google_crc32c.extend(value, bytes(flat[start : start + _PIECE_BYTES]))
    return value


def stored_crc32c(store: Store, key: str, *, size: int | None = None, into: memoryview | None = None) -> int:
    """CRC-32C of an object as it is stored, whoever wrote it; some megabytes of it are in memory at a time.

    Parameters
    ----------
    size
        Bytes that the object has, where that is known.
    into
        Where its bytes are put on the way.

    Raises
    ------
    MissingObjectError, StoreError, TransientError
    """
    value = 0
    for piece in store.pieces(key, size=size, into=into):
        value = crc32c(piece, value)
    return value
