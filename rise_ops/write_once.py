"""A Zarr store in which the first writer of a key wins.

Two workers that are given the same block write the same keys; whichever chunk lands first stays, so no
chunk ever changes under a reader or under the checksum that was taken of it.

The client repeats requests that the server refuses for the moment, but not all whose answer is lost: a create
that is repeated could meet its own object. Here that is what the create was for, so here they are repeated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from zarr.storage import ObjectStore

from rise_ops import retry
from rise_ops.client_errors import is_spent
from rise_ops.counters import count

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

T = TypeVar("T")

_LOST = "HTTP error"
"""In the client's message where there was no answer, or not the whole of it."""


class WriteOnceStore(ObjectStore[Any]):
    """zarr's `ObjectStore` with exclusive creates."""

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of a key, or None where it is not there."""
        found = await _answered(partial(super().get, key, prototype, byte_range))
        if found is not None:
            count("store_read_bytes", len(found))
        return found

    async def set(self, key: str, value: Buffer) -> None:
        """Write a key unless it exists."""
        self._check_writable()
        try:
            await _answered(partial(obstore.put_async, self.store, key, value.as_buffer_like(), mode="create"))
        except (AlreadyExistsError, PreconditionError):
            return
        count("store_written_bytes", len(value))


async def _answered(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer to a request, repeated within the budget while it is lost."""
    for pause in retry.pauses():
        count("requests")
        try:
            return await ask()
        except BaseError as error:
            if pause is None or _LOST not in str(error) or is_spent(error):
                raise
            retry.tell(error, pause)
            await asyncio.sleep(pause)
    raise AssertionError("the last try returns or raises")
