"""Content identity: canonical JSON and SHA-256.

Ids come from content, never from position, path or worker: the same value gives the same id on every
machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """`value` as JSON with sorted keys and no spaces; equal values give equal text.

    Raises
    ------
    ValueError
        For NaN and infinities, which JSON does not have.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def sha256_hex(data: bytes) -> str:
    """SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of a value's canonical JSON, in hexadecimal."""
    return sha256_hex(canonical_json(value).encode("utf-8"))
