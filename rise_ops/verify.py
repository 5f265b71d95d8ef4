"""Is everything in the store that its records promise? Reads only.

Shallow: every block of every current corpus version, every chunk of every recorded index block and every
file of every finished export exists with its size. Deep: their contents are hashed again, too: blocks
against their id, index objects against the CRC-32C in their record, export files against the SHA-256 in the
manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c

from rise_ops.blocks import RowBuffer, block_key, read_block
from rise_ops.corpus import CorpusVersion, current_version
from rise_ops.errors import IntegrityError
from rise_ops.export import list_exports
from rise_ops.hashing import fingerprint
from rise_ops.index import BlockRecord, list_indexed, read_record
from rise_ops.store import Store

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is not as recorded."""

    key: str
    problem: str
    remedy: str


def verify_store(store: Store, *, deep: bool = False) -> Json:
    """What is broken: {"checked": objects looked at, "deep": bool, "broken": [{key, problem, remedy}]}."""
    checked = 0
    faults = []
    for fault in (
        *_corpora(store, deep=deep),
        *_indexes(store, deep=deep),
        *_exports(store, deep=deep),
    ):
        checked += 1
        if fault is not None:
            faults.append(asdict(fault))
    return {"store": store.uri, "deep": deep, "checked": checked, "broken": faults}


def _corpora(store: Store, *, deep: bool) -> Iterator[Fault | None]:
    there = {key for key, _ in store.list("blocks")}
    for name in store.children("corpora"):
        version = current_version(store, name)
        if version is not None:
            for block_id in sorted({block for entry in version.sources for block in entry.blocks}):
                yield _block(store, version, block_id, there, deep=deep)


def _block(store: Store, version: CorpusVersion, block_id: str, there: set[str], *, deep: bool) -> Fault | None:
    key = block_key(block_id)
    remedy = f"restore it from a backup, or ingest corpus {version.corpus} into a new store"
    if key not in there:
        return Fault(key, "is missing", remedy)
    if not deep:
        return None
    try:
        frame = read_block(store, block_id)
    except IntegrityError as error:
        return Fault(key, str(error), remedy)
    rows = RowBuffer(
        doc_id=frame["doc_id"].to_list(),
        text=frame["text"].to_list(),
        prompt=frame["prompt"].to_list(),
        text_field=frame["text_field"].to_list(),
        meta=frame["meta"].to_list(),
    )
    texts = zip(rows.text, rows.prompt, strict=True)
    if rows.block_id() != block_id or rows.doc_id != [fingerprint([text, prompt]) for text, prompt in texts]:
        return Fault(key, "does not hold the content that its name says", remedy)
    return None


def _indexes(store: Store, *, deep: bool) -> Iterator[Fault | None]:
    for identity in store.children("indexes"):
        prefix = f"indexes/{identity}/blocks/"
        records: dict[int, list[BlockRecord]] = {}
        for key in sorted(key for key, _ in store.list(prefix) if key.count("/") == 3 and key.endswith(".json")):
            block_id = key.removeprefix(prefix).removesuffix(".json")
            try:
                record = read_record(store, identity, block_id)
            except IntegrityError as error:
                yield Fault(key, str(error), "delete it and run `curate index`")
                continue
            records.setdefault(record.dim, []).append(record)
        for dim, same in records.items():
            whole = list_indexed(store, identity, {record.block_id: record.rows for record in same}, dim=dim)
            for record in same:
                yield _index_block(
                    store, f"{prefix}{record.block_id}", record, whole=record.block_id in whole, deep=deep
                )


def _index_block(store: Store, key: str, record: BlockRecord, *, whole: bool, deep: bool) -> Fault | None:
    if not whole:
        return Fault(f"{key}.zarr", "lacks objects", "run `curate index`: it computes this block again")
    if deep:
        for name, checksum in record.crc32c.items():
            damaged = f"{key}.zarr/{name}"
            if google_crc32c.value(store.get(damaged)) != checksum:
                return Fault(damaged, "does not match its checksum", "delete this object and run `curate index`")
    return None


def _exports(store: Store, *, deep: bool) -> Iterator[Fault | None]:
    for manifest in list_exports(store):
        folder = f"exports/{manifest['name']}/{manifest['version']}"
        for file in manifest["files"]:
            key = f"{folder}/{file['path']}"
            problem = None
            if store.size(key) != file["bytes"]:
                problem = "is missing or has another size"
            elif deep and hashlib.sha256(store.get(key)).hexdigest() != file["sha256"]:
                problem = "does not match its checksum"
            yield None if problem is None else Fault(key, problem, "run `curate export` under another export.name")
