"""CRC-32C (Castagnoli) of buffers and of stored objects: what the records of the store hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import google_crc32c
import numpy as np

if TYPE_CHECKING:
    from rise_ops.store import Store

_RANGE_BYTES = 16 * 2**20


def crc32c(data: memoryview, value: int = 0) -> int:
    """CRC-32C of a buffer, going on from `value`, without a copy.

    The library takes `bytes`, for which it lets other threads run, and read-only arrays.
    """
    whole = data.obj
    if isinstance(whole, bytes) and len(whole) == data.nbytes:
        return google_crc32c.extend(value, whole)
    view = np.asarray(data)
    view.flags.writeable = False
    return google_crc32c.extend(value, view)  # type: ignore[arg-type]


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
