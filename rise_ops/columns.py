"""Column types of an export: what the sources declared, or what their JSON values turn out to be.

A column that every table among the sources declares with one Arrow type keeps it. A column of JSON values
gets the narrowest type that holds all its values (64-bit integers and floats meet as floats); where there is
none — a number here, a text there — each value becomes its JSON text. Inside lists and structs, values have
the types that JSON gives them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

Row = Mapping[str, Any]

_JSON = "json"
_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)


class ColumnTypes:
    """Types of the columns of some rows, refined batch by batch.

    Parameters
    ----------
    declared
        Arrow type of each source column as text, or "json".
    """

    def __init__(self, declared: Mapping[str, str]) -> None:
        self._declared = {name: kind for name, text in declared.items() if (kind := scalar_type(text)) is not None}
        self._found: dict[str, pa.DataType | None] = {}

    def observe(self, rows: Sequence[Row]) -> None:
        """Take in the values of a batch of rows."""
        names = dict.fromkeys(name for row in rows for name in row)
        for name in names:
            if name in self._declared:
                self._found[name] = self._declared[name]
                continue
            seen = infer([row.get(name) for row in rows])
            self._found[name] = common(self._found[name], seen) if name in self._found else seen

    def schema(self, *, last: Sequence[str] = ()) -> pa.Schema:
        """Arrow schema of all rows seen; the columns named in `last` come last, in that order."""
        names = [name for name in self._found if name not in last] + [name for name in last if name in self._found]
        return pa.schema([(name, _storable(self._found[name])) for name in names])

    def batch(self, rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
        """Rows as a record batch of `schema`."""
        arrays = [self._array([row.get(field.name) for row in rows], field) for field in schema]
        return pa.record_batch(arrays, schema=schema)

    def _array(self, values: list[Any], field: pa.Field) -> pa.Array:
        if field.name in self._declared:
            return restore(values, field.type)
        if _as_text(self._found[field.name]):
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array(values, type=field.type)


def infer(values: Sequence[Any]) -> pa.DataType | None:
    """The narrowest Arrow type of JSON values; None where there is none."""
    try:
        return pa.array(values).type
    except _ERRORS:
        return None


def common(first: pa.DataType | None, second: pa.DataType | None) -> pa.DataType | None:
    """The narrowest type that holds both; None where there is none."""
    if first is None or second is None:
        return None
    try:
        merged = pa.unify_schemas([pa.schema([("x", first)]), pa.schema([("x", second)])], promote_options="permissive")
    except _ERRORS:
        return None
    return merged.field("x").type


def scalar_type(text: str) -> pa.DataType | None:
    """The Arrow type that prints as `text`, for types without parts; None for others and for "json"."""
    if text == _JSON:
        return None
    name, _, rest = text.partition("[")
    unit, *zone = [part.strip() for part in rest.rstrip("]").split(",")]
    if name == "timestamp":
        return pa.timestamp(unit, tz=zone[0].removeprefix("tz=") if zone else None)
    if name in ("time32", "time64", "duration"):
        return {"time32": pa.time32, "time64": pa.time64, "duration": pa.duration}[name](unit)
    if text.startswith("date32") or text.startswith("date64"):
        return pa.date32() if text.startswith("date32") else pa.date64()
    if text.startswith("decimal128("):
        precision, scale = text.removeprefix("decimal128(").rstrip(")").split(",")
        return pa.decimal128(int(precision), int(scale))
    try:
        return pa.type_for_alias(text)
    except ValueError:
        return None


def restore(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """JSON values (`rise_ops.arrow_json`) as an Arrow array of the type they came from."""
    decode = _decoder(kind)
    decoded = [None if value is None else decode(value) for value in values]
    if kinds.is_timestamp(kind) or kinds.is_date(kind) or kinds.is_time(kind):
        return pc.cast(pa.array(decoded, type=pa.string()), kind)
    return pa.array(decoded, type=kind)


def _decoder(kind: pa.DataType) -> Callable[[Any], Any]:
    if kinds.is_floating(kind):
        return float
    if kinds.is_decimal(kind):
        return Decimal
    if kinds.is_binary(kind) or kinds.is_large_binary(kind):
        return base64.b64decode
    return lambda value: value


def _storable(kind: pa.DataType | None) -> pa.DataType:
    """A type that Parquet can hold: JSON text for None and empty structs, text where every value is null."""
    return pa.string() if kind is None or kinds.is_null(kind) or _as_text(kind) else kind


def _as_text(kind: pa.DataType | None) -> bool:
    return kind is None or _has_hole(kind)


def _has_hole(kind: pa.DataType) -> bool:
    if kinds.is_struct(kind):
        return kind.num_fields == 0 or any(_has_hole(field.type) for field in kind)
    return kinds.is_list(kind) and (kinds.is_null(kind.value_type) or _has_hole(kind.value_type))
