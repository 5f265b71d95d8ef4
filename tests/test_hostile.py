"""Hostile rows: every outcome is a row exactly as written, a row in quarantine with its reason, or a named error."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.errors import SourceError
from rise_ops.readers import MAX_COLUMNS, MAX_NAME_BYTES
from rise_ops.rows import RowFault
from rise_ops.store import Store
from tests.corpora import corpus_of, ingest_all, ingest_path, jsonl, rejections
from tests.fuzz.cases import Sources
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import sources as fuzz_sources
from tests.fuzz.targets import read_source
from tests.hostile import read_all


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"text": "a", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested_too_deep"),
        (b'{"text": "a", "n": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested_too_deep"),
        (b'{"text": "a", "n": ' + b"[" * 100_000, "nested_too_deep"),
        (b'{"text": "a", "n": 1e999}', "bad_number"),
        (b'{"text": "a", "n": [-1e400]}', "bad_number"),
        (b'{"text": "a", "n": NaN}', "bad_number"),
        (b'{"text": "a\\ud800"}', "bad_unicode"),
        (b'{"text": "a", "\\udfff": 1}', "bad_unicode"),
        (b'{"text": "a", "x": {"\\udfff": ["\\ud800"]}}', "bad_unicode"),
        (b'{"text": "\xed\xa0\x80"}', "not_utf8"),
        (b'{"text": "a", "' + b"k" * (MAX_NAME_BYTES + 1) + b'": 1}', "bad_name"),
        (b'{"text": "a", "a": 1, "\\u0061": 2}', "bad_json"),
        (b"\x00\x00\x00", "bad_json"),
        ('{"text": "a"}'.encode("utf-16"), "not_utf8"),
    ],
)
def test_json_that_is_set_aside(local: Store, tmp_path: Path, line: bytes, error: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line + b'\n{"text": "good"}\n')
    made = ingest_path(local, tmp_path / "a.jsonl")
    assert next(iter(rejections(local, made).values())) == error
    version = ingest_all(local, corpus_of(tmp_path / "a.jsonl"))
    assert version.rows == made.rows


@pytest.mark.parametrize(
    "columns",
    [
        {"": 1, " ": 2, "a.b": 3, "a\x00b": 4, "\u202ekey": 5, "k" * MAX_NAME_BYTES: 6, "A": 7, "a": 8},
        {"doc_id": 1, "value": "v", "source_uri": None, "source_row": [1], "text_field": {}, "meta": {"a": 1}},
        {"n": 2**63, "m": -(2**63) - 1, "o": 10**300, "p": 2**53 + 1, "q": 5e-324, "r": -0.0},
        {"a": "\x00\x1b[31m\u2028\u2029\u202e\ufeff\x85\r\n", "b": "\U0010ffff", "c": "\ufffe"},
        {"deep": json.loads("[" * 98 + "1" + "]" * 98)},
        {"deep": json.loads('{"a":' * 98 + "1" + "}" * 98)},
    ],
)
def test_strange_rows_are_kept_exactly(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = [{"text": "a\x00b \u2028 c", **columns}, {"text": "other", **dict.fromkeys(columns)}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.value for row in read_all(path)] == rows
    assert read_source(path)["rows"] == 2  # through the export and back


def test_labels_of_every_type_in_one_column(tmp_path: Path) -> None:
    labels = [1, "x", [1], {"a": 1}, None, 1.5, True, 2**70]
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "a", "label": label} for label in labels]))
    assert read_source(path) == {"rows": len(labels)}


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"text,x\na\x00b,\x00\n", [{"text": "a\x00b", "x": "\x00"}]),
        ("text,x\na\u2028b\x85c,\x1c\x0b\x0c\n".encode(), [{"text": "a\u2028b\x85c", "x": "\x1c\x0b\x0c"}]),
        (b'text,x\r\n"a\rb\r\nc",d\r\n', [{"text": "a\rb\r\nc", "x": "d"}]),
        (b"text,x\na\rb,c\nd,e\n", ["bad_csv", {"text": "d", "x": "e"}]),
        (b"text\n" + b"\n" * 1000 + b"a\n", [{"text": "a"}]),
    ],
)
def test_control_characters_in_csv(tmp_path: Path, data: bytes, values: list[Any]) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    found = [row.value.error if isinstance(row.value, RowFault) else row.value for row in read_all(tmp_path / "a.csv")]
    assert found == values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (",".join(f"c{place}" for place in range(MAX_COLUMNS + 1)).encode() + b"\n", "more than 10,000"),
        (b"k" * (MAX_NAME_BYTES + 1) + b"\n", "the most is 1,000"),
        ("text\n".encode("utf-16"), "is not UTF-8"),
        (b"text\ra\r", "new-line character"),
    ],
)
def test_csv_headers_that_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_all(tmp_path / "a.csv")


def test_quotes_cannot_make_reading_quadratic(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\n" + b'"a\n' * 200_000)
    assert len(read_all(tmp_path / "a.csv")) == 200_000


# Properties


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3) | st.sampled_from(["text", "doc_id", "meta"]), _VALUES, max_size=4),
        max_size=4,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_json_is_kept_exactly_or_set_aside(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps({"text": "t"} | row) + "\n" for row in rows))
    assert read_source(path).total() == len(rows)


@given(
    data=st.binary(max_size=300),
    suffix=st.sampled_from(["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "csv.zst"]),
)
@settings(max_examples=150, deadline=None)
def test_any_bytes_have_an_outcome(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
    path.write_bytes(data)
    read_source(path)


@pytest.mark.parametrize("name", sorted(fuzz_sources()))
def test_damaged_sources_have_an_outcome(tmp_path: Path, name: str) -> None:
    choose, whole = random.Random(name), fuzz_sources()[name]
    path = tmp_path / name
    for _ in range(40):
        path.write_bytes(mutated(whole, choose))
        read_source(path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_little_fuzzing_finds_nothing(tmp_path: Path, seed: int) -> None:
    target, choose = Sources(tmp_path), random.Random(seed)
    for _ in range(600):
        target.run(*target.pick(choose))
