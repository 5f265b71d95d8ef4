"""What must not be written down: the values of secrets that this process was given, taken out of a text.

Our own messages hold none. Those of clients and libraries are not ours, so what is kept of an error, or sent to
others, goes through here first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|ACCESS_KEY|API_?KEY|AUTH", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SIGNED = re.compile(r"(?i)\b((?:x-amz-[a-z-]+|signature|sig|awsaccesskeyid|access_token|token|api_?key)=)[^&\s'\"]+")
_MIN_CHARACTERS = 6
"""A shorter value is not taken for a secret: it would be found in words that say nothing of it."""
_HIDDEN = "***"


def redacted(text: str) -> str:
    """`text` without secrets: values of variables whose names say so, users in URLs, signed parts of queries."""
    for value in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return _SIGNED.sub(rf"\1{_HIDDEN}", _USER_INFO.sub(_HIDDEN, text))


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


def _secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name):
            yield from (found for found in _parts(value) if len(found) >= _MIN_CHARACTERS)


def _parts(value: str) -> Iterator[str]:
    """A value; of a JSON object, the values under secret names."""
    try:
        document = json.loads(value) if value.startswith("{") else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        yield value
        return
    yield from (item for name, item in document.items() if isinstance(item, str) and _SECRET_NAME.search(name))
