"""The canonical row: what every source format becomes before anything else looks at it.

A row of a source is a mapping of columns. Its text comes from, in this order:

1. the configured columns: `text` alone (stripped), or `prompt` followed by `text`, as they are;
2. `text` (stripped); a `prompt_text` that it begins with is its prompt;
3. `prompt` followed by `generation`, as they are;
4. `instruction`, `input`, `output`, joined by newlines, empty ones left out, the whole stripped.

A column that is null counts as absent. `doc_id = sha256(canonical_json([text, prompt]))`. All other columns
go to `meta`, one canonical JSON object; the text's own column is left out of it where it equals the text to
the letter (`text_field` names it), so nothing is stored twice and nothing is lost.

A row that does not fit raises `RowFault`, which says why; the caller counts and keeps it.
"""

from __future__ import annotations

import hashlib
import json
from json.encoder import encode_basestring as _quoted
from typing import Any, NamedTuple

from rise_ops.config import FieldMap, LimitsConfig
from rise_ops.hashing import fingerprint

ROW_FORMAT = 1
"""Version of this mapping; a change of it changes what is ingested."""

RAW_CHARACTERS = 500
"""How much of a rejected row is kept."""

# What hashing.canonical_json does, with the encoder made once: this runs for every row.
_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


class RowFault(Exception):
    """A row that cannot be taken.

    Parameters
    ----------
    error
        Class of the fault, such as `bad_json` or `no_text`.
    reason
        The rest of a sentence that begins with the row's place: "is not valid JSON: …".
    """

    def __init__(self, error: str, reason: str) -> None:
        super().__init__(error, reason)
        self.error = error
        self.reason = reason


class CanonicalRow(NamedTuple):
    """One example as it is trained on. (A tuple: it is made for every row, and much faster to make.)"""

    doc_id: str
    """SHA-256 of text and prompt, in hexadecimal."""
    text: str
    """The full text, prompt included."""
    prompt: str | None
    """Beginning of `text` that is a prompt."""
    text_field: str | None
    """Source column that equals `text` to the letter."""
    meta_json: str
    """All other columns: canonical JSON."""
    size: int
    """Bytes of all columns in canonical form."""

    @property
    def meta(self) -> dict[str, Any]:
        """All other columns, parsed."""
        columns: dict[str, Any] = json.loads(self.meta_json)
        return columns

    @property
    def columns(self) -> dict[str, Any]:
        """All columns of the source that are known to the letter: `meta`, and the one that equals the text."""
        return self.meta if self.text_field is None else {**self.meta, self.text_field: self.text}


def ingest_fingerprint(fields: FieldMap, limits: LimitsConfig) -> str:
    """What, besides an object's bytes, decides which rows it becomes."""
    return fingerprint(
        {"format": ROW_FORMAT, "fields": fields.model_dump(mode="json"), "row_bytes": int(limits.row_bytes)}
    )


def canonical_row(columns: dict[str, Any], *, fields: FieldMap, row_bytes: int) -> CanonicalRow:
    """A source row in canonical form.

    Parameters
    ----------
    columns
        Values as JSON knows them. Not changed.
    fields
        Configured columns, if any.
    row_bytes
        Largest canonical size.

    Raises
    ------
    RowFault
        no_text, wrong_type, too_long, bad_unicode or bad_number.
    """
    text, prompt, field = _text(columns, fields)
    rest = columns
    if field is not None:
        rest = columns.copy()
        del rest[field]
    try:
        identity = f"[{_quoted(text)},{'null' if prompt is None else _quoted(prompt)}]".encode()
        meta = _canonical(rest)
        size = len(meta.encode()) + (0 if field is None else len(identity))
    except UnicodeEncodeError as error:
        code = f"\\u{ord(error.object[error.start]):04x}"
        raise RowFault("bad_unicode", f"holds the lone surrogate {code}, which is not a character") from None
    except ValueError:
        raise RowFault("bad_number", "holds a number outside the range of a 64-bit float") from None
    if size > row_bytes:
        raise RowFault("too_long", f"has {size:,} bytes, limits.row_bytes is {row_bytes:,}")
    return CanonicalRow(hashlib.sha256(identity).hexdigest(), text, prompt, field, meta, size)


def raw_text(data: bytes | str) -> str:
    """The beginning of a rejected row for the report; what is not UTF-8 is escaped."""
    if isinstance(data, bytes):
        data = data[: 4 * RAW_CHARACTERS].decode("utf-8", "backslashreplace")
    return well_formed(data[:RAW_CHARACTERS])[:RAW_CHARACTERS]


def well_formed(text: str) -> str:
    """`text` with lone surrogates escaped, so that it can be stored."""
    return text.encode("utf-8", "backslashreplace").decode()


def _text(columns: dict[str, Any], fields: FieldMap) -> tuple[str, str | None, str | None]:
    """(text, prompt, the column that equals text)."""
    if fields.text is not None:
        if columns.get(fields.text) is None:
            state = "is null" if fields.text in columns else "is missing"
            raise RowFault("no_text", f"has no text: column '{fields.text}' (corpus.fields) {state}; {_names(columns)}")
        if fields.prompt is not None:
            return _prompted(columns, fields.prompt, fields.text)
        return _plain(columns, fields.text)
    if columns.get("text") is not None:
        return _plain(columns, "text")
    if columns.get("generation") is not None:
        return _prompted(columns, "prompt", "generation")
    if columns.get("instruction") is not None or columns.get("output") is not None:
        parts = (_string(columns, name) for name in ("instruction", "input", "output"))
        return _filled("\n".join(part for part in parts if part.strip()).strip(), "its columns are empty"), None, None
    raise RowFault(
        "no_text",
        f"has no text: expected 'text', 'prompt' with 'generation', or 'instruction' with 'output'; {_names(columns)}",
    )


def _plain(columns: dict[str, Any], name: str) -> tuple[str, str | None, str | None]:
    value = _string(columns, name)
    text = _filled(value.strip(), f"'{name}' is empty")
    prompt: str | None = None
    if name == "text" and "prompt_text" in columns:
        prompt = _string(columns, "prompt_text").lstrip()  # as the text is
        if not prompt or prompt == text or not text.startswith(prompt):
            prompt = None
    return text, prompt, name if text == value else None


def _prompted(columns: dict[str, Any], first: str, second: str) -> tuple[str, str | None, str | None]:
    prompt, answer = _string(columns, first), _string(columns, second)
    _filled(answer.strip(), f"'{second}' is empty")
    if not prompt:
        return answer, None, second
    return prompt + answer, prompt, None


def _string(columns: dict[str, Any], name: str) -> str:
    value = columns.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowFault("wrong_type", f"has {_kind(value)} in '{name}' where text is expected")
    return value


def _filled(text: str, otherwise: str) -> str:
    if not text:
        raise RowFault("no_text", f"has no text: {otherwise}")
    return text


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    return "a list" if isinstance(value, list) else "an object"


def _names(columns: dict[str, Any]) -> str:
    if not columns:
        return "it has no columns"
    names = ", ".join(sorted(columns)[:8])
    return f"it has: {names[:200]}{', …' if len(columns) > 8 or len(names) > 200 else ''}"
