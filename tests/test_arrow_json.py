"""Arrow values as JSON: every type keeps all that it says."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from rise_ops.arrow_json import json_values

_MOMENT = dt.datetime(2024, 2, 29, 12, 30, 0, 123456)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1, None, 2**64 - 1], pa.uint64(), [1, None, 2**64 - 1]),
        ([True, None], pa.bool_(), [True, None]),
        ([0.1, float("nan"), float("-inf"), None], pa.float64(), [0.1, "NaN", "-Infinity", None]),
        ([None, None], pa.null(), [None, None]),
        (["a", None], pa.large_string(), ["a", None]),
        ([b"\xff", None], pa.binary(), ["/w==", None]),
        ([b"ab"], pa.binary(2), ["YWI="]),
        ([Decimal("1.50"), None], pa.decimal128(5, 2), ["1.50", None]),
        ([dt.date(2024, 2, 29)], pa.date32(), ["2024-02-29"]),
        ([dt.time(1, 2, 3)], pa.time32("s"), ["01:02:03"]),
        ([_MOMENT, None], pa.timestamp("us"), ["2024-02-29T12:30:00.123456", None]),
        ([1_700_000_000_123_456_789], pa.timestamp("ns"), ["2023-11-14T22:13:20.123456789"]),
        ([0], pa.timestamp("s", "Europe/Berlin"), ["1970-01-01T00:00:00Z"]),
        ([dt.timedelta(seconds=1)], pa.duration("ms"), [1000]),
        ([[1.0, float("inf")], None, []], pa.list_(pa.float32()), [[1.0, "Infinity"], None, []]),
        ([[1, 2], None, [3, None]], pa.list_(pa.int8(), 2), [[1, 2], None, [3, None]]),
        ([{"a": b"x"}, None], pa.struct([("a", pa.binary())]), [{"a": "eA=="}, None]),
        ([[("k", 1)], None], pa.map_(pa.string(), pa.int32()), [[{"key": "k", "value": 1}], None]),
        ([[{"d": dt.date(2024, 1, 1)}]], pa.list_(pa.struct([("d", pa.date32())])), [[{"d": "2024-01-01"}]]),
    ],
)
def test_values(values: list[Any], kind: pa.DataType, expected: list[Any]) -> None:
    array = pa.array(values, kind)
    assert json_values(array) == expected
    padded = pa.concat_arrays([pa.nulls(2, kind), array, pa.nulls(1, kind)])
    assert json_values(padded.slice(2, len(values))) == expected


def test_values_behind_an_encoding() -> None:
    assert json_values(pa.array(["a", "b", "a"]).dictionary_encode()) == ["a", "b", "a"]
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array([7, 8]))
    assert json_values(runs) == [7, 7, 8]


def test_bytes_that_are_not_utf8_are_marked() -> None:
    stored = pa.array([b"caf\xe9"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(1, stored.buffers()[1], stored.buffers()[2])
    assert json_values(text) == ["caf\udce9"]


def test_a_type_without_values_is_refused() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["a"])])
    with pytest.raises(pa.ArrowNotImplementedError):
        json_values(union)
