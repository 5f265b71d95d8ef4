"""The state that a corpus would have after ingestion, without writing it.

Objects that are not known yet are read and cut into blocks as ingestion would. Of their rows only the doc_ids are
kept, 32 bytes each, in a temporary file. A pack that is not in the store yet stands under its own id, which is no
block's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import polars as pl

from rise_ops.blocks import RowBuffer, read_doc_ids
from rise_ops.config import CurationConfig
from rise_ops.corpus import SourceDiff
from rise_ops.diff import CorpusState, ObjectState
from rise_ops.ingest import preview_object
from rise_ops.objects import BlockCount, ObjectRecord, read_record, read_rows_doc_ids, record_key
from rise_ops.packs import pack_id, plan_packs, read_pack
from rise_ops.spool import spool
from rise_ops.store import Store

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Preview:
    """What ingestion would publish."""

    state: CorpusState
    blocks: Mapping[str, BlockCount]
    """Every block once."""
    rows: int
    """Accepted rows of all objects."""
    rejected: int


class DocIdSpool:
    """doc_ids by name in a file: 32 bytes each on disk, a place in memory for each name. Threads may read it.

    Parameters
    ----------
    file
        For writing and reading.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._end = 0
        self._places: dict[str, tuple[int, int]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, doc_ids: list[str]) -> None:
        """Keep the doc_ids of one block or object."""
        self._places[name] = (self._end, len(doc_ids))
        self._file.seek(self._end)
        self._end += self._file.write(bytes.fromhex("".join(doc_ids)))
        self._file.flush()  # what reads does not go through the file's buffer

    def read(self, name: str) -> pl.Series:
        """The doc_ids again."""
        start, count = self._places[name]
        digits = os.pread(self._file.fileno(), count * _DIGEST_BYTES, start).hex()
        width = 2 * _DIGEST_BYTES
        return pl.Series("doc_id", [digits[place : place + width] for place in range(0, len(digits), width)], pl.String)


@contextmanager
def preview_corpus(store: Store, config: CurationConfig, diff: SourceDiff, *, deep: bool = False) -> Iterator[Preview]:
    """What ingesting the objects of a listing would publish; doc_ids can be read while the context lasts.

    Parameters
    ----------
    diff
        The listing against the current version.
    deep
        Read unchanged objects, too.

    Raises
    ------
    SourceError, IntegrityError, TransientError
    """
    with ExitStack() as stack:
        file = (stack.enter_context(spool()) / "doc_ids").open("w+b")
        kept = DocIdSpool(stack.enter_context(file))
        records = {} if deep else {entry.uri: read_record(store, entry.record) for entry in diff.unchanged}
        for source in diff.to_read(deep=deep):
            small: list[str] = []
            records[source.uri] = preview_object(
                store,
                source,
                corpus=config.corpus,
                limits=config.limits,
                deep=deep,
                on_rows=_keeper(kept, small),
            )
            if small:
                kept.add(records[source.uri].record, small)
        yield _preview(store, records, kept)


def _keeper(kept: DocIdSpool, small: list[str]) -> Callable[[str | None, RowBuffer], None]:
    def keep(block_id: str | None, rows: RowBuffer) -> None:
        if block_id is None:
            small.extend(rows.doc_id)
        elif block_id not in kept:
            kept.add(block_id, rows.doc_id)

    return keep


def _preview(store: Store, records: Mapping[str, ObjectRecord], kept: DocIdSpool) -> Preview:
    blocks = {block.block_id: block for record in records.values() for block in record.blocks}
    counts = Counter(block.block_id for record in records.values() for block in record.blocks)
    members: dict[str, list[str]] = {}
    pack_of: dict[str, str] = {}
    for pack in plan_packs(records.values()):
        block = _packed(store, pack)
        blocks[block.block_id] = block
        counts[block.block_id] += 1
        members[block.block_id] = [member.record for member in pack]
        pack_of |= dict.fromkeys(members[block.block_id], block.block_id)

    def small_doc_ids(record: str) -> pl.Series:
        return kept.read(record) if record in kept else read_rows_doc_ids(store, record)

    def doc_ids(block: str) -> pl.Series:
        if block in members:
            return pl.concat([small_doc_ids(record) for record in members[block]])
        return kept.read(block) if block in kept else read_doc_ids(store, block)

    def located(record: ObjectRecord) -> ObjectState:
        own = tuple(block.block_id for block in record.blocks)
        packed = pack_of.get(record.record)
        return ObjectState(record.record, own if packed is None else (packed,), is_small=record.small)

    return Preview(
        state=CorpusState(
            objects={uri: located(record) for uri, record in records.items()},
            blocks=counts,
            rows_of={name: block.rows for name, block in blocks.items()},
            doc_ids=doc_ids,
            small_doc_ids=small_doc_ids,
        ),
        blocks=blocks,
        rows=sum(record.rows for record in records.values()),
        rejected=sum(record.rejected for record in records.values()),
    )


def _packed(store: Store, members: list[ObjectRecord]) -> BlockCount:
    name = pack_id(members)
    if store.exists(record_key(name)):
        name = str(read_pack(store, name)["blocks"][0])
    rows = sum(member.rows for member in members)
    return BlockCount(name, rows, sum(member.characters for member in members))
