"""The store's JSON documents: parsed strictly, and held against what their reader expects.

A document may have been cut off, edited, or written by another program. Whoever reads one names its shape (a
dataclass; what it does not mention is ignored) and what it must hold by its place; all else that could be wrong
with it ends here, as one error that names it. Numbers are strict (no text, no booleans, nothing beyond 64 bits,
no infinities), text is UTF-8, and nesting is bounded by the parser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any

from awscrt.checksums import crc32c
from pydantic import Field, TypeAdapter, ValidationError

from rise_ops.errors import DamagedError, IntegrityError
from rise_ops.hashing import canonical_json

Count = Annotated[int, Field(ge=0, lt=2**63)]
"""A number of things."""

_SEAL = re.compile(rb',?"checksum":"crc32c:([0-9a-f]{8})"\}\n\Z')
_SEAL_BYTES = 40
_LARGE = re.compile(rb"[0-9]{19}|[eE]\+?[0-9]{3}|NaN|Infinity")
"""What every number beyond 64 bits has in its text, and what JSON has no number for."""


def sealed(value: Any) -> bytes:
    """A JSON object as it is stored: canonical, with the CRC-32C of the text without it as its last key, `checksum`."""
    text = canonical_json(value).encode()
    comma = b"" if text == b"{}" else b","
    return b'%s%s"checksum":"crc32c:%08x"}\n' % (text[:-1], comma, crc32c(text))


def document(
    data: bytes,
    *,
    where: str,
    format_version: int | None = None,
    shape: type[Any] | None = None,
    holds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A JSON object from its bytes.

    Parameters
    ----------
    data
        The bytes.
    where
        URL, for messages.
    format_version
        The newest format that the caller reads.
    shape
        Dataclass that names its keys and their types.
    holds
        Values that it must have, because its place says so.

    Raises
    ------
    DamagedError
        It is not such a document.
    IntegrityError
        It was written in a newer format.
    """
    data = _unsealed(data, where)
    value = _validated(Any, data, where, "is not valid JSON")
    if not isinstance(value, dict):
        raise _damaged(where, "does not hold a JSON object")
    version = value.get("format_version", 0)
    if type(version) is not int or version < 0:
        raise _damaged(where, "has a format version that is not a number")
    if format_version is not None and version > format_version:
        raise IntegrityError(
            f"{where} has format version {version:,}, this program reads up to {format_version}; upgrade it"
        )
    _refuse_infinite(data, value, where)
    if shape is not None:
        _refuse_other_shape(data, value, shape, where)
    for name, expected in (holds or {}).items():
        if value.get(name) != expected:
            raise _damaged(
                where, f"says that its {name} is {str(value.get(name))[:100]!r}, its place says {expected!r}"
            )
    return value


def _unsealed(data: bytes, where: str) -> bytes:
    """The document without its checksum, which must be right where there is one."""
    found = _SEAL.search(data, max(0, len(data) - _SEAL_BYTES))
    if found is None:
        return data
    text = data[: found.start()] + b"}"
    if crc32c(text) != int(found[1], 16):
        raise _damaged(where, "does not match its own checksum")
    return text


def _refuse_infinite(data: bytes, value: Any, where: str) -> None:
    if _LARGE.search(data):
        try:
            canonical_json(value)
        except ValueError as error:
            raise _damaged(where, "holds a number that is not a finite 64-bit float") from error


def _refuse_other_shape(data: bytes, value: Any, shape: type[Any], where: str) -> None:
    _validated(shape, data, where, "is not what it should be")
    if _LARGE.search(data) and not _fits(value):
        raise _damaged(where, "holds an integer beyond 64 bits")


def _fits(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_fits, value.values()))
    if isinstance(value, list):
        return all(map(_fits, value))
    return not isinstance(value, int) or -(2**63) <= value < 2**63


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _validated(shape: Any, data: bytes, where: str, otherwise: str) -> Any:
    try:
        return _adapter(shape).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"{part}: " for part in first["loc"])[:200]
        raise _damaged(where, f"{otherwise} ({place}{first['msg'][:200]})") from error


def _damaged(where: str, what: str) -> DamagedError:
    return DamagedError(f"{where} {what}; delete it and run again", where)
