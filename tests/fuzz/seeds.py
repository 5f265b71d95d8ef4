"""What the fuzzer starts from: small sources of every format, and a store with everything in it."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard

from rise_ops.config import ExportConfig, KeepConfig, SelectionConfig
from rise_ops.export import export_rows
from rise_ops.hashing import canonical_json
from rise_ops.index import index_key
from rise_ops.runs import code_identity, reference, stage_record, write_run
from rise_ops.selection import decide
from rise_ops.store import Store
from tests.corpora import jsonl, make_rows
from tests.indexed import DIM, INDEX, index_rows, make_target, score_parts, store_target

RUN = "run-1"
MEMORY = 2**30

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "n": 1, "x": 0.5, "tags": ["a", "b"], "deep": {"a": {"b": [1, {"c": None}]}}},
    {"text": " naïve \u202e 😀 \u2028", "n": -(2**63), "x": 1e300, "tags": [], "deep": {}},
    {"prompt": "Q", "generation": "A", "n": None, "x": -0.0, "tags": None, "deep": None},
    {"instruction": "do", "input": "", "output": "done", "ids": list(range(20))},
]
CSV = b'\xef\xbb\xbftext,n,"a ""b"""\r\nplain,1,x\n"two\nlines, quoted ""q""",2,\n\nlast,3,\xc3\xa9\n'


def sources() -> dict[str, bytes]:
    """Bytes by name."""
    lines, table = jsonl(ROWS), _table()
    found = {"a.jsonl": lines, "a.json": lines, "a.csv": CSV}
    for name, data in list(found.items()):
        found[f"{name}.gz"] = gzip.compress(data, mtime=0)
        found[f"{name}.zst"] = zstandard.ZstdCompressor(write_checksum=False).compress(data)
    for codec in ("none", "snappy", "zstd"):
        found[f"{codec}.parquet"] = _parquet(table, compression=codec)
    found["v2.parquet"] = _parquet(table, data_page_version="2.0", use_dictionary=False, row_group_size=7)
    for kind in (None, "lz4", "zstd"):
        found[f"{kind}.arrow"] = _ipc(table, kind, stream=False)
        found[f"{kind}-stream.arrow"] = _ipc(table, kind, stream=True)
    return found


def _table() -> Any:
    rows = 20
    columns: dict[str, Any] = {
        "text": [f"row {place} é" for place in range(rows)],
        "label": pa.array(["a", "b"] * (rows // 2)).dictionary_encode(),
        "n": pa.array([None, *range(1, rows)], pa.int32()),
        "x": [place / 7 for place in range(rows)],
        "when": pa.array(range(rows), pa.timestamp("us", "UTC")),
        "day": pa.array(range(rows), pa.date32()),
        "raw": [bytes([place]) for place in range(rows)],
        "price": pa.array(range(rows), pa.decimal128(9, 2)),
        "tags": [["a"] * (place % 3) for place in range(rows)],
        "pair": pa.array([[place, None] for place in range(rows)], pa.list_(pa.int8(), 2)),
        "deep": [{"a": {"b": place}} if place % 2 else None for place in range(rows)],
        "map": pa.array([[("k", place)] for place in range(rows)], pa.map_(pa.string(), pa.int64())),
        "yes": [place % 2 == 0 for place in range(rows)],
    }
    return pa.table(columns)


def _parquet(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def _ipc(table: Any, compression: str | None, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=12)
    return sink.getvalue()


def fill_store(folder: Path) -> Store:
    """A store as an interrupted curation leaves it: corpus, index, target, run, decisions and export."""
    store = Store(str(folder / "store"))
    files = {"raw.jsonl": make_rows(300), "small.jsonl": [*make_rows(5, seed=1), {"text": 1}], "more.csv": make_rows(3)}
    indexed = index_rows(store, folder, files)
    version, target = indexed.version, make_target(3)
    description = {
        "format_version": 1,
        "index_id": INDEX,
        "model": {"name": "some/model", "revision": None, "fingerprint": "f" * 64},
        "sketch": {"temperature": 0.1},
        "tables_sha256": "0" * 64,
        "dim": DIM,
    }
    store.create_json(index_key(INDEX), description)
    name = store_target(store, target)
    parts = score_parts(indexed, {"good": target}, run_id=RUN)
    decide(
        store, version, run_id=RUN, parts=parts, weights={"good": 1.0}, targets=["good"], aggregate="mean",
        selection=SelectionConfig(keep=KeepConfig(rows=100)), memory=MEMORY,
    )  # fmt: skip
    lineage = {
        "identity": "0" * 64,
        "corpus": {"name": version.corpus, "version": version.version, "snapshot_id": version.snapshot_id},
        "model": {"name": "some/model", "fingerprint": "f" * 64},
        "index_id": INDEX,
        "targets": {"good": name},
        "weights": {"good": 1.0},
        "aggregate": "mean",
        "keep": {"rows": 100},
    }
    made = export_rows(store, version, run_id=RUN, name="out", config=ExportConfig(), lineage=lineage, memory=MEMORY)
    record = {
        "run_id": RUN,
        "name": "run",
        "status": "completed",
        "error": None,
        "started": "2026-01-31T12:00:00.000+00:00",
        "seconds": 1.5,
        "config": {"store": store.uri},
        "config_fingerprint": "c" * 64,
        "code": code_identity(),
        "model": {"name": "some/model", "fingerprint": "f" * 64},
        "corpus": {"name": version.corpus, "version": version.version, "snapshot_id": version.snapshot_id},
        "index_id": INDEX,
        "counts": {"rows": version.rows, "rows_kept": made.rows},
        "export": made.label,
        "stages": [
            stage_record(
                "select", started="2026-01-31T12:00:00.000+00:00", seconds=1.2, cached=False, inputs=[],
                outputs=[reference(store.url(f"runs/{RUN}/decisions.parquet"), rows=version.rows)],
            )
        ],
    }  # fmt: skip
    write_run(store, record)
    example = {"doc_id": "ab" * 32, "source_uri": "/a", "source_row": 1, "text": "t", "score": 0.5, "kept": True}
    examples = {"queries": [{"target": "good", "query": "q", "hits": [example], "bottom": []}], "evaluation": None}
    store.create(f"runs/{RUN}/examples.json", canonical_json(examples).encode())
    return store
