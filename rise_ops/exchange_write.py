"""Writing our index as an index directory of the reference implementation (`rise_ops.exchange`).

Where the corpus has one source object, row N of the directory is row N of that file: rows that ingestion rejected are
there without a vector, as the reference writes rows in which nothing can be predicted, and `attrs.data` names the file
with its hash. Otherwise rows are those of the corpus' blocks in order, each once, and `attrs.data` says which version
of which corpus they are. Vectors are the stored ones, bit by bit.

The directory is written front to back in one pass; a chunk of signatures is in memory at a time. Each shard gets its
completion record when it is whole and the manifest comes last, so an export that was interrupted is not finished, and
the same call goes on with the shard that it was at. Another call for the same folder is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rise_ops import __version__
from rise_ops.alive import alive_if_possible
from rise_ops.blocks import read_block
from rise_ops.chunking import QUERY_TOKENS
from rise_ops.config import CurationConfig
from rise_ops.corpus import SourceEntry
from rise_ops.errors import ConfigError, IntegrityError, StoreError
from rise_ops.exchange import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    PREVIEW_CHARACTERS,
    PROJECTIONS,
    SHARDS,
    WORKLOAD,
    chunk_counts,
    from_sketch,
    iter_places,
    projection_arrays,
    projections_sha256,
    shard_names,
    unembedding_probe,
)
from rise_ops.index import BlockRecord, read_chunk, read_counts, read_record
from rise_ops.model_shape import model_outline
from rise_ops.progress import Progress, silent
from rise_ops.session import IndexedCorpus, block_rows, open_indexed
from rise_ops.sketch import SketchTables, load_tables
from rise_ops.store import Store
from rise_ops.trunk import load_trunk
from rise_ops.tuning import settled

BLOCK_SIZE = 4_096
"""Rows of a shard, as the reference writes them."""

Json = dict[str, Any]
Float16Array = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished index directory."""

    folder: str
    rows: int
    rows_empty: int
    """Without a vector: too short, or rejected by ingestion."""
    dim: int
    shards: int
    shards_written: int
    """By this call; the others were there."""
    bytes: int
    """Of the vectors."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows of one block that stand one after the other in the directory; without a block: rejected rows."""

    start: int
    """Number of the first."""
    rows: int
    block_id: str | None = None
    first: int = 0
    """First row, in the block."""

    def part(self, start: int, stop: int) -> _Run:
        """The rows between two numbers."""
        low, high = max(self.start, start), min(self.start + self.rows, stop)
        return replace(self, start=low, rows=high - low, first=self.first + low - self.start)


def export_reference_index(store: Store, config: CurationConfig, folder: str | Path, *, version: int | None = None,
                           block_size: int = BLOCK_SIZE, label: str = "label", with_model: bool = True,
                           progress: Progress = silent) -> Exported:  # fmt: skip
    """Write the index of the configured corpus as a directory that the reference implementation reads.

    Parameters
    ----------
    folder
        Where to; made if it is not there. One with an interrupted export of the same is gone on with.
    version
        Of the corpus; the current one where None.
    block_size
        Rows of a shard.
    label
        Column of the source that goes into the metadata as `label`, where a row has it.
    with_model
        Load the model, to name its type and some entries of its LM head, by which the reference recognises it.
    progress
        Counts rows.

    Raises
    ------
    ConfigError
        The folder holds something else, or the sketch has no counterpart.
    SourceError, ModelError
        Nothing was ingested, or the corpus is not wholly in the index of this model and sketch.
    StoreError
        The folder cannot be written.
    """
    began = time.perf_counter()
    place = Path(folder).expanduser()
    if "://" in str(folder):
        raise ConfigError(f"{folder} is not a local folder; export into one, and copy it")
    if block_size < 1:
        raise ConfigError(f"block size {block_size} must be 1 or more")
    with alive_if_possible(store, "index-export"):
        config = settled(store, config)
        indexed = open_indexed(store, config, version=version)
        tables = load_tables(store, f"indexes/{indexed.index_id}/tables.zarr")
        entry = indexed.version.sources[0] if len(indexed.version.sources) == 1 else None
        rows = _rows(indexed, store, entry)
        plan = _plan(store, config, indexed, tables, entry, rows=rows, block_size=block_size, label=label,
                     with_model=with_model)  # fmt: skip
        with _named(place):
            _begin(place, plan, tables)
            written = _write_shards(store, indexed, entry, place, plan, label=label, progress=progress)
            records = _finish(place, plan)
    stats = [record["stats"] for record in records]
    return Exported(
        folder=str(place),
        rows=rows,
        rows_empty=sum(each["empty_rows"] for each in stats),
        dim=plan["dim"],
        shards=len(records),
        shards_written=written,
        bytes=2 * rows * plan["dim"],
        seconds=round(time.perf_counter() - began, 3),
    )


def _rows(indexed: IndexedCorpus, store: Store, entry: SourceEntry | None) -> int:
    if entry is not None:
        return entry.rows + entry.rejected
    return sum(block_rows(store, indexed.version).values())


def _plan(store: Store, config: CurationConfig, indexed: IndexedCorpus, tables: SketchTables,
          entry: SourceEntry | None, *, rows: int, block_size: int, label: str, with_model: bool) -> Json:  # fmt: skip
    """`build_plan.json`."""
    model: Json = {
        "backend": "rise-ops",
        "name_or_path": config.model.name,
        "vocab_size": tables.r.n_in,
        "hidden_dim": tables.h.n_in,
    }
    tokenizer: Json = {"name_or_path": config.model.name}
    if with_model:
        trunk = load_trunk(config.model)
        model["backend"] = "hf"
        model["architecture"] = type(model_outline(config.model)).__name__
        model["dtype"] = str(trunk.dtype).removeprefix("torch.")
        model["unembedding_probe"] = unembedding_probe(trunk.unembedding)
        tokenizer |= {"class": type(trunk.tokenizer).__name__, "size": len(trunk.tokenizer)}
    attributes = {
        "workload": WORKLOAD,
        "config": from_sketch(config.sketch),
        "model": model,
        "tokenizer": tokenizer,
        "projections_sha256": projections_sha256(tables),
        "data": _data(indexed, entry, rows),
        "exported_from": {"program": "rise-ops", "index_id": indexed.index_id, "label": label},
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "num_rows": rows,
        "dim": config.sketch.dim,
        "dtype": "float16",
        "block_size": block_size,
        "num_blocks": -(-rows // block_size),
        "attrs": attributes,
        "attrs_sha256": hashlib.sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest(),
    }


def _data(indexed: IndexedCorpus, entry: SourceEntry | None, rows: int) -> Json:
    if entry is not None:
        return {"file": entry.uri.rpartition("/")[2], "rows": rows, "sha256": entry.object_sha}
    version = indexed.version
    return {
        "file": None,
        "rows": rows,
        "sha256": None,
        "what": f"rows of corpus {version.corpus}, version {version.version}, each block once, in the corpus' order",
        "corpus": version.corpus,
        "version": version.version,
        "snapshot_id": version.snapshot_id,
        "sources": len(version.sources),
    }


def _begin(folder: Path, plan: Json, tables: SketchTables) -> None:
    """Make the folder, or see that it holds an export of the same."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PLAN
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = {}
        differs = [name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name]]
        if differs:
            raise ConfigError(
                f"{folder} holds another index, or one that was begun with other settings ({', '.join(differs)}); "
                "export into an empty folder"
            )
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no index; export into an empty folder")
    (folder / SHARDS).mkdir(exist_ok=True)
    if not path.exists():
        _write_json(path, plan)
    if not (folder / PROJECTIONS).exists():
        with _whole(folder / PROJECTIONS) as file:
            np.savez(file, allow_pickle=False, **projection_arrays(tables))


def _write_shards(store: Store, indexed: IndexedCorpus, entry: SourceEntry | None, folder: Path, plan: Json, *,
                  label: str, progress: Progress) -> int:  # fmt: skip
    """Write the shards that are not whole. Returns how many."""
    size, rows, dim = plan["block_size"], plan["num_rows"], plan["dim"]
    runs = _runs(store, indexed, entry, rows)
    reader = _Reader(store, indexed.index_id, dim, label)
    run: _Run | None = next(runs, None)
    written = 0
    for number in range(plan["num_blocks"]):
        start, stop = number * size, min((number + 1) * size, rows)
        done = _is_done(folder, number, start, stop - start, dim)
        with nullcontext() if done else _Shard(folder, number, start, stop - start, dim) as shard:
            while run is not None and run.start < stop:
                if shard is not None:
                    shard.write(reader.pieces(run.part(start, stop)))
                    progress(min(run.start + run.rows, stop), rows)
                if run.start + run.rows > stop:
                    break
                run = next(runs, None)
            if shard is not None:
                shard.finish()
                written += 1
    return written


def _runs(store: Store, indexed: IndexedCorpus, entry: SourceEntry | None, rows: int) -> Iterator[_Run]:
    """All rows of the directory, in order."""
    if entry is None:
        start = 0
        for block_id, count in block_rows(store, indexed.version).items():
            yield _Run(start, count, block_id)
            start += count
        return
    done = 0
    for frame in iter_places(store, entry):
        idx, places = frame["idx"].to_numpy(), frame["block_row"].to_numpy().astype(np.int64)
        block_id = str(frame["block_id"][0])
        bounds = np.flatnonzero((np.diff(idx) != 1) | (np.diff(places) != 1)) + 1
        for low, high in zip([0, *bounds.tolist()], [*bounds.tolist(), len(idx)], strict=True):
            if int(idx[low]) > done:
                yield _Run(done, int(idx[low]) - done)
            yield _Run(int(idx[low]), high - low, block_id, int(places[low]))
            done = int(idx[high - 1]) + 1
    if done < rows:
        yield _Run(done, rows - done)


class _Reader:
    """Vectors and metadata of runs; of the block that was read last, a chunk and its texts are kept."""

    def __init__(self, store: Store, identity: str, dim: int, label: str) -> None:
        self._store, self._identity, self._dim, self._label = store, identity, dim, label
        self._block: str | None = None
        self._chunk = -1

    def pieces(self, run: _Run) -> Iterator[tuple[Float16Array, list[Json], list[int]]]:
        """Vectors [rows, dim], metadata and tokens of a run, some rows at a time."""
        if run.block_id is None:
            step = max(1, 2**23 // self._dim)
            for start in range(0, run.rows, step):
                count = min(step, run.rows - start)
                meta = [_meta(run.start + start + row, "", 0, None) for row in range(count)]
                yield np.zeros((count, self._dim), np.float16), meta, [0] * count
            return
        record = self._open(run.block_id)
        row, stop = run.first, run.first + run.rows
        while row < stop:
            chunk, low = divmod(row, record.chunk_rows)
            if chunk != self._chunk:
                self._vectors, self._chunk = read_chunk(self._store, self._identity, record, chunk), chunk
            high = min(stop - chunk * record.chunk_rows, record.chunk_rows)
            rows = slice(row, row + high - low)
            tokens = self._tokens[rows].tolist()
            said = zip(self._texts[rows], tokens, self._labels[rows], strict=True)
            meta = [_meta(run.start + row - run.first + place, *each) for place, each in enumerate(said)]
            yield self._vectors[low:high], meta, tokens
            row += high - low

    def _open(self, block_id: str) -> BlockRecord:
        if block_id != self._block:
            frame = read_block(self._store, block_id)
            self._record = read_record(self._store, self._identity, block_id)
            self._tokens = read_counts(self._store, self._identity, self._record)[0]
            self._texts: list[str] = frame["text"].to_list()
            self._labels = [json.loads(meta).get(self._label) for meta in frame["meta"].to_list()]
            self._block, self._chunk = block_id, -1
        return self._record


def _meta(idx: int, text: str, tokens: int, label: Any) -> Json:
    found: Json = {
        "idx": idx,
        "length": len(text),
        "tok_len": min(tokens, QUERY_TOKENS),  # the reference counts up to its seq_len
        "num_chunks": chunk_counts(tokens)[0],
    }
    if label is not None:
        found["label"] = label
    return {**found, "text": text[:PREVIEW_CHARACTERS]}


class _Shard:
    """One shard that is being written; what an earlier call left of it is replaced."""

    def __init__(self, folder: Path, number: int, start: int, rows: int, dim: int) -> None:
        self._folder, self._number, self._start, self._rows, self._dim = folder, number, start, rows, dim
        self._vectors, self._meta, self._record = (folder / name for name in shard_names(number))
        self._began = time.perf_counter()
        self._digest = hashlib.sha256()
        self._stats = {"chunks": 0, "tokens": 0, "empty_rows": 0}
        self._done = 0
        self._file: IO[bytes] = _part(self._vectors).open("wb")
        self._lines: IO[bytes] = _part(self._meta).open("wb")
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._file.flush()
        self._digest.update(_part(self._vectors).read_bytes())

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lines.close()

    def write(self, pieces: Iterator[tuple[Float16Array, list[Json], list[int]]]) -> None:
        """Add rows."""
        for vectors, meta, tokens in pieces:
            data = np.ascontiguousarray(vectors, "<f2").data.cast("B")
            self._digest.update(data)
            self._file.write(data)
            self._lines.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in meta)
            self._done += len(meta)
            for number in tokens:
                chunks, counted = chunk_counts(number)
                self._stats["chunks"] += chunks
                self._stats["tokens"] += counted
                self._stats["empty_rows"] += chunks == 0

    def finish(self) -> None:
        """Make the shard count."""
        if self._done != self._rows:
            raise IntegrityError(f"{self._done:,} rows were found for {self._vectors}, {self._rows:,} should be there")
        for file, path in ((self._file, self._vectors), (self._lines, self._meta)):
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(_part(path), path)
        stats = {**self._stats, "wall_sec": round(time.perf_counter() - self._began, 3)}
        record = {"block": self._number, "start": self._start, "rows": self._rows, "sha256": self._digest.hexdigest()}
        _write_json(self._record, {**record, "stats": stats})


def _is_done(folder: Path, number: int, start: int, rows: int, dim: int) -> bool:
    vectors, meta, record = (folder / name for name in shard_names(number))
    try:
        found = json.loads(record.read_bytes())
        whole = vectors.stat().st_size > 2 * rows * dim and meta.stat().st_size > 0
    except (OSError, ValueError):
        return False
    return whole and isinstance(found, dict) and (found.get("start"), found.get("rows")) == (start, rows)


def _finish(folder: Path, plan: Json) -> list[Json]:
    """Write the manifest unless it is there. Returns the shards' records."""
    names = [shard_names(number) for number in range(plan["num_blocks"])]
    records: list[Json] = [json.loads((folder / record).read_bytes()) for _, _, record in names]
    if not (folder / MANIFEST).exists():
        totals = {
            name: round(sum(record["stats"][name] for record in records), 3)
            for name in ("chunks", "tokens", "empty_rows", "wall_sec")
        }
        shards = [
            {"file": file, "meta": meta, **{name: record[name] for name in ("start", "rows", "sha256")}}
            for (file, meta, _), record in zip(names, records, strict=True)
        ]
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S+00:00}"
        own = {"rise_version": f"rise-ops {__version__}", "finalized_utc": now}
        _write_json(folder / MANIFEST, {**plan, "shards": shards, "build_totals": totals, **own})
    return records


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    with _whole(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


@contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that is there whole or not at all."""
    with _part(path).open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(_part(path), path)


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where, what = error.filename or folder, error.strerror or error
        remedy = "free space there and give the same command again" if full else "check the path and its rights"
        raise StoreError(f"{where} cannot be written ({what}); {remedy}") from error
