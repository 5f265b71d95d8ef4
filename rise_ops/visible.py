"""Text from a corpus, made safe to look at.

Row text may hold control characters, half surrogate pairs, invisible characters and marks that reverse the
direction of what follows. `visible` writes each as a readable sign and leaves everything else alone.
Escaping markup is not done here: that is the template's work.
"""

from __future__ import annotations

import re

_PICTURES = 0x2400
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with control, direction and invisible characters spelled out.

    Tabs and line feeds stay; other ASCII controls become their Unicode pictures (␀), the rest ‹U+202E›.

    Examples
    --------
    >>> visible("a\\x00b")
    'a␀b'
    >>> visible("user\\u202egnp.exe")
    'user‹U+202E›gnp.exe'
    """
    return _HIDDEN.sub(_sign, text)


def _sign(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(_PICTURES + code)
    return "␡" if code == 0x7F else f"‹U+{code:04X}›"
