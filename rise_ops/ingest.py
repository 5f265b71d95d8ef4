"""Ingestion: source objects to blocks and records, and records to a published corpus version.

    ingest_object   one object: read, canonicalise, cut into blocks, write blocks, then its record
    publish         all objects: pack the small ones, check `limits.bad_rows`, write snapshot and version

An object is read once, front to back, and one block of rows is held at a time. Nothing counts until its
completion record exists: a run that is killed leaves blocks that the next one finds already written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rise_ops.blocks import RowBuffer, block_key, ends_block, write_block
from rise_ops.checksums import stored_crc32c
from rise_ops.config import CorpusConfig, CurationConfig, LimitsConfig
from rise_ops.corpus import CorpusVersion, look_at_sources
from rise_ops.counters import count
from rise_ops.heap import steady_heap
from rise_ops.memory import ingest_memory
from rise_ops.objects import (
    BlockCount,
    IngestedObject,
    ObjectRecord,
    PlaceWriter,
    canonical_raw,
    is_small,
    places_key,
    read_record,
    recall,
    record_id,
    record_key,
    remember,
    rows_key,
    spooled_places,
    write_rows,
)
from rise_ops.progress import Progress, silent
from rise_ops.publish import publish
from rise_ops.readers import Reader, SourceRow, open_rows
from rise_ops.rows import RowFault, canonical_row, ingest_fingerprint
from rise_ops.sources import SourceObject, hash_object, is_local, refuse_changed, refuse_inside
from rise_ops.store import Store
from rise_ops.threads import ContextPool

__all__ = [
    "IngestedObject",
    "ingest_corpus",
    "ingest_fingerprint",
    "ingest_object",
    "is_held",
    "preview_object",
    "publish",
]

OnRows = Callable[[str | None, RowBuffer], None]

_PROGRESS_ROWS = 1000
_CONNECTIONS = 16

_logger = logging.getLogger(__name__)


def ingest_object(
    store: Store,
    source: SourceObject,
    *,
    corpus: CorpusConfig,
    limits: LimitsConfig,
    dry: bool = False,
    deep: bool = False,
    progress: Progress = silent,
) -> IngestedObject:
    """Turn one source object into blocks and a record, unless that was done before.

    Parameters
    ----------
    store
        Where blocks and record go.
    source
        The object, as listed.
    corpus, limits
        `corpus.fields` and `limits.row_bytes` decide what its rows become.
    dry
        Write nothing, and still return exact counts and block ids.
    deep
        Read the object's bytes even where its ETag has been seen before.
    progress
        Called with rows read so far.

    Returns
    -------
    IngestedObject
        Blocks are empty for a small object until it is published.

    Raises
    ------
    SourceError
        The object is damaged, missing, or changed while it was read.
    """
    record, reused = _convert(store, source, corpus=corpus, limits=limits, dry=dry, deep=deep, progress=progress)
    return _ingested(source, record, reused=reused)


def preview_object(
    store: Store,
    source: SourceObject,
    *,
    corpus: CorpusConfig,
    limits: LimitsConfig,
    deep: bool = False,
    on_rows: OnRows | None = None,
    progress: Progress = silent,
) -> ObjectRecord:
    """The record that `ingest_object` would write: exact counts and block ids; nothing is written.

    Where the object has to be read, `on_rows` is called with the id (None for a small object) and the rows of
    each block.
    """
    return _convert(
        store, source, corpus=corpus, limits=limits, dry=True, deep=deep, on_rows=on_rows, progress=progress
    )[0]


def _convert(
    store: Store,
    source: SourceObject,
    *,
    corpus: CorpusConfig,
    limits: LimitsConfig,
    dry: bool,
    deep: bool,
    progress: Progress,
    on_rows: OnRows | None = None,
) -> tuple[ObjectRecord, bool]:
    """The record of an object, and whether it was there already."""
    steady_heap()
    ingest_memory(int(limits.memory))  # refuses before anything is read
    refuse_inside(source.uri, store.uri)
    settings = ingest_fingerprint(corpus.fields, limits)
    known = _known(store, source, settings, deep=deep)
    if known is not None:
        refuse_changed(source)
        return known, True
    reading = open_rows(source, row_bytes=int(limits.row_bytes), memory=int(limits.memory) // 4)
    with reading as reader, spooled_places() as (places, path):
        conversion = _Conversion(store, places, corpus=corpus, limits=limits, dry=dry, on_rows=on_rows)
        conversion.run(reader, progress)
        places.close()
        refuse_changed(source)
        record = conversion.record(object_sha=reader.sha256(), settings=settings)
        if not dry:
            conversion.commit(record, path)
            remember(store, source, record.record, settings)
    return record, False


def _known(store: Store, source: SourceObject, settings: str, *, deep: bool) -> ObjectRecord | None:
    """The record of an object whose bytes were ingested before, wherever they stood, if it can be told cheaply.

    A local file is hashed, which costs little beside parsing it; a remote one is not downloaded, but known by its
    ETag. Deep: any object is hashed.
    """
    if deep or is_local(source.uri):
        return _finished(store, record_id(hash_object(source.uri, listed=source), settings))
    record = recall(store, source, settings)
    return None if record is None else _finished(store, record)


def is_held(
    store: Store, source: SourceObject, made: IngestedObject, *, corpus: CorpusConfig, limits: LimitsConfig
) -> bool:
    """Whether an earlier answer about this object is right: the store has its record, and all that belongs to it.

    That the object's bytes are those of the record is not looked at: the state in the listing vouches for it.
    """
    if made.record != record_id(made.object_sha, ingest_fingerprint(corpus.fields, limits)):
        return False
    known = _finished(store, made.record)
    return known is not None and _ingested(source, known, reused=made.reused) == made


def ingest_corpus(
    store: Store, config: CurationConfig, *, run_id: str, deep: bool = False, progress: Progress = silent
) -> tuple[CorpusVersion, tuple[IngestedObject, ...]]:
    """The whole stage in one call: list, ingest what changed, publish.

    Parameters
    ----------
    deep
        Look at the bytes of every object, not only of those that the listing shows as changed.

    Returns
    -------
    tuple
        The current version of the corpus, and the objects that were new or changed.

    Raises
    ------
    SourceError, BadRowsError, ConflictError, StoreError, TransientError
    """
    corpus, limits = config.corpus, config.limits
    _logger.info("%s", ingest_memory(int(limits.memory)).text)
    version, diff = look_at_sources(store, corpus, limits)
    objects: list[IngestedObject] = []
    before = 0
    for source in diff.to_read(deep=deep):

        def advance(done: int, _: int | None, before: int = before) -> None:
            progress(before + done, None)

        made = ingest_object(store, source, corpus=corpus, limits=limits, deep=deep, progress=advance)
        before += made.rows + made.rejected
        objects.append(made)
    unchanged = () if deep else diff.unchanged
    published = publish(
        store,
        corpus=corpus,
        objects=objects,
        unchanged=unchanged,
        run_id=run_id,
        limits=limits,
        compared_with=version.version if version else 0,
    )
    return published, tuple(objects)


class _Conversion:
    """One object on its way: holds at most one block of rows."""

    def __init__(
        self,
        store: Store,
        places: PlaceWriter,
        *,
        corpus: CorpusConfig,
        limits: LimitsConfig,
        dry: bool,
        on_rows: OnRows | None,
    ) -> None:
        self._store = store
        self._on_rows = on_rows
        self._places = places
        self._fields = corpus.fields
        self._row_bytes = int(limits.row_bytes)
        self._dry = dry
        self._blocks: list[BlockCount] = []
        self._buffer = RowBuffer()
        self._source_rows: list[int] = []
        self._columns: dict[str, str] = {}
        self._rows = self._rejected = self._characters = self._size = 0
        self._small = False

    def run(self, reader: Reader, progress: Progress) -> None:
        """Read every row."""
        fields, row_bytes = self._fields, self._row_bytes
        for done, row in enumerate(reader, start=1):
            value = row.value
            if isinstance(value, RowFault):
                self._reject(reader.unit, row, value, {})
            else:
                try:
                    canonical = canonical_row(value, fields=fields, row_bytes=row_bytes)
                except RowFault as fault:
                    self._reject(reader.unit, row, fault, value)
                else:
                    buffer = self._buffer
                    buffer.append(canonical)
                    self._source_rows.append(row.source_row)
                    if ends_block(canonical.doc_id, rows=len(buffer), size=buffer.size, row_size=canonical.size):
                        self._end_block()
            if done % _PROGRESS_ROWS == 0:
                progress(done, reader.total)
        self._columns = reader.columns
        self._finish()
        count("rows", self._rows)
        count("rejected", self._rejected)
        progress(self._rows + self._rejected, self._rows + self._rejected)

    def record(self, *, object_sha: str, settings: str) -> ObjectRecord:
        """The completion record."""
        return ObjectRecord(
            record=record_id(object_sha, settings),
            object_sha=object_sha,
            rows=self._rows,
            rejected=self._rejected,
            characters=self._characters,
            size=self._size,
            blocks=tuple(self._blocks),
            fields=self._columns,
            small=self._small,
        )

    def commit(self, record: ObjectRecord, places: Path) -> None:
        """Write what is left, and the completion record last."""
        if record.small:
            write_rows(self._store, record.record, self._buffer, self._source_rows)
        self._store.create_from_file(places_key(record.record), places)
        keys = {"places": places_key(record.record)} | ({"rows": rows_key(record.record)} if record.small else {})
        sealed = replace(record, crc32c={name: stored_crc32c(self._store, key) for name, key in keys.items()})
        self._store.create_json(record_key(record.record), sealed.to_json())

    def _reject(self, unit: str, row: SourceRow, fault: RowFault, value: dict[str, Any]) -> None:
        self._rejected += 1
        raw = canonical_raw(value) if row.raw is None else row.raw
        self._places.reject(row.source_row, where=f"{unit} {row.number}", fault=fault, raw=raw)

    def _end_block(self) -> None:
        rows = self._buffer
        block_id = rows.block_id() if self._dry else write_block(self._store, rows)
        self._blocks.append(BlockCount(block_id, len(rows), rows.characters))
        self._places.accept(block_id, self._source_rows)
        if self._on_rows is not None:
            self._on_rows(block_id, rows)
        self._count(rows)
        self._buffer, self._source_rows = RowBuffer(), []

    def _finish(self) -> None:
        self._small = is_small(len(self._buffer), len(self._blocks))
        if self._small:
            self._places.accept(None, self._source_rows)
            if self._on_rows is not None:
                self._on_rows(None, self._buffer)
            self._count(self._buffer)
        elif len(self._buffer):
            self._end_block()

    def _count(self, rows: RowBuffer) -> None:
        self._rows += len(rows)
        self._characters += rows.characters
        self._size += rows.size


def _finished(store: Store, record: str) -> ObjectRecord | None:
    """The record, if it and everything that it names is there."""
    if not store.exists(record_key(record)):
        return None
    known = read_record(store, record)
    keys = [places_key(record), *([rows_key(record)] if known.small else [])]
    keys += [block_key(block.block_id) for block in known.blocks]
    with ContextPool(_CONNECTIONS) as pool:
        return known if all(pool.map(store.exists, keys)) else None


def _ingested(source: SourceObject, record: ObjectRecord, *, reused: bool) -> IngestedObject:
    return IngestedObject(
        uri=source.uri,
        size=source.size,
        etag=source.etag,
        mtime=source.mtime,
        object_sha=record.object_sha,
        record=record.record,
        rows=record.rows,
        rejected=record.rejected,
        blocks=tuple(block.block_id for block in record.blocks),
        small=record.small,
        characters=record.characters,
        reused=reused,
    )
