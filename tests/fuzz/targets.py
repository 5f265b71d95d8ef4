"""What the fuzzer calls: each takes bytes and returns its outcome; what is neither good nor named is raised.

An outcome is `rows` (accepted, exactly as written), `faults` (rejected with a reason) or the name of an error.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rise_ops.arrow_json import json_values
from rise_ops.columns import ColumnTypes
from rise_ops.config import FieldMap
from rise_ops.corpus import current_version, placements, read_block, read_snapshot
from rise_ops.errors import CurationError
from rise_ops.garbage import collect_garbage
from rise_ops.hashing import canonical_json
from rise_ops.index import iter_signatures, read_counts, read_record
from rise_ops.lineage import trace
from rise_ops.objects import read_record as read_object
from rise_ops.packs import read_pack
from rise_ops.readers import open_rows
from rise_ops.report import render_report
from rise_ops.rows import RowFault, canonical_row
from rise_ops.sources import stat_object
from rise_ops.status import store_status
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.verify import verify_store
from tests.fuzz.seeds import RUN
from tests.indexed import INDEX

ROW_BYTES = 2**16
_AT_ONCE = 500

Row = dict[str, Any]


def read_source(path: Path) -> Counter[str]:
    """Every row of a source, to its export and back."""
    outcome: Counter[str] = Counter()
    try:
        with open_rows(stat_object(str(path)), row_bytes=ROW_BYTES) as reader:
            rows: list[Row] = []
            for row in reader:
                value = row.value
                if not isinstance(value, RowFault) and isinstance(value := _canonical(value), dict):
                    outcome["rows"] += 1
                    if row.raw is not None and path.suffix != ".csv" and ".csv." not in path.name:
                        assert _same(json.loads(row.raw), value), (row.raw, value)
                    rows.append(value)
                if isinstance(value, RowFault):
                    assert value.reason, value
                    outcome["faults"] += 1
            _check_export(rows[:_AT_ONCE], reader.columns)
    except CurationError as error:
        outcome[f"{type(error).__name__}{'' if str(path) in str(error) else ' without a name'}"] += 1
    assert not any(name.endswith("without a name") for name in outcome), outcome
    return outcome


def _canonical(value: Row) -> Row | RowFault:
    try:
        row = canonical_row(value, fields=FieldMap(), row_bytes=ROW_BYTES)
    except RowFault as fault:
        return fault
    whole = row.meta if row.text_field is None else {**row.meta, row.text_field: row.text}
    assert _same(whole, value), (whole, value)
    return whole


def _check_export(rows: Sequence[Row], declared: dict[str, str]) -> None:
    """Rows through Parquet: the same values, or their JSON text where a column has no type."""
    if not rows:
        return
    types = ColumnTypes(declared)
    types.observe(rows)
    schema = types.schema()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema) as writer:
        writer.write_batch(types.batch(rows, schema))
    table = pq.read_table(io.BytesIO(sink.getvalue()))
    for name in table.column_names:
        found = json_values(table.column(name).combine_chunks())
        for row, value in zip(rows, found, strict=True):
            wanted = row.get(name)
            same = _filled(wanted, value) or (
                isinstance(value, str) and value == json.dumps(wanted, ensure_ascii=False)
            )
            assert same, (name, wanted, value)


def _filled(wanted: Any, value: Any) -> bool:
    """Whether two values are the same, where a struct has all keys that any row has."""
    if isinstance(wanted, dict) and isinstance(value, dict):
        return all(_filled(wanted.get(name), value[name]) for name in value) and wanted.keys() <= value.keys()
    if isinstance(wanted, list) and isinstance(value, list):
        return len(wanted) == len(value) and all(map(_filled, wanted, value))
    if isinstance(wanted, str) and isinstance(value, str) and wanted[:4].isdigit():
        return _moment(wanted) == _moment(value)
    return bool(wanted == value) or str(wanted) == str(value)


def _moment(text: str) -> str:
    """Without zeros at the end: Parquet has no whole seconds."""
    whole = text.removesuffix("Z")
    return whole.rstrip("0").rstrip(".") if "." in whole else whole


def _same(first: Any, second: Any) -> bool:
    return canonical_json(first) == canonical_json(second)


def read_store(store: Store, doc_id: str) -> Counter[str]:
    """Everything that reads a store; `doc_id` is a row in it."""
    outcome: Counter[str] = Counter()
    for look in _looks(store, doc_id):
        try:
            look()
            outcome["read"] += 1
        except CurationError as error:
            outcome[type(error).__name__] += 1
    return outcome


def _looks(store: Store, doc_id: str) -> list[Callable[[], object]]:
    def ids(prefix: str, ending: str) -> list[str]:
        names = (key.removeprefix(prefix) for key, _ in sorted(store.list(prefix)) if key.endswith(ending))
        return [name.removesuffix(ending) for name in names if "/" not in name]

    def version() -> Any:
        found = current_version(store, "corpus")
        assert found is not None
        return found

    def signatures(block: str) -> None:
        record = read_record(store, INDEX, block)
        read_counts(store, INDEX, record)
        list(iter_signatures(store, INDEX, record))

    def everything_placed() -> None:
        found = version()
        blocks = sorted({block for entry in found.sources for block in entry.blocks})
        placements(store, found, blocks)
        read_snapshot(store, found.snapshot_id)

    looks: list[Callable[[], object]] = [
        everything_placed,
        lambda: json.dumps(store_status(store)),
        lambda: verify_store(store),
        lambda: verify_store(store, deep=True),
        lambda: trace(store, RUN),
        lambda: trace(store, "out/0001"),
        lambda: trace(store, doc_id),
        lambda: render_report(store, RUN),
        lambda: collect_garbage(store, dry_run=True),
    ]
    for record in ids("objects/", ".json"):
        looks.append(lambda record=record: read_object(store, record))  # type: ignore[misc]
        looks.append(lambda record=record: read_pack(store, record))  # type: ignore[misc]
    looks += [lambda block=block: read_block(store, block) for block in ids("blocks/", ".parquet")]  # type: ignore[misc]
    looks += [lambda block=block: signatures(block) for block in ids(f"indexes/{INDEX}/blocks/", ".json")]  # type: ignore[misc]
    looks += [lambda name=name: read_target(store, name) for name in ids("targets/", ".json")]  # type: ignore[misc]
    return looks
