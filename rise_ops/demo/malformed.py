"""Rows that ingestion must reject, one of each common kind, as the bytes of a JSONL line."""

from __future__ import annotations

import json

OVERLONG_CHARACTERS = 20_000
"""Length of the over-long row's text; the demo's `limits.row_bytes` is below it."""

_LONG = json.dumps({"id": "x-long", "instruction": "Summarise the log.", "output": "ok " * (OVERLONG_CHARACTERS // 3)})

LINES: dict[str, tuple[bytes, ...]] = {
    "bad_json": (
        b'{"id": "x-1", "instruction": "Where is my parcel?", "output": "It left on Mon',
        b"{'id': 'x-2', 'instruction': 'single quotes', 'output': 'are not JSON'}",
        b'{"id": "x-3", "instruction": "A comma is missing" "output": "here"}',
    ),
    "not_utf8": (
        b'{"id": "x-4", "instruction": "Caf\xe9 opening hours?", "output": "From nine to five."}',
        b'{"id": "x-5", "instruction": "What does it cost?", "output": "\xa35 for children."}',
    ),
    "not_an_object": (b'["x-6", "a list", "is not a row"]', b'"only a string"'),
    "no_text": (b'{"id": "x-7", "label": "clean"}', b'{"id": "x-8", "instruction": "", "output": "  "}'),
    "wrong_type": (
        b'{"id": "x-9", "instruction": "How many?", "output": 42}',
        b'{"id": "x-10", "instruction": ["a", "list"], "output": "of words"}',
    ),
    "bad_unicode": (b'{"id": "x-11", "instruction": "Half a pair: \\ud83d", "output": "The other half is gone."}',),
    "too_long": (_LONG.encode(),),
}
"""Lines by the kind of fault."""
