"""Temporary folders for what does not fit in memory, below TMPDIR; a full one is named.

What is spooled is removed with the context, also after an error.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rise_ops.errors import StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|\d+ requested and \d+ written")


@contextmanager
def spool() -> Iterator[Path]:
    """An empty temporary folder.

    Raises
    ------
    StoreError
        There is none, or its disk is full; the message says which folder and what to do.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="curate-")
    except OSError as error:
        detail = error.strerror or str(error)
        raise StoreError(f"no usable temporary folder ({detail}); set TMPDIR to a folder with space") from error
    with made as folder:
        try:
            yield Path(folder)
        except _client_errors() as error:
            if not is_full(error):
                raise
            raise StoreError(
                f"the temporary folder {os.path.dirname(folder)} is full; free space there, or set TMPDIR to a folder "
                "with more"
            ) from error


def is_full(error: BaseException) -> bool:
    """Whether a client's error means that a local disk is full."""
    return getattr(error, "errno", None) in _FULL or _FULL_TEXT.search(str(error)) is not None


def _client_errors() -> tuple[type[Exception], ...]:
    """OSError, and that of Polars where it is in use."""
    polars = sys.modules.get("polars")
    return (OSError,) if polars is None else (OSError, polars.exceptions.PolarsError)
