"""Every error a user can meet, named.

A message says what went wrong, where (object, row, key) and what to do about it; it never holds a
credential. `is_transient` is the one place that decides whether trying again can help.
"""

from __future__ import annotations

import asyncio


class CurationError(Exception):
    """Base of all named errors. The command line prints it without a traceback and exits `exit_code`."""

    exit_code = 1


class ConfigError(CurationError):
    """The configuration, or the way a command was called, is wrong."""

    exit_code = 2


class SourceError(CurationError):
    """A source object is missing, unreadable, damaged, or changed while it was read."""


class BadRowsError(CurationError):
    """More rows were rejected than `limits.bad_rows` allows."""


class ModelError(CurationError):
    """The model cannot be loaded, fails its probe, or is not the one an index was built with."""


class StoreError(CurationError):
    """The store refuses: read-only, wrong credentials, no such bucket, not enough space."""


class MissingObjectError(StoreError):
    """A key that should be in the store is not there."""


class ConflictError(CurationError):
    """Another run published first."""


class IntegrityError(CurationError):
    """Stored bytes do not match their record, or were written in a newer format."""


class DamagedError(IntegrityError):
    """A stored object is missing or not what its record says, and can be made again.

    Parameters
    ----------
    message
        What, where, and what to do.
    where
        URL of the object.
    """

    def __init__(self, message: str, where: str) -> None:
        super().__init__(message, where)
        self.where = where

    def __str__(self) -> str:
        return str(self.args[0])


class SelectionError(CurationError):
    """The selection cannot be met with the rows at hand."""


class LimitError(CurationError):
    """A stage needs more than a configured limit allows."""


class WorkerError(CurationError):
    """Processes that run tasks died over one, or cannot be reached."""


class ServerError(CurationError):
    """The server that runs report to does not start, or does not answer."""


class TransientError(CurationError):
    """A fault that is expected to pass: a throttled, reset or timed-out request."""

    spent = False
    """Whether the request's own budget is used up, so that only a task begins again."""


_TRANSIENT_NAMES = frozenset(
    {
        "ConnectionClosedError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "EndpointConnectionError",
        "ServerDisconnectedError",
        "ClientConnectorError",
        "ClientPayloadError",
        "IncompleteReadError",
    }
)


def is_transient(error: BaseException) -> bool:
    """Whether trying the same call again can succeed.

    Named errors are permanent except `TransientError`. Network errors of the clients are recognised by
    type, or by name where importing the client would be a price for everyone.
    """
    if isinstance(error, TransientError):
        return True
    if isinstance(error, CurationError):
        return False
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    return any(kind.__name__ in _TRANSIENT_NAMES for kind in type(error).__mro__)
