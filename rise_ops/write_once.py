"""A Zarr store in which the first writer of a key wins.

Two workers that are given the same block write the same keys; whichever chunk lands first stays, so no
chunk ever changes under a reader or under the checksum that was taken of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError
from zarr.storage import ObjectStore

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer


class WriteOnceStore(ObjectStore[Any]):
    """zarr's `ObjectStore` with exclusive creates."""

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key unless it exists."""
        self._check_writable()
        try:
            await obstore.put_async(self.store, key, value.as_buffer_like(), mode="create")
        except (AlreadyExistsError, PreconditionError):
            return
