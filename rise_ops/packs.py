"""Packs: small objects gathered into blocks, so that many small files do not become many tiny blocks.

Small objects are ordered by `object_sha`. A pack ends after the object whose hash, modulo 2,048, is below
its number of rows (once in 2,048 rows on average) if the pack has at least 256 rows, and before the object
that would bring it above 4,096 rows or `blocks.MAX_BYTES`. One changed object re-packs one block or two.
Objects with equal bytes are in it once; each of their locations finds its rows there.

    pack = sha256 of canonical_json(ids of the member records, in order)

    objects/<pack>.parquet   object_sha, block_id, block_row, source_row
    objects/<pack>.json      members, block and totals; written last

Packing reads the members' `.rows.parquet`, never the sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import pyarrow as pa

from rise_ops.blocks import (
    MAX_BYTES,
    MAX_ROWS,
    MIN_ROWS,
    RowBuffer,
    block_key,
    parquet_bytes,
    read_stored,
    write_block,
)
from rise_ops.checksums import stored_crc32c
from rise_ops.errors import DamagedError, MissingObjectError
from rise_ops.hashing import fingerprint
from rise_ops.objects import RECORD_FORMAT, BlockCount, ObjectRecord, places_key, record_key, rows_key
from rise_ops.shapes import PackShape
from rise_ops.store import Store
from rise_ops.threads import ContextPool

_AVERAGE_ROWS = 2048
_CONNECTIONS = 16
_PLACES = pa.schema(
    [("object_sha", pa.string()), ("block_id", pa.string()), ("block_row", pa.uint32()), ("source_row", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class Pack:
    """Small objects that share a block."""

    pack: str
    """Its id."""
    members: tuple[str, ...]
    """Records, in order."""
    block: BlockCount


def plan_packs(records: Iterable[ObjectRecord]) -> list[list[ObjectRecord]]:
    """Which small objects share a block; depends on their content only, not on their order or number of copies."""
    packs: list[list[ObjectRecord]] = []
    members: list[ObjectRecord] = []
    rows = size = 0
    distinct = {record.record: record for record in records if record.small and record.rows}
    for record in sorted(distinct.values(), key=lambda record: record.object_sha):
        if members and (rows + record.rows > MAX_ROWS or size + record.size > MAX_BYTES):
            packs.append(members)
            members, rows, size = [], 0, 0
        members.append(record)
        rows, size = rows + record.rows, size + record.size
        if rows >= MIN_ROWS and int(record.object_sha[-8:], 16) % _AVERAGE_ROWS < record.rows:
            packs.append(members)
            members, rows, size = [], 0, 0
    return [*packs, members] if members else packs


def pack_id(members: Sequence[ObjectRecord]) -> str:
    """Id of the pack of these objects, in order."""
    return fingerprint([member.record for member in members])


def pack_objects(store: Store, records: Iterable[ObjectRecord]) -> list[Pack]:
    """Write the packs that are not there yet.

    Raises
    ------
    IntegrityError, MissingObjectError, StoreError, TransientError
    """
    return [_pack(store, members) for members in plan_packs(records)]


def read_pack(store: Store, pack: str) -> dict[str, Any]:
    """The completion record of a pack.

    Raises
    ------
    IntegrityError, MissingObjectError, StoreError, TransientError
    """
    options: dict[str, Any] = {"shape": PackShape, "holds": {"pack": pack}}
    return store.get_json(record_key(pack), format_version=RECORD_FORMAT, **options)


def _pack(store: Store, members: Sequence[ObjectRecord]) -> Pack:
    records = tuple(member.record for member in members)
    pack = pack_id(members)
    if store.exists(record_key(pack)):
        known = read_pack(store, pack)
        block = BlockCount(known["blocks"][0], known["rows"], known["characters"])
        if store.exists(block_key(block.block_id)) and store.exists(places_key(pack)):
            return Pack(pack, records, block)
    rows, columns = _gather(store, members)
    block = BlockCount(write_block(store, rows), len(rows), rows.characters)
    columns |= {"block_id": [block.block_id] * len(rows), "block_row": list(range(len(rows)))}
    places = parquet_bytes({name: columns[name] for name in _PLACES.names}, _PLACES, format_version=RECORD_FORMAT)
    store.create(places_key(pack), places)
    store.create_json(
        record_key(pack),
        {
            "format_version": RECORD_FORMAT,
            "pack": pack,
            "members": list(records),
            "blocks": [block.block_id],
            "rows": block.rows,
            "characters": block.characters,
            "crc32c": {"places": stored_crc32c(store, places_key(pack))},
        },
    )
    return Pack(pack, records, block)


def _gather(store: Store, members: Sequence[ObjectRecord]) -> tuple[RowBuffer, dict[str, list[object]]]:
    """The members' rows, and the object and row that each came from."""

    columns = (*RowBuffer().columns(), "source_row")

    def load(member: ObjectRecord) -> pl.DataFrame:
        key = rows_key(member.record)
        try:
            return read_stored(store, key, columns=columns, known_format=RECORD_FORMAT)
        except MissingObjectError as error:
            raise DamagedError(f"{store.url(key)} is missing; run again", store.url(key)) from error

    with ContextPool(_CONNECTIONS) as pool:
        frames = list(pool.map(load, members))
    rows = RowBuffer()
    shas: list[object] = []
    source_rows: list[object] = []
    for member, frame in zip(members, frames, strict=True):
        for name, values in rows.columns().items():
            values.extend(frame[name].to_list())
        rows.characters += member.characters
        rows.size += member.size
        shas += [member.object_sha] * len(frame)
        source_rows += frame["source_row"].to_list()
    return rows, {"object_sha": shas, "source_row": source_rows}
