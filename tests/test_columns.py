"""Types of exported columns: nothing is lost, nothing fails at the last batch."""

from __future__ import annotations

import base64
import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.arrow_json import json_values
from rise_ops.columns import MAX_FIELDS, ColumnTypes, arrow_type, common, infer, restore, scalar_type

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


def _types(*batches: list[Any]) -> pa.DataType:
    types = ColumnTypes({})
    for values in batches:
        types.observe([{"x": value} for value in values])
    return types.schema().field("x").type


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([None], pa.string()),
        ([True, None], pa.bool_()),
        ([1, -(2**63)], pa.int64()),
        ([1, 2.5, None], pa.float64()),
        ([2**53, 0.5], pa.float64()),
        (["a"], pa.string()),
        ([[1], [], None], pa.list_(pa.int64())),
        ([[]], pa.list_(pa.string())),
        ([{"a": 1}, {"b": ["x"]}], pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))])),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_values_get_the_narrowest_type(values: list[Any], kind: pa.DataType, together: bool) -> None:
    assert _types(values) == kind if together else _types(*([value] for value in values)) == kind


@pytest.mark.parametrize(
    "values",
    [
        [1, "a"],
        [True, 1],
        [2**63],
        [2**53 + 1, 0.5],
        ["a", ["a"]],
        [{"a": 1}, {"a": "x"}],
        [{}],
        [{str(key): 1} for key in range(MAX_FIELDS + 1)],
        [{str(key): 1 for key in range(MAX_FIELDS + 1)}],
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_what_has_no_type_becomes_json_text(values: list[Any], together: bool) -> None:
    batches = [values] if together else [[value] for value in values]
    types = ColumnTypes({})
    for batch in batches:
        types.observe([{"x": value} for value in batch])
    stored = types.batch([{"x": value} for value in [*values, None]], types.schema()).column("x").to_pylist()
    assert [None if text is None else json.loads(text) for text in stored] == [*values, None]


@settings(deadline=None, max_examples=200)
@given(batches=st.lists(st.lists(_JSON, min_size=1, max_size=4), min_size=1, max_size=4))
def test_any_json_survives(batches: list[list[Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    types = ColumnTypes({})
    for values in batches:
        types.observe([{"x": value} for value in values])
    schema = types.schema()
    stored = [types.batch([{"x": value} for value in values], schema) for values in batches]
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(pa.Table.from_batches(stored), path)
    found = pq.read_table(path).column("x").to_pylist()
    values = [value for batch in batches for value in batch]
    mixed = any(type(value) is not str for value in values if value is not None)
    as_text = mixed and schema.field("x").type == pa.string()
    for value, back in zip(values, found, strict=True):
        if as_text and value is not None:
            assert json.loads(back) == value
        else:
            assert _without_nulls(back) == _without_nulls(value)


def _without_nulls(value: Any) -> Any:
    """Structs have all keys; the ones that a row did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


@settings(deadline=None)
@given(first=st.lists(_JSON, max_size=4), second=st.lists(_JSON, max_size=4))
def test_batches_do_not_matter(first: list[Any], second: list[Any]) -> None:
    assert arrow_type(common(infer(first), infer(second))) == arrow_type(infer([*first, *second]))
    assert common(infer(first), infer(second)) == common(infer(second), infer(first))


_TIME = datetime.datetime(2024, 2, 29, 23, 59, 59, 123456)
_DECLARED = [
    pa.array([1, None, -(2**63)], pa.int64()),
    pa.array([0, None, 2**64 - 1], pa.uint64()),
    pa.array([1, None, -128], pa.int8()),
    pa.array([0.1, None, float("nan")], pa.float32()),
    pa.array([0.1, None, float("-inf")], pa.float64()),
    pa.array([0.5, None, 2.0], pa.float16()),
    pa.array([True, None, False], pa.bool_()),
    pa.array(["é", None, ""], pa.string()),
    pa.array(["é", None, ""], pa.large_string()),
    pa.array([b"\x00\xff", None, b""], pa.binary()),
    pa.array([b"\x00\xff", None, b"ab"], pa.binary(2)),
    pa.array([Decimal("1.50"), None, Decimal("-99999999.99")], pa.decimal128(10, 2)),
    pa.array([Decimal("1.50"), None, Decimal("-9.99")], pa.decimal256(50, 2)),
    pa.array([_TIME, None, _TIME], pa.timestamp("us")),
    pa.array([_TIME, None, _TIME], pa.timestamp("ms", tz="UTC")),
    pa.array([_TIME, None, _TIME], pa.timestamp("us", tz="Europe/Berlin")),
    pa.array([0, None, 2**62], pa.timestamp("ns")),
    pa.array([_TIME.date(), None, datetime.date(1, 1, 1)], pa.date32()),
    pa.array([_TIME.date(), None, _TIME.date()], pa.date64()),
    pa.array([_TIME.time(), None, datetime.time()], pa.time64("us")),
    pa.array([1, None, 86_399_999_999_999], pa.time64("ns")),
    pa.array([_TIME.time().replace(microsecond=0), None, datetime.time()], pa.time32("s")),
    pa.array([1, None, -(2**40)], pa.duration("ms")),
]


@pytest.mark.parametrize("array", _DECLARED, ids=lambda array: str(array.type))
def test_declared_types_come_back(array: pa.Array, tmp_path: Path) -> None:
    kind = scalar_type(str(array.type))
    assert kind == array.type
    back = restore(json.loads(json.dumps(json_values(array))), kind)
    assert back.to_string() == array.to_string()
    pq.write_table(pa.table({"x": back}), tmp_path / "x.parquet")


@pytest.mark.parametrize(
    "text",
    ["json", "null", "list<item: int64>", "struct<a: int64>", "map<string, int64>", "month_day_nano_interval",
     "dictionary<values=string, indices=int32, ordered=0>", "string_view", "something new"],
)  # fmt: skip
def test_other_types_count_as_json(text: str) -> None:
    assert scalar_type(text) is None


def test_binary_that_came_as_text_is_bytes_again() -> None:
    types = ColumnTypes({"blob": "binary"})
    rows: list[dict[str, Any]] = [{"blob": base64.b64encode(b"\x00\x01").decode()}, {"other": 1}]
    types.observe(rows)
    batch = types.batch(rows, types.schema(last=["blob"]))
    assert batch.schema.names == ["other", "blob"]
    assert batch.to_pylist() == [{"other": None, "blob": b"\x00\x01"}, {"other": 1, "blob": None}]
