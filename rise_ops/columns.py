"""Column types of an export: what the sources declared, or what their JSON values turn out to be.

A column that every table among the sources declares with one Arrow type keeps it. A column of JSON values
gets the narrowest type that holds all its values exactly; lists and structs have it in each of their parts:

| values | type |
|---|---|
| null | string |
| booleans, strings | bool, string |
| integers of 64 bits | int64 |
| numbers, the integers among them below 2^53 | double |
| arrays, objects | list, struct of the types of their parts |
| all else: a number here and a text there, objects without keys or with thousands, deep nesting | JSON text |

A declared type with parts (list, struct, map …) counts as JSON values.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

Row = Mapping[str, Any]

MAX_FIELDS = 1_000
"""Keys of an object that become fields of a struct; one with more is a dictionary, and becomes JSON text."""

MAX_LEVELS = 24
"""Lists and structs within each other; readers of Parquet refuse what is much deeper."""

_EXACT = 2**53
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class ListOf:
    """Arrays whose items have one kind."""

    items: Kind


@dataclass(frozen=True, slots=True)
class StructOf:
    """Objects, by key."""

    fields: Mapping[str, Kind]


Kind = str | ListOf | StructOf
"""What values have in common: null, bool, integer (below 2^53), int64, number, string, json, or parts."""

_SCALARS: dict[frozenset[type], Kind] = {
    frozenset(): "null",
    frozenset({bool}): "bool",
    frozenset({str}): "string",
    frozenset({float}): "number",
}
_NUMBERS: dict[frozenset[str], Kind] = {
    frozenset({"integer", "int64"}): "int64",
    frozenset({"integer", "number"}): "number",
}
_ARROW = {
    "null": pa.string(),
    "bool": pa.bool_(),
    "integer": pa.int64(),
    "int64": pa.int64(),
    "number": pa.float64(),
    "string": pa.string(),
    "json": pa.string(),
}


class ColumnTypes:
    """Types of the columns of some rows, refined batch by batch.

    Parameters
    ----------
    declared
        Arrow type of each source column as text, or "json".
    """

    def __init__(self, declared: Mapping[str, str]) -> None:
        self._declared = {name: kind for name, text in declared.items() if (kind := scalar_type(text)) is not None}
        self._found: dict[str, Kind] = {}

    def observe(self, rows: Sequence[Row]) -> None:
        """Take in the values of a batch of rows."""
        for name in dict.fromkeys(chain.from_iterable(rows)):
            seen = "null" if name in self._declared else infer([row.get(name) for row in rows])
            self._found[name] = common(self._found.get(name, "null"), seen)

    def schema(self, *, last: Sequence[str] = ()) -> pa.Schema:
        """Arrow schema of all rows seen; the columns named in `last` come last, in that order."""
        names = [name for name in self._found if name not in last] + [name for name in last if name in self._found]
        return pa.schema([(name, self._declared.get(name) or arrow_type(self._found[name])) for name in names])

    def batch(self, rows: Sequence[Row], schema: pa.Schema) -> pa.RecordBatch:
        """Rows as a record batch of `schema`."""
        arrays = [self._array([row.get(field.name) for row in rows], field) for field in schema]
        return pa.record_batch(arrays, schema=schema)

    def _array(self, values: list[Any], field: pa.Field) -> pa.Array:
        if field.name in self._declared:
            return restore(values, field.type)
        if is_text(self._found[field.name]):
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        return pa.array(values, type=field.type)


def infer(values: Sequence[Any]) -> Kind:
    """What JSON values have in common."""
    present = [value for value in values if value is not None]
    types = frozenset(map(type, present))
    if types in _SCALARS:
        return _SCALARS[types]
    if types <= {int, float}:
        integers = [value for value in present if type(value) is int]
        low, high = min(integers), max(integers)
        kind = "integer" if -_EXACT <= low <= high <= _EXACT else "int64" if -_INT64 <= low <= high < _INT64 else "json"
        return kind if types == {int} else common(kind, "number")
    if types == {list}:
        return ListOf(infer(list(chain.from_iterable(present))))
    if types == {dict}:
        names = dict.fromkeys(chain.from_iterable(present))
        if len(names) > MAX_FIELDS:
            return "json"
        return StructOf({name: infer([value.get(name) for value in present]) for name in names})
    return "json"


def common(first: Kind, second: Kind) -> Kind:
    """The narrowest kind that holds the values of both."""
    if first == second or second == "null":
        return first
    if first == "null":
        return second
    if isinstance(first, ListOf) and isinstance(second, ListOf):
        return ListOf(common(first.items, second.items))
    if isinstance(first, StructOf) and isinstance(second, StructOf):
        names = {**first.fields, **second.fields}
        if len(names) > MAX_FIELDS:
            return "json"
        return StructOf(
            {name: common(first.fields.get(name, "null"), second.fields.get(name, "null")) for name in names}
        )
    if isinstance(first, str) and isinstance(second, str):
        return _NUMBERS.get(frozenset({first, second}), "json")
    return "json"


def arrow_type(kind: Kind) -> pa.DataType:
    """The Arrow type that a kind is stored as."""
    if is_text(kind):
        return pa.string()
    if isinstance(kind, ListOf):
        return pa.list_(arrow_type(kind.items))
    if isinstance(kind, StructOf):
        return pa.struct([(name, arrow_type(part)) for name, part in kind.fields.items()])
    return _ARROW[kind]


def is_text(kind: Kind, *, levels: int = MAX_LEVELS) -> bool:
    """Whether values become their JSON text: some part has no type of its own, or lies too deep."""
    if not isinstance(kind, str) and not levels:
        return True
    if isinstance(kind, ListOf):
        return is_text(kind.items, levels=levels - 1)
    if isinstance(kind, StructOf):
        return not kind.fields or any(is_text(part, levels=levels - 1) for part in kind.fields.values())
    return kind == "json"


def scalar_type(text: str) -> pa.DataType | None:
    """The Arrow type that prints as `text`, where Parquet holds it and it has no parts; None for others."""
    name, _, rest = text.partition("[")
    unit, *zone = [part.strip() for part in rest.rstrip("]").split(",")]
    if name == "timestamp":
        return pa.timestamp(unit, tz=zone[0].removeprefix("tz=") if zone else None)
    if name in ("time32", "time64", "duration"):
        return {"time32": pa.time32, "time64": pa.time64, "duration": pa.duration}[name](unit)
    if name in ("date32", "date64"):
        return {"date32": pa.date32, "date64": pa.date64}[name]()
    if name == "fixed_size_binary":
        return pa.binary(int(unit))
    if match := re.fullmatch(r"decimal(?:128|256)\((\d+), (-?\d+)\)", text):
        make = pa.decimal128 if text.startswith("decimal128") else pa.decimal256
        return make(int(match[1]), int(match[2]))
    return _PLAIN.get(text)


_PLAIN = {
    str(kind): kind
    for kind in (
        pa.bool_(), pa.string(), pa.large_string(), pa.binary(), pa.large_binary(),
        pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
        pa.float16(), pa.float32(), pa.float64(),
    )
}  # fmt: skip


def restore(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """JSON values (`rise_ops.arrow_json`) as an Arrow array of the type they came from."""
    if kinds.is_timestamp(kind) or kinds.is_date(kind):
        return pc.cast(pa.array(values, type=pa.string()), kind)
    if kinds.is_time(kind):  # Arrow reads times of day only as part of a timestamp
        times = [None if value is None else f"1970-01-01T{value}" for value in values]
        return pc.cast(pc.cast(pa.array(times, type=pa.string()), pa.timestamp(kind.unit)), kind)
    decode = _decoder(kind)
    decoded = values if decode is None else [None if value is None else decode(value) for value in values]
    return pa.array(decoded, type=kind)


def _decoder(kind: pa.DataType) -> Callable[[Any], Any] | None:
    if kinds.is_floating(kind):
        return float
    if kinds.is_decimal(kind):
        return Decimal
    if kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind):
        return base64.b64decode
    return None
