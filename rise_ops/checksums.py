"""CRC-32C (Castagnoli) of buffers and of stored objects: what the records of the store hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

if TYPE_CHECKING:
    from rise_ops.store import Store


def crc32c(data: memoryview, value: int = 0) -> int:
    """CRC-32C of a buffer, going on from `value`, without a copy.

    The library takes `bytes`, for which it lets other threads run, and read-only arrays.
    """
    taken: object = data.obj
    if not (isinstance(taken, bytes) and len(taken) == data.nbytes and data.contiguous):
        taken = view = np.asarray(data)
        view.flags.writeable = False
    found: int = google_crc32c.extend(value, taken)
    return found


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
