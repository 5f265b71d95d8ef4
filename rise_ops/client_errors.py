"""What the errors of a store's clients mean: refused, missing, full, damaged, or passing.

obstore, the operating system and Polars say it each in their own way; here it becomes one of `rise_ops.errors`.
What is not known to be permanent counts as passing over a network, where trying again ends with the budget; on a
disk it is permanent.
"""

from __future__ import annotations

import re

from obstore import exceptions as obstore_errors

from rise_ops.errors import CurationError, IntegrityError, MissingObjectError, StoreError, TransientError
from rise_ops.spool import is_full

REFUSED = "access refused"
"""In messages about what a server does not let these credentials do."""

_REFUSALS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "AccessDenied")
_REFUSALS_LOCAL = ("Read-only file system", "Permission denied", "Operation not permitted")
_NO_CREDENTIALS = "169.254.169.254"  # where a client without keys asks a machine in Amazon's cloud for its role
_SPENT = re.compile(r"after [1-9]\d* retries")
_PERMANENT = (
    obstore_errors.InvalidPathError,
    obstore_errors.NotSupportedError,
    obstore_errors.UnknownConfigurationKeyError,
)


def store_error(error: Exception, *, root: str, where: str) -> CurationError:
    """The error of ours that a client's error means; the clients' texts can be long and are cut.

    Parameters
    ----------
    error
        From obstore, from the system, or, where neither, from Polars or zarr: what it got is not what it wants.
    root
        The store's URI.
    where
        What it was about, in full.
    """
    is_local = "://" not in root
    text = str(error)
    if "NoSuchBucket" in text:
        return StoreError(f"the bucket of {root} does not exist; create it first")
    if isinstance(error, (obstore_errors.NotFoundError, FileNotFoundError, IsADirectoryError)):
        return MissingObjectError(f"{where} is not in the store")
    if _NO_CREDENTIALS in text:
        return StoreError(
            f"{where}: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and, for servers "
            "other than Amazon's, AWS_ENDPOINT_URL)"
        )
    refused = (obstore_errors.PermissionDeniedError, obstore_errors.UnauthenticatedError, PermissionError)
    if isinstance(error, refused) or any(mark in text for mark in (_REFUSALS_LOCAL if is_local else _REFUSALS)):
        return StoreError(_refusal(where, is_local=is_local))
    if is_full(error):
        return StoreError(f"no space left while writing {where}; free some and run again")
    if not isinstance(error, (obstore_errors.BaseError, OSError)):
        return IntegrityError(f"{where} is damaged ({first_line(text)}); `curate verify --deep` tells what is")
    if is_local or isinstance(error, _PERMANENT):
        return StoreError(f"{where}: {first_line(text)}")
    if "400 Bad Request" in text and "RequestTimeout" not in text:  # an answer to HEAD has no body to say more
        return StoreError(_refusal(where, is_local=is_local))
    passing = TransientError(f"{where}: {first_line(text)}; the server did not answer as expected")
    passing.spent = is_spent(error)
    return passing


def is_spent(error: Exception) -> bool:
    """Whether obstore or Polars says that it has tried again itself."""
    return _SPENT.search(str(error)) is not None


def _refusal(where: str, *, is_local: bool) -> str:
    if is_local:
        return f"{where} cannot be accessed: permission denied or read-only; check the folder's owner and mount"
    return (
        f"{where}: {REFUSED}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN and "
        "AWS_ENDPOINT_URL, and that they may read and write this prefix"
    )


def first_line(text: str) -> str:
    """A message's beginning."""
    return text.strip().splitlines()[0][:300] if text.strip() else "unknown error"
