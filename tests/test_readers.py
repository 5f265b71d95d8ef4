"""Readers: every row of every format comes out once, as a row or as a named fault; damage names the object."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.errors import SourceError
from rise_ops.readers import MAX_COLUMNS, JsonLinesReader, SourceRow, format_of, open_rows
from rise_ops.readers_csv import CsvReader
from rise_ops.rows import RowFault
from rise_ops.streams import HashingReader
from tests.corpora import compress, jsonl, listed, make_rows, write_as

_SUFFIXES = [
    "jsonl", "jsonl.gz", "jsonl.zst", "json", "ndjson", "parquet", "arrow", "feather", "csv", "csv.gz", "csv.zst"
]  # fmt: skip


def _read(path: Path, *, row_bytes: int = 2**20) -> list[SourceRow]:
    with open_rows(listed(path), row_bytes=row_bytes) as reader:
        return list(reader)


def _json_lines(data: bytes, *, row_bytes: int = 2**20, chunk_bytes: int = 2**20) -> list[SourceRow]:
    stored = HashingReader(io.BytesIO(data), chunk_bytes=chunk_bytes)
    return list(JsonLinesReader(stored, uri="memory://x.jsonl", row_bytes=row_bytes))


def _csv(data: bytes, *, row_bytes: int = 2**20, chunk_bytes: int = 2**20) -> list[SourceRow]:
    stored = HashingReader(io.BytesIO(data), chunk_bytes=chunk_bytes)
    return list(CsvReader(stored, uri="memory://x.csv", row_bytes=row_bytes))


def _plain(rows: list[SourceRow]) -> list[tuple[Any, ...]]:
    """Comparable rows: a fault by its class and reason."""
    return [
        (*row[:2], (row.value.error, row.value.reason) if isinstance(row.value, RowFault) else row.value, row.raw)
        for row in rows
    ]


def _fault(rows: list[SourceRow]) -> RowFault:
    (row,) = rows
    assert isinstance(row.value, RowFault)
    return row.value


@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    expected = [*make_rows(250), {"id": "é", "text": 'quoted "x", and\nnewlines'}]
    path = write_as(tmp_path / f"rows.{suffix}", expected)
    found = _read(path)
    assert [row.value for row in found] == expected
    assert [row.source_row for row in found] == list(range(251))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl.bz2", "a.parquet.gz", "https://host/a.txt?x=.jsonl"])
def test_an_unknown_format_is_named(name: str) -> None:
    with pytest.raises(SourceError, match="format not known"):
        format_of(name)


def test_formats_by_name() -> None:
    assert format_of("s3://b/A.JSONL.GZ") == ("jsonl", "gz")
    assert format_of("https://host/a.csv.zst?version=2") == ("csv", "zst")


@pytest.mark.parametrize(
    ("line", "error", "reason"),
    [
        (b'{"text": "a"', "bad_json", "Expecting ',' delimiter at column 13"),
        (b"nonsense", "bad_json", "Expecting value at column 1"),
        (b'{"a": 1} {"b": 2}', "bad_json", "Extra data at column 10"),
        (b'{"a": 1, "a": 2}', "bad_json", "names 'a' twice"),
        (b'{"x": {"a": 1, "a": 2}}', "bad_json", "names 'a' twice"),
        (b'{"text": "tab\there"}', "bad_json", "Invalid control character"),
        (b'{"text": "caf\xe9"}', "not_utf8", "byte 0xe9 at byte 14"),
        (b"[1, 2]", "not_an_object", "a list"),
        (b'"text"', "not_an_object", "a string"),
        (b"17", "not_an_object", "a number"),
        (b"null", "not_an_object", "null"),
        (b"true", "not_an_object", "a boolean"),
        (b'{"n": NaN}', "bad_number", "NaN"),
        (b'{"n": -Infinity}', "bad_number", "-Infinity"),
        (b'{"n": ' + b"9" * 5000 + b"}", "bad_number", "digits"),
        (b'{"n": ' + b"[" * 101 + b"]" * 101 + b"}", "nested_too_deep", "100 levels"),
        (b'{"n": ' + b"[" * 99_000 + b"]" * 99_000 + b"}", "nested_too_deep", "100 levels"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "too_long", "has 200,012 bytes, limits.row_bytes is 200,000"),
    ],
)
def test_json_refusals(line: bytes, error: str, reason: str) -> None:
    fault = _fault(_json_lines(line + b"\n", row_bytes=200_000))
    assert fault.error == error
    assert reason in fault.reason


def test_json_lines_conventions() -> None:
    """A byte order mark, CRLF, blank lines (which count as lines) and a missing last newline are all fine."""
    found = _json_lines(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\n{"a": 2}')
    assert [(row.source_row, row.number, row.value) for row in found] == [(0, 1, {"a": 1}), (3, 4, {"a": 2})]
    assert _json_lines(b"") == []


def test_depth_of_the_limit_is_fine() -> None:
    (row,) = _json_lines(b'{"n": ' + b"[" * 99 + b"]" * 99 + b"}")
    assert isinstance(row.value, dict)


def test_the_limit_is_the_line_without_its_end() -> None:
    line = b'{"a": "' + b"x" * 100 + b'"}'
    for end in (b"", b"\n", b"\r\n"):
        assert isinstance(_json_lines(line + end, row_bytes=len(line))[0].value, dict)
        assert _fault(_json_lines(line + end, row_bytes=len(line) - 1)).error == "too_long"


@given(st.binary(max_size=200), st.integers(1, 50), st.integers(1, 60))
def test_any_bytes_are_rows_or_faults(data: bytes, chunk_bytes: int, row_bytes: int) -> None:
    found = _json_lines(data, row_bytes=row_bytes)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    filled = [place for place, line in enumerate(lines) if line.removesuffix(b"\r").strip(b" \t\r")]
    assert [row.source_row for row in found] == filled
    again = _json_lines(data, row_bytes=row_bytes, chunk_bytes=chunk_bytes)
    assert _plain(again) == _plain(found)


def test_a_json_array_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n {"text": "a"}\n]\n')
    with pytest.raises(SourceError, match=r"a\.json is one JSON array.*jq"):
        _read(tmp_path / "a.json")


def test_too_many_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl({f"c{place}": 1} for place in range(MAX_COLUMNS + 1)))
    with pytest.raises(SourceError, match="more than 10,000 different columns"):
        _read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_truncation_names_the_last_good_line(tmp_path: Path, kind: str, codec: str) -> None:
    noise = random.Random(0)
    body = b"".join(b'{"text": "%x"}\n' % noise.getrandbits(800) for _ in range(3000))
    path = tmp_path / f"rows.{kind}.{codec}"
    path.write_bytes(compress(b"text\n" + body.replace(b'"', b"") if kind == "csv" else body, path.name)[:-5000])
    with pytest.raises(SourceError, match=rf"rows\.{kind}\.{codec} is truncated after line 2,\d\d\d; upload it again"):
        _read(path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_a_damaged_table_is_named(tmp_path: Path, suffix: str) -> None:
    path = write_as(tmp_path / f"rows.{suffix}", make_rows(300))
    whole = path.read_bytes()
    for data in (b"", b"not a table at all, but some text", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(SourceError, match=rf"rows\.{suffix} is damaged.*upload it again"):
            _read(path)


def test_table_bytes_that_are_not_utf8_cost_one_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"caf\xe9", b"fine"]).cast(pa.binary())
    as_text = pa.StringArray.from_buffers(3, texts.buffers()[1], texts.buffers()[2])
    pq.write_table(pa.table({"text": as_text, "id": [1, 2, 3]}), tmp_path / "a.parquet")
    first, second, third = (row.value for row in _read(tmp_path / "a.parquet"))
    assert (first, third) == ({"text": "good", "id": 1}, {"text": "fine", "id": 3})
    assert isinstance(second, RowFault)
    assert second.error == "not_utf8"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="two columns named 'text'"):
        _read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("record", "error", "reason"),
    [
        (b"a", "bad_csv", "has 1 columns, the header has 2"),
        (b"a,b,c", "bad_csv", "has 3 columns, the header has 2"),
        (b'"a"b,c', "bad_csv", "double it"),
        (b'"never closed,c', "bad_csv", "opens a quote that never closes"),
        (b"caf\xe9,c", "not_utf8", "byte 0xe9 at byte 4"),
        (b"x" * 200 + b",c", "too_long", "limits.row_bytes is 100"),
    ],
)
def test_csv_refusals_cost_one_record(record: bytes, error: str, reason: str) -> None:
    before, bad, after = _csv(b"id,text\n1,one\n" + record + b"\n2,two\n", row_bytes=100)
    assert (before.value, after.value) == ({"id": "1", "text": "one"}, {"id": "2", "text": "two"})
    assert (bad.source_row, bad.number) == (1, 3)
    assert isinstance(bad.value, RowFault)
    assert bad.value.error == error
    assert reason in bad.value.reason


def test_csv_conventions() -> None:
    found = _csv(b'\xef\xbb\xbfid,text\r\n1,"two\r\nlines ""q"""\r\n\r\n2,\r\n')
    assert [(row.source_row, row.number, row.value) for row in found] == [
        (0, 2, {"id": "1", "text": 'two\r\nlines "q"'}),
        (1, 5, {"id": "2", "text": ""}),
    ]
    assert found[0].raw == b'1,"two\r\nlines ""q"""'


def test_an_open_quote_cannot_swallow_the_object() -> None:
    rows = b"".join(b"%d,text %d\n" % (place, place) for place in range(100))
    found = _csv(b'id,text\n0,"open\n' + rows, row_bytes=200)
    assert [row.number for row in found if isinstance(row.value, RowFault)] == [2]
    assert "does not close within 200 bytes" in _fault(found[:1]).reason
    assert len(found) == 101


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,a\n1,2\n", "names column 'a' twice"),
        (b"a,\n1,2\n", "without a name"),
        (b'"a,b\n1,2\n', "its header, line 1, is not valid CSV"),
    ],
)
def test_a_bad_header_is_damage(header: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        _csv(header)


_CELLS = st.text(st.characters(codec="utf-8"), max_size=8)


@given(st.lists(st.tuples(_CELLS, _CELLS), max_size=8), st.integers(1, 20))
@settings(max_examples=60)
def test_csv_that_python_writes_comes_back(cells: list[tuple[str, str]], chunk_bytes: int) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, quoting=csv.QUOTE_ALL)
    writer.writerows([("a", "b"), *cells])
    found = _csv(sink.getvalue().encode(), chunk_bytes=chunk_bytes)
    assert [row.value for row in found] == [{"a": first, "b": second} for first, second in cells]


@given(st.binary(max_size=120), st.integers(1, 20))
@settings(max_examples=100)
def test_any_csv_bytes_are_rows_or_faults(data: bytes, chunk_bytes: int) -> None:
    whole = b"a,b\n" + data
    found = _csv(whole, row_bytes=50)
    assert [row.source_row for row in found] == list(range(len(found)))
    assert bool(found) == bool(data.strip(b"\r\n"))
    assert _plain(_csv(whole, row_bytes=50, chunk_bytes=chunk_bytes)) == _plain(found)
