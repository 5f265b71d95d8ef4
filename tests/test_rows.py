"""Canonical rows: shapes, identity, and what is refused with which reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rise_ops.config import FieldMap, LimitsConfig
from rise_ops.hashing import fingerprint
from rise_ops.rows import CanonicalRow, RowFault, canonical_row, ingest_fingerprint, raw_text

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def _row(columns: dict[str, Any], *, fields: FieldMap | None = None, row_bytes: int = 2**20) -> CanonicalRow:
    return canonical_row(columns, fields=fields or FieldMap(), row_bytes=row_bytes)


@pytest.mark.parametrize(
    ("columns", "fields", "text", "prompt", "text_field"),
    [
        ({"text": "a b"}, None, "a b", None, "text"),
        ({"text": " a b\n"}, None, "a b", None, None),
        ({"text": "Q: x A: y", "prompt_text": "Q: x"}, None, "Q: x A: y", "Q: x", "text"),
        ({"text": " Q: x A: y", "prompt_text": " Q: x"}, None, "Q: x A: y", "Q: x", None),
        ({"text": "abc", "prompt_text": "b"}, None, "abc", None, "text"),
        ({"prompt": "p ", "generation": " g "}, None, "p  g ", "p ", None),
        ({"prompt": "", "generation": "g"}, None, "g", None, "generation"),
        ({"instruction": "i", "input": "n", "output": "o"}, None, "i\nn\no", None, None),
        ({"instruction": "i ", "input": " ", "output": "o "}, None, "i \no", None, None),
        ({"instruction": "i", "input": None, "output": "o"}, None, "i\no", None, None),
        ({"text": None, "instruction": "i", "output": "o"}, None, "i\no", None, None),
        ({"text": "t", "instruction": "i", "output": "o"}, None, "t", None, "text"),
        ({"body": " b ", "text": "t"}, FieldMap(text="body"), "b", None, None),
        ({"body": "b", "text": "t"}, FieldMap(text="body"), "b", None, "body"),
        ({"q": "Q ", "a": "A "}, FieldMap(text="a", prompt="q"), "Q A ", "Q ", None),
        ({"q": None, "a": "A"}, FieldMap(text="a", prompt="q"), "A", None, "a"),
    ],
)
def test_shapes(
    columns: dict[str, Any], fields: FieldMap | None, text: str, prompt: str | None, text_field: str | None
) -> None:
    row = _row(columns, fields=fields)
    assert (row.text, row.prompt, row.text_field) == (text, prompt, text_field)
    assert row.doc_id == fingerprint([text, prompt])
    assert row.meta == {name: value for name, value in columns.items() if name != text_field}


@pytest.mark.parametrize(
    ("columns", "fields", "error", "reason"),
    [
        ({}, None, "no_text", "has no columns"),
        ({"id": 1, "body": "b"}, None, "no_text", "it has: body, id"),
        ({"text": ""}, None, "no_text", "'text' is empty"),
        ({"text": " \n\u00a0"}, None, "no_text", "'text' is empty"),
        ({"text": None}, None, "no_text", "it has: text"),
        ({"prompt": "p"}, None, "no_text", "expected"),
        ({"prompt": "p", "generation": " "}, None, "no_text", "'generation' is empty"),
        ({"instruction": "", "output": " "}, None, "no_text", "empty"),
        ({"text": "t"}, FieldMap(text="body"), "no_text", "column 'body' (corpus.fields) is missing"),
        ({"body": None}, FieldMap(text="body"), "no_text", "is null"),
        ({"text": 7}, None, "wrong_type", "a number in 'text'"),
        ({"text": True}, None, "wrong_type", "a boolean in 'text'"),
        ({"text": ["a"]}, None, "wrong_type", "a list in 'text'"),
        ({"text": {"a": 1}}, None, "wrong_type", "an object in 'text'"),
        ({"prompt": ["p"], "generation": "g"}, None, "wrong_type", "'prompt'"),
        ({"text": "t", "prompt_text": 1}, None, "wrong_type", "'prompt_text'"),
        ({"instruction": "i", "output": 3}, None, "wrong_type", "'output'"),
        ({"text": "a\ud800"}, None, "bad_unicode", r"\ud800"),
        ({"text": "a", "\udfff": 1}, None, "bad_unicode", r"\udfff"),
        ({"text": "a", "n": float("inf")}, None, "bad_number", "64-bit"),
        ({"text": "a" * 90, "n": "b" * 30}, None, "too_long", "limits.row_bytes is 100"),
    ],
)
def test_refusals(columns: dict[str, Any], fields: FieldMap | None, error: str, reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        _row(columns, fields=fields, row_bytes=100)
    assert caught.value.error == error
    assert reason in caught.value.reason


@given(st.dictionaries(st.text(), _JSON, max_size=4), st.text(min_size=1).filter(str.strip))
def test_nothing_is_lost(columns: dict[str, Any], text: str) -> None:
    columns |= {"text": text}
    row = _row(columns | {"prompt_text": None})
    whole = row.meta | ({} if row.text_field is None else {row.text_field: row.text})
    assert json.dumps(whole, sort_keys=True) == json.dumps(columns | {"prompt_text": None}, sort_keys=True)


def test_meta_is_canonical_and_exact() -> None:
    one = _row({"text": "t", "b": 10**40, "a": 0.1 + 0.2, "c": {"y": 1.0, "x": 1}})
    two = _row({"c": {"x": 1, "y": 1.0}, "a": 0.1 + 0.2, "text": "t", "b": 10**40})
    assert one == two
    assert one.meta_json == '{"a":0.30000000000000004,"b":1' + "0" * 40 + ',"c":{"x":1,"y":1.0}}'


def test_the_prompt_is_part_of_the_identity() -> None:
    assert _row({"prompt": "a", "generation": "b"}).doc_id != _row({"text": "ab"}).doc_id


def test_raw_text_is_cut_and_escaped() -> None:
    assert raw_text(b"\xff\xfe" + b"x" * 1000) == "\\xff\\xfe" + "x" * 492
    assert raw_text("\ud800" * 1000) == "\\ud800" * 83 + "\\u"


def test_the_fingerprint_covers_what_decides_rows() -> None:
    plain = ingest_fingerprint(FieldMap(), LimitsConfig())
    assert plain == ingest_fingerprint(FieldMap(), LimitsConfig(bad_rows=0.5))
    assert plain != ingest_fingerprint(FieldMap(text="body"), LimitsConfig())
    assert plain != ingest_fingerprint(FieldMap(), LimitsConfig.model_validate({"row_bytes": 1000}))
