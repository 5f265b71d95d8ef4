"""What must not be written down: the values of secrets that this process was given, taken out of a text.

Our own messages hold none. Those of clients and libraries are not ours, so what is kept of an error, or sent to
others, goes through here first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import quote

_SECRET_NAME = re.compile(
    r"(?i)SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|ACCESS_KEY|API_?KEY|AUTH(?!OR(?!I[SZ]))"
)
_NO_SECRET = re.compile(r"(?i)_(?:TYPE|FILE|MODE|SOCK|METHOD)$")
"""Names of variables that say how a secret is used or where it is."""
_WORD = re.compile(r"[^\s'\"]+")
_USER_AND_PASSWORD = re.compile(r"[^/:]*:(?!\d{1,5}(?:[/?#]|$))")
"""What a URL begins with whose authority has a colon that no port follows."""
_SIGNED = re.compile(
    r"(?i)\b(?:x-amz-[a-z-]{1,40}|signature|sig|awsaccesskeyid|access_token|token|api_?key)=([^&\s'\"]+)"
)
_MIN_CHARACTERS = 6
"""A shorter value is not taken for a secret: it would be found in words that say nothing of it."""
_HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` without secrets: values of variables whose names say so, users in URLs, signed parts of queries.

    Takes time in proportion to the text. What to hide is looked for in the text as it came, so that hiding one secret
    does not hide from us where another one is.
    """
    spans = [found.span(1) for found in _SIGNED.finditer(text)]
    spans += _user_infos(text)
    for value in set(_secrets()):
        spans += [found.span() for found in re.finditer(re.escape(value), text)]
    kept, end = [], 0
    for first, last in sorted(spans):
        if first >= end:
            kept += [text[end:first], _HIDDEN]
        end = max(end, last)
    return "".join([*kept, text[end:]])


def error_text(error: BaseException) -> str:
    """An error as records name it: its type and its message, without secrets."""
    return redacted(f"{type(error).__name__}: {error}")


def disarm(error: BaseException) -> None:
    """Take secrets out of the texts of an error and of those that it came from: clients quote what servers echo.

    What is logged with a traceback, or kept of a failed task by Prefect, is all of them.
    """
    waiting, seen = [error], set[int]()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        each.args = tuple(redacted(part) if isinstance(part, str) else part for part in each.args)
        if isinstance(each, OSError) and isinstance(each.strerror, str):
            each.strerror = redacted(each.strerror)
        waiting += [other for other in (each.__cause__, each.__context__) if other is not None]


def _user_infos(text: str) -> Iterator[tuple[int, int]]:
    """Where users and passwords are in URLs.

    They end at the last @ of the authority; where there is a password, which may hold a slash, at the last @ of all.
    """
    for word in _WORD.finditer(text):
        last = text.rfind("@", *word.span())
        start = text.find("://", word.start(), max(last, 0))
        while start >= 0:
            start += len("://")
            if _USER_AND_PASSWORD.match(text, start, word.end()):
                yield start, last
                break
            slash = text.find("/", start, last)
            at = text.rfind("@", start, last + 1 if slash < 0 else slash)
            if at > start:
                yield start, at
            start = text.find("://", start, last)


def _secrets() -> Iterator[str]:
    """Values that are secret, also as URLs hold them."""
    for name, value in os.environ.items():
        for found in _parts(name, value):
            if len(found) >= _MIN_CHARACTERS:
                yield from (found, quote(found), quote(found, safe=""))


def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None and _NO_SECRET.search(name) is None


def _parts(name: str, value: object) -> Iterator[str]:
    """A value with a secret name; of a JSON object, whatever its name, the values under secret names."""
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _parts(str(key), each)
    elif isinstance(value, str) and _is_secret(name):
        yield value
