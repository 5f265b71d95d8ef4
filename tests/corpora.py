"""Corpora that the ingestion tests write and read: rows, files of every format, one-call ingestion."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import zstandard

from rise_ops.config import CorpusConfig, FieldMap, LimitsConfig
from rise_ops.corpus import CorpusVersion, current_version, diff_sources, list_sources
from rise_ops.ingest import IngestedObject, ingest_object, publish
from rise_ops.rows import ingest_fingerprint
from rise_ops.sources import SourceObject, stat_object
from rise_ops.store import Store

Row = Mapping[str, Any]

_WORDS = [f"word{number}" for number in range(997)]
NO_LIMITS = LimitsConfig(bad_rows=1_000_000)


def make_rows(count: int, *, seed: int = 0, words: int = 8) -> list[dict[str, Any]]:
    """Rows whose texts all differ."""
    generator = random.Random(seed)
    return [
        {"id": f"{seed}-{place}", "text": f"{place} {' '.join(generator.choices(_WORDS, k=words))}"}
        for place in range(count)
    ]


def jsonl(rows: Iterable[Row]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_as(path: Path, rows: Sequence[Row]) -> Path:
    """Rows in the format that the path's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    if name.split(".")[1] in ("jsonl", "ndjson", "json"):
        path.write_bytes(compress(jsonl(rows), name))
        return path
    table = pa.Table.from_pylist([dict(row) for row in rows])
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=100)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, str(path), chunksize=100)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(table, sink)
        path.write_bytes(compress(sink.getvalue().to_pybytes(), name))
    return path


def compress(data: bytes, name: str) -> bytes:
    """Bytes as a file of that name holds them."""
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.ZstdCompressor().compress(data) if name.endswith(".zst") else data


def ingest_path(store: Store, uri: str | Path, *, limits: LimitsConfig = NO_LIMITS, **options: Any) -> IngestedObject:
    """One object through `ingest_object`; `options`: fields, dry, deep."""
    fields = options.pop("fields", FieldMap())
    return ingest_object(store, listed(uri), corpus=corpus_of(uri, fields=fields), limits=limits, **options)


def listed(uri: str | Path) -> SourceObject:
    """The object as a listing shows it."""
    return stat_object(str(uri))


def corpus_of(*globs: str | Path, fields: FieldMap | None = None) -> CorpusConfig:
    """A corpus over these sources."""
    return CorpusConfig(name="corpus", sources=tuple(str(glob) for glob in globs), fields=fields or FieldMap())


def ingest_all(
    store: Store, corpus: CorpusConfig, *, run_id: str = "run", limits: LimitsConfig = NO_LIMITS
) -> CorpusVersion:
    """List, ingest what changed, publish."""
    version = current_version(store, corpus.name)
    diff = diff_sources(list_sources(corpus, store=store), version, ingest_fingerprint(corpus.fields, limits))
    objects = [ingest_object(store, source, corpus=corpus, limits=limits) for source in (*diff.added, *diff.changed)]
    return publish(store, corpus=corpus, objects=objects, unchanged=diff.unchanged, run_id=run_id, limits=limits)


def record_frame(store: Store, made: IngestedObject) -> pl.DataFrame:
    """The record's rows, in source order."""
    return store.scan_parquet([f"objects/{made.record}.parquet"]).collect().sort("source_row")


def rejections(store: Store, made: IngestedObject) -> dict[int, str]:
    """Class of fault by source row."""
    frame = record_frame(store, made).drop_nulls("error")
    return dict(zip(frame["source_row"].to_list(), frame["error"].to_list(), strict=True))
