"""Telling of a run what nobody needs for its result: artifacts, metrics, lineage events.

Whatever goes wrong with it is a warning: it is no reason to fail a run, nor may it hide why one failed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from rise_ops.errors import CurationError
from rise_ops.redaction import error_text

_logger = logging.getLogger(__name__)


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Within it, errors of the store and of the Prefect server are warnings: `what` is missing."""
    try:
        yield
    except (CurationError, httpx.HTTPError) as error:
        _logger.warning("%s: not told; %s", what, error_text(error).partition("\n")[0])
