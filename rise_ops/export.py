"""Export: the kept rows as a published dataset.

    exports/<name>/<version>/lineage.json     claims the version: run, corpus version, index, decisions
    exports/<name>/<version>/data/train-00000.parquet | .jsonl.zst
    exports/<name>/<version>/README.md        dataset card; tells `datasets.load_dataset` where the data is
    exports/<name>/<version>/manifest.json    written last: files with rows, bytes and SHA-256

Without a manifest an export does not exist: `list_exports` does not name it. Versions are 0001, 0002, …,
claimed by exclusive create; exporting the same decisions in the same way again returns the version there is, or
finishes the one that an interrupted run began.

Each row has its original columns (in Parquet with the types of `rise_ops.columns`), then doc_id, value,
source_uri and source_row. An original column with one of these four names is exported as `original_<name>`,
and if there is such a column too, as `original_original_<name>`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from rise_ops.card import dataset_card
from rise_ops.columns import ColumnTypes
from rise_ops.config import ExportConfig
from rise_ops.corpus import CorpusVersion, read_block
from rise_ops.counters import count
from rise_ops.damage import noted_keys, settle
from rise_ops.errors import ConflictError, DamagedError, MissingObjectError
from rise_ops.hashing import fingerprint
from rise_ops.heap import steady_heap
from rise_ops.memory import ExportMemory, export_memory
from rise_ops.progress import Progress, silent
from rise_ops.report_data import DecisionFigures, decision_figures
from rise_ops.runs import decisions_key
from rise_ops.shapes import ClaimShape, ManifestShape
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tables import TableWriter, iter_file, iter_table

FORMAT_VERSION = 1
OWN_COLUMNS = {"doc_id": "string", "value": "float", "source_uri": "string", "source_row": "int64"}
"""Columns that an export adds, and their Arrow types."""
_SLICE_ROWS = 8_192
_GROUP_ROWS = 8_192
"""A row group ends here, or where its rows have `ExportMemory.group_bytes` as JSON."""
_CLAIM_ATTEMPTS = 20
_RANGE_BYTES = 8 * 2**20
_logger = logging.getLogger(__name__)
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_parse = json.JSONDecoder().raw_decode
"""Of what is JSON from its first character on; json.loads looks for blanks and encodings in every row."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One data file of an export."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Export:
    """A published subset."""

    name: str
    version: str
    rows: int
    files: int
    bytes: int
    """Of the data files."""
    reused: bool
    """Whether an earlier run had published it already."""

    @property
    def label(self) -> str:
        """`name/version`."""
        return f"{self.name}/{self.version}"


def list_exports(store: Store, name: str | None = None) -> list[dict[str, Any]]:
    """Manifests of all finished exports, oldest first within a name."""
    names = store.children("exports") if name is None else [name]
    versions = ((each, version) for each in names for version in store.children(f"exports/{each}"))
    return [read_manifest(store, *each) for each in versions if store.exists(manifest_key(*each))]


def manifest_key(name: str, version: str) -> str:
    """Where the manifest of an export is in the store."""
    return f"exports/{name}/{version}/manifest.json"


def read_manifest(store: Store, name: str, version: str) -> dict[str, Any]:
    """The manifest of a finished export.

    Raises
    ------
    MissingObjectError, IntegrityError, StoreError, TransientError
    """
    expected = {"name": name, "version": version}
    return store.get_json(
        manifest_key(name, version), format_version=FORMAT_VERSION, shape=ManifestShape, holds=expected
    )


def export_rows(store: Store, version: CorpusVersion, *, run_id: str, name: str, config: ExportConfig,
                lineage: Mapping[str, Any], memory: int, progress: Progress = silent) -> Export:  # fmt: skip
    """Publish the rows that a run's decisions keep.

    Parameters
    ----------
    run_id
        Run that holds the decisions.
    lineage
        What to record beside the data: corpus, model, index, weights. Its fingerprint, with the decisions'
        content and the format, is the identity of the export.
    memory
        Bytes that the export may take.

    Raises
    ------
    LimitError
        `memory` is too small for a block.
    ConflictError
        Other exports claimed every version that this one tried.
    """
    steady_heap()
    plan = export_memory(memory)
    _logger.info("%s", plan.plan.text)
    with spool() as folder:
        kept = Path(folder) / "kept.parquet"
        _spool_kept(store, run_id, kept, rows=plan.slice_rows)
        content = fingerprint([_content(kept), config.model_dump(mode="json"), lineage["identity"]])
        begun, finished = _claimed(store, name, content)
        if finished is not None:
            size = sum(file["bytes"] for file in finished["files"])
            return Export(name, finished["version"], finished["rows"], len(finished["files"]), size, reused=True)
        claim = {**lineage, "run_id": run_id, "content": content}

        def write(number: str) -> list[ExportedFile]:
            prefix = f"exports/{name}/{number}"
            return list(_write_files(store, prefix, kept, version.fields, config, plan, progress))

        number = begun or _claim(store, name, claim)
        try:
            files = write(number)
        except ConflictError:  # begun by another version of this program, or under another memory limit
            number = _claim(store, name, claim)
            files = write(number)
    prefix = f"exports/{name}/{number}"
    rows = sum(file.rows for file in files)
    card = dataset_card(
        name, number, figures=_figures(store, run_id), format=config.format, lineage=lineage, run_id=run_id
    )
    store.create(f"{prefix}/README.md", card.encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "version": number,
        "run_id": run_id,
        "content": content,
        "rows": rows,
        "files": [asdict(file) for file in files],
    }
    store.create_json(manifest_key(name, number), manifest)
    settle(store, prefix=f"{prefix}/")
    count("rows", rows)
    return Export(name, number, rows, len(files), sum(file.bytes for file in files), reused=False)


def _figures(store: Store, run_id: str) -> DecisionFigures:
    key = decisions_key(run_id)
    return store.collected(key, lambda: decision_figures(store.scan_parquet([key])))


def _claimed(store: Store, name: str, content: str) -> tuple[str | None, dict[str, Any] | None]:
    """A version that a run claimed for this content and did not finish, or the manifest of one that is whole.

    One that lost files, or whose files or manifest are damaged, is unpublished and counts as unfinished.
    """
    begun = None
    for version in reversed(store.children(f"exports/{name}")):
        folder = f"exports/{name}/{version}"
        try:
            claim = store.get_json(f"{folder}/lineage.json", format_version=FORMAT_VERSION, shape=ClaimShape)
        except (MissingObjectError, DamagedError):  # it cannot be told whose it is
            continue
        if claim["content"] == content:
            manifest = _whole(store, name, version)
            if manifest is not None:
                return None, manifest
            begun = begun or version
    return begun, None


def _whole(store: Store, name: str, version: str) -> dict[str, Any] | None:
    """The manifest of an export that is not known to be broken; else what is broken goes, the manifest first."""
    folder, key = f"exports/{name}/{version}", manifest_key(name, version)
    try:
        manifest = read_manifest(store, name, version)
    except MissingObjectError:
        manifest = None
    except DamagedError:
        store.delete([key])
        manifest = None
    noted = noted_keys(store, f"{folder}/")
    sizes = dict(store.list(folder))
    files = manifest["files"] if manifest is not None else []
    wrong = {f"{folder}/{file['path']}" for file in files if sizes.get(f"{folder}/{file['path']}") != file["bytes"]}
    wrong |= noted - {key}
    if wrong:
        store.delete([key])
        store.delete(sorted(wrong))
        return None
    return manifest


def _claim(store: Store, name: str, lineage: Mapping[str, Any]) -> str:
    taken = [int(version) for version in store.children(f"exports/{name}") if version.isdigit()]
    number = max(taken, default=0) + 1
    for attempt in range(number, number + _CLAIM_ATTEMPTS):
        version = f"{attempt:04d}"
        document = {"format_version": FORMAT_VERSION, "name": name, "version": version, **lineage}
        if store.create_json(f"exports/{name}/{version}/lineage.json", document):
            return version
    raise ConflictError(f"versions {number:04d} to {attempt:04d} of export {name} were claimed by others; run again")


def _write_files(store: Store, prefix: str, kept: Path, fields: Mapping[str, str], config: ExportConfig,
                 plan: ExportMemory, progress: Progress) -> Iterator[ExportedFile]:  # fmt: skip
    """Spool the rows locally, which shows the columns' types, then write and publish file after file."""
    import zstandard

    renamed = _renamed(fields)
    types = ColumnTypes(exported_columns(fields))
    spool = kept.with_name("rows.jsonl.zst")
    done = 0
    with zstandard.open(spool, "wb") as lines:
        for rows in _iter_rows(store, kept, renamed, plan):
            if config.format == "parquet":
                types.observe(rows)
            for row in rows:
                lines.write(_as_json(row).encode() + b"\n")
            done += len(rows)
            progress(done, None)
    path = kept.with_name(f"data.{config.format}")
    with zstandard.open(spool, "rb") as packed, io.BufferedReader(packed) as lines:
        for number, part in enumerate(_parts(lines, config.max_file_bytes)):
            if config.format == "parquet":
                written = _write_parquet(part, path, types, group_bytes=plan.group_bytes)
            else:
                written = _write_lines(part, path)
            yield _publish(store, f"{prefix}/data/train-{number:05d}.{config.format}", path, written)


def _parts(lines: Iterable[bytes], max_bytes: int) -> Iterator[Iterator[bytes]]:
    """Consecutive lines in parts of at most `max_bytes`; each part is consumed before the next is asked for."""
    source = iter(lines)
    first = next(source, None)

    def part() -> Iterator[bytes]:
        nonlocal first
        size = 0
        while first is not None and (size == 0 or size + len(first) <= max_bytes):
            size += len(first)
            yield first
            first = next(source, None)

    while first is not None:
        yield part()


def _write_parquet(lines: Iterator[bytes], path: Path, types: ColumnTypes, *, group_bytes: int) -> int:
    import pyarrow.parquet as pq

    schema, total = types.schema(last=tuple(OWN_COLUMNS)), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for group in _parts(lines, group_bytes):
            while rows := [_parse(line.decode())[0] for line in islice(group, _GROUP_ROWS)]:
                total += len(rows)
                batch = types.batch(rows, schema)
                rows.clear()  # the values are in the batch now
                writer.write_batch(batch, row_group_size=_GROUP_ROWS)
    return total


def _write_lines(lines: Iterator[bytes], path: Path) -> int:
    import zstandard

    total = 0
    with zstandard.open(path, "wb") as file:
        for line in lines:
            file.write(line)
            total += 1
    return total


def _publish(store: Store, key: str, path: Path, rows: int) -> ExportedFile:
    digest, size = _sha256_file(path), path.stat().st_size
    if not store.create_from_file(key, path) and not _holds(store, key, digest, size):
        raise ConflictError(f"{store.url(key)} was written by another run, with other bytes; run again")
    path.unlink()
    return ExportedFile("/".join(key.split("/")[3:]), rows, size, digest)


def _holds(store: Store, key: str, sha256: str, size: int) -> bool:
    """Whether an object has these bytes: a file that was written before."""
    if store.size(key) != size:
        return False
    digest = hashlib.sha256()
    for start in range(0, size, _RANGE_BYTES):
        digest.update(store.get_range(key, start, min(_RANGE_BYTES, size - start)))
    return digest.hexdigest() == sha256


def _spool_kept(store: Store, run_id: str, path: Path, *, rows: int) -> None:
    """The kept decisions in a local file."""
    columns = ["doc_id", "block_id", "block_row", "value", "source_uri", "source_row"]
    with TableWriter(path, compression="lz4") as writer:
        for frame in iter_table(store, decisions_key(run_id), columns=[*columns, "kept"], rows=rows):
            writer.write(frame.filter("kept").select(columns).to_arrow())


def _iter_rows(store: Store, kept: Path, renamed: Mapping[str, str], plan: ExportMemory) -> Iterator[list[Row]]:
    """The kept rows with their original columns, in corpus order, a slice at a time."""
    for part in iter_file(kept, rows=plan.slice_rows):
        for block in part.partition_by("block_id", maintain_order=True):
            content = read_block(store, block["block_id"][0])
            sizes = content.select(pl.col("text").str.len_bytes() + pl.col("meta").str.len_bytes()).to_series()
            # the average decides: a slice of rows that are all larger takes more, but no more than their block
            step = max(1, plan.row_bytes // max(1, int(sizes.sum()) // max(1, len(sizes))))
            for start in range(0, block.height, step):
                rows = block[start : start + step]
                joined = rows.drop("doc_id").hstack(content[rows["block_row"].to_list()])
                yield [_original(row, renamed) for row in joined.iter_rows(named=True)]


def exported_columns(fields: Mapping[str, str]) -> dict[str, str]:
    """Columns of an export and their types, in this order, from those of the corpus."""
    renamed = _renamed(fields)
    return {renamed.get(name, name): kind for name, kind in fields.items()} | OWN_COLUMNS


def _renamed(fields: Iterable[str]) -> dict[str, str]:
    """New names of the source columns that are called like ours."""
    taken = {*fields, *OWN_COLUMNS}
    renamed = {}
    for name in sorted(OWN_COLUMNS.keys() & set(fields)):
        new = f"original_{name}"
        while new in taken:
            new = f"original_{new}"
        renamed[name] = new
    return renamed


def _original(row: Row, renamed: Mapping[str, str]) -> Row:
    original: Row = _parse(row["meta"])[0]
    if row["text_field"] is not None:
        original[row["text_field"]] = row["text"]
    columns = {renamed.get(name, name): value for name, value in original.items()}
    return columns | {name: row[name] for name in OWN_COLUMNS}


def _sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(kept: Path) -> str:
    """Identity of the kept rows, whatever wrote the file."""
    digest = hashlib.sha256()
    for rows in iter_file(kept, columns=["doc_id", "value", "source_uri", "source_row"], rows=_SLICE_ROWS):
        digest.update(rows.write_ndjson().encode())
    return digest.hexdigest()
