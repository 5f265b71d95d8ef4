"""Arrow columns as values that JSON knows, without loss.

| Arrow type | JSON |
|---|---|
| null, boolean, integers, strings, finite floats | themselves |
| NaN, infinities | `"NaN"`, `"Infinity"`, `"-Infinity"` |
| decimal | its digits, as a string |
| date, time, timestamp | ISO 8601 string; a timestamp with a time zone is given in UTC, ending in `Z` |
| duration, calendar interval | integer in the type's unit; `[months, days, nanoseconds]` |
| binary | base64 string |
| list | list; struct: object; map: list of `{"key": …, "value": …}` |
| dictionary, run-end encoded, extension | as the values behind it |

The column's Arrow type is recorded beside the data, so that an export can restore it. What it could not
restore comes out marked, and the reader rejects its row: strings that are not UTF-8 with surrogate escapes,
times outside the years 0 to 9999 and decimals with more digits than their type has as a `RowFault`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from rise_ops.rows import RowFault

_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_FIRST_DAY, _LAST_DAY = -719_528, 2_932_896  # 0000-01-01 and 9999-12-31, from 1970


def json_values(array: Any) -> list[Any]:
    """Values of a `pyarrow.Array` as JSON values, one a row.

    Raises
    ------
    pyarrow.ArrowNotImplementedError
        For types that cannot be read as values, such as unions.
    """
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return json_values(array.storage)
    if kinds.is_dictionary(kind):
        return json_values(array.dictionary_decode())
    if kinds.is_run_end_encoded(kind):
        return json_values(pc.run_end_decode(array))
    if kinds.is_nested(kind):
        return _nested(array)
    return _flat(array)


def _flat(array: Any) -> list[Any]:
    kind = array.type
    if kinds.is_floating(kind):
        return _floats(array)
    if kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind):
        return _strings(array)
    if kinds.is_boolean(kind) or kinds.is_integer(kind) or kinds.is_null(kind):
        return list(array.to_pylist())
    if kinds.is_temporal(kind):
        return _times(array)
    if kinds.is_decimal(kind):
        return _decimals(array)
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or _is_other_binary(kind):
        return [None if value is None else base64.b64encode(value).decode("ascii") for value in array.to_pylist()]
    raise pa.ArrowNotImplementedError(f"columns of type {kind} cannot be read")


def _is_other_binary(kind: Any) -> bool:
    return bool(kinds.is_fixed_size_binary(kind) or kinds.is_binary_view(kind))


def _floats(array: Any) -> list[Any]:
    values = list(array.to_pylist())
    if pc.all(pc.is_finite(array.cast(pa.float64())), skip_nulls=True).as_py() in (True, None):
        return values
    return [value if value is None or math.isfinite(value) else _unbounded(value) for value in values]


def _unbounded(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _strings(array: Any) -> list[Any]:
    try:
        return list(array.to_pylist())
    except UnicodeDecodeError:  # Parquet writers are not made to check
        stored = array.cast(pa.large_binary() if kinds.is_large_string(array.type) else pa.binary())
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in stored.to_pylist()]


def _decimals(array: Any) -> list[Any]:
    kind = array.type
    most = Decimal(10) ** (kind.precision - kind.scale)
    return [_decimal(value, most, kind) if value.is_valid else None for value in array]


def _decimal(scalar: Any, most: Decimal, kind: Any) -> str | RowFault:
    try:
        value = scalar.as_py()
    except InvalidOperation:
        value = most
    if abs(value) >= most:
        return RowFault("bad_number", f"holds a number that is too large for {kind}")
    return format(value, "f")


def _times(array: Any) -> list[Any]:
    kind = array.type
    if kinds.is_duration(kind):
        return list(array.cast(pa.int64()).to_pylist())
    if kinds.is_interval(kind):
        return [None if value is None else list(value) for value in array.to_pylist()]
    units = array.cast(pa.int32() if kinds.is_date32(kind) or kinds.is_time32(kind) else pa.int64())
    low, high = _range(kind)
    wrong = pc.fill_null(pc.or_(pc.less(units, low), pc.greater(units, high)), False).to_pylist()
    if kinds.is_timestamp(kind) and kind.tz is not None:
        array = array.cast(pa.timestamp(kind.unit, "UTC"))
    texts = array.cast(pa.string()).to_pylist()
    if kinds.is_timestamp(kind):
        texts = [text if text is None else text.replace(" ", "T", 1) for text in texts]
    if not any(wrong):
        return list(texts)
    fault = RowFault("bad_time", f"holds a time that {kind} can hold and a calendar cannot")
    return [fault if bad else text for bad, text in zip(wrong, texts, strict=True)]


def _range(kind: Any) -> tuple[int, int]:
    """The first and the last unit that Arrow both writes and reads as text."""
    if kinds.is_date(kind):
        day = 1 if kinds.is_date32(kind) else 86_400_000
        return _FIRST_DAY * day, _LAST_DAY * day
    second = _UNITS[kind.unit]
    if kinds.is_time(kind):
        return 0, 86_400 * second - 1
    low, high = _FIRST_DAY * 86_400 * second, (_LAST_DAY + 1) * 86_400 * second - 1
    return max(low, -(2**63 // second - 1) * second), min(high, 2**63 - 1)


def _nested(array: Any) -> list[Any]:
    kind = array.type
    valid = array.is_valid().to_pylist()
    if kinds.is_struct(kind):
        names = [field.name for field in kind]
        if len(set(names)) != len(names):
            raise pa.ArrowInvalid(f"a struct names '{max(names, key=names.count)[:100]}' twice")
        columns = [json_values(child) for child in array.flatten()]
        rows = zip(*columns, strict=True) if columns else (() for _ in valid)
        return [dict(zip(names, row, strict=True)) if ok else None for row, ok in zip(rows, valid, strict=True)]
    if kinds.is_map(kind):
        return _maps(array, valid)
    if kinds.is_fixed_size_list(kind):
        lengths = [kind.list_size if ok else None for ok in valid]
        return _split(iter(json_values(pc.list_flatten(array))), lengths)
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        return _split(iter(json_values(array.flatten())), pc.list_value_length(array).to_pylist())
    raise pa.ArrowNotImplementedError(f"columns of type {kind} cannot be read")


def _maps(array: Any, valid: list[bool]) -> list[Any]:
    out: list[Any] = []
    for row, ok in enumerate(valid):
        entries = array[row].values if ok else None  # a struct array of key and value
        out.append(None if entries is None else _pairs(entries))
    return out


def _pairs(entries: Any) -> list[dict[str, Any]]:
    keys, values = json_values(entries.field(0)), json_values(entries.field(1))
    return [{"key": key, "value": value} for key, value in zip(keys, values, strict=True)]


def _split(values: Iterator[Any], lengths: list[int | None]) -> list[Any]:
    return [None if length is None else list(islice(values, length)) for length in lengths]


def as_bytes(kind: Any) -> Any:
    """The same type with bytes in place of text: what a column is seen as to check all of it but its UTF-8."""
    plain = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if kinds.is_struct(kind):
        return pa.struct([field.with_type(as_bytes(field.type)) for field in kind])
    if kinds.is_map(kind):
        return pa.map_(as_bytes(kind.key_type), as_bytes(kind.item_type), keys_sorted=kind.keys_sorted)
    if kinds.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(as_bytes(kind.value_type)), kind.list_size)
    if kinds.is_list(kind) or kinds.is_large_list(kind):
        make = pa.list_ if kinds.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(as_bytes(kind.value_type)))
    return plain.get(kind, kind)
