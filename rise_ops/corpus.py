"""Corpora: versions, snapshots, what changed since, and where a block's rows came from.

    corpora/<name>/versions/<000000000012>.json   sources and totals of one state; written by exclusive create,
                                                  the highest number is the current one
    snapshots/<snapshot_id>.parquet               block_id, rows, characters; sorted, with multiplicity
    snapshot_id = sha256 of canonical_json(sorted block ids)

Snapshots name content, versions name places. Times of modification are nanoseconds since 1970. An object
that was copied counts as often as it is there: its blocks are in the snapshot twice, its rows have two
places. (Small copied objects share their rows in one pack, which is in the snapshot once.)
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rise_ops.blocks import FORMAT_KEY, block_key, read_block, read_stored
from rise_ops.config import CorpusConfig, FieldMap, LimitsConfig
from rise_ops.errors import DamagedError, IntegrityError, MissingObjectError, SourceError
from rise_ops.hashing import canonical_json, fingerprint
from rise_ops.objects import BlockCount, places_key, record_key, rows_key
from rise_ops.readers import format_of, open_rows
from rise_ops.rows import CanonicalRow, RowFault, canonical_row, ingest_fingerprint
from rise_ops.sources import SourceObject, hash_object, list_objects, stat_object
from rise_ops.store import Store

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "CorpusVersion",
    "Placements",
    "SourceDiff",
    "SourceEntry",
    "current_version",
    "diff_sources",
    "list_incomplete",
    "list_sources",
    "look_at_sources",
    "parent_version",
    "placements",
    "read_block",
    "read_rows",
    "read_snapshot",
    "read_source_row",
    "read_version",
    "write_snapshot",
]

VERSION_FORMAT = 1
SNAPSHOT_FORMAT = 1
_VERSION_NAME = re.compile(r"^(\d{12})\.json$")
_SCANS_AT_ONCE = 64
_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One source object in a version."""

    uri: str
    size: int
    etag: str | None
    mtime: int | None
    object_sha: str
    record: str
    pack: str | None
    """Pack that holds its rows, where it is small."""
    rows: int
    rejected: int
    blocks: tuple[str, ...]
    """Blocks in source order; the pack's block where it is small."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"blocks": list(self.blocks)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SourceEntry:
        """Inverse of `to_json`."""
        return cls(**{**value, "blocks": tuple(value["blocks"])})

    @property
    def listed(self) -> SourceObject:
        """The object as the listing showed it."""
        return SourceObject(self.uri, self.size, self.etag, self.mtime)


@dataclass(frozen=True, slots=True)
class CorpusVersion:
    """One published state of a corpus."""

    corpus: str
    version: int
    parent: int | None
    snapshot_id: str
    run_id: str
    created: str
    """ISO 8601, UTC."""
    ingest_fingerprint: str
    rows: int
    rejected: int
    fields: Mapping[str, str]
    """Source columns and their Arrow types; "json" where formats differ or have none."""
    sources: tuple[SourceEntry, ...]
    """Sorted by uri."""

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        sources = [entry.to_json() for entry in self.sources]
        return {"format_version": VERSION_FORMAT} | asdict(self) | {"fields": dict(self.fields), "sources": sources}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CorpusVersion:
        """Inverse of `to_json`."""
        plain = {name: value[name] for name in cls.__slots__ if name != "sources"}
        return cls(**plain, sources=tuple(SourceEntry.from_json(entry) for entry in value["sources"]))


@dataclass(frozen=True, slots=True)
class SourceDiff:
    """A listing against a version."""

    added: tuple[SourceObject, ...]
    changed: tuple[SourceObject, ...]
    removed: tuple[SourceEntry, ...]
    unchanged: tuple[SourceEntry, ...]

    def to_read(self, *, deep: bool) -> tuple[SourceObject, ...]:
        """Objects whose bytes are to be looked at: those that differ, and if `deep` all."""
        same = (entry.listed for entry in self.unchanged) if deep else ()
        return (*self.added, *self.changed, *same)

    def reopened(self, uris: Collection[str]) -> SourceDiff:
        """With these of the unchanged objects among the changed."""
        again = tuple(entry.listed for entry in self.unchanged if entry.uri in uris)
        rest = tuple(entry for entry in self.unchanged if entry.uri not in uris)
        return replace(self, changed=(*self.changed, *again), unchanged=rest)


def list_sources(corpus: CorpusConfig, *, store: Store | None = None) -> list[SourceObject]:
    """The corpus' objects as they are now, sorted by uri.

    Raises
    ------
    SourceError
        A glob matches nothing, or an object of unknown format.
    ConfigError
        A source lies in `store`.
    TransientError
        The server did not answer.
    """
    listing = list_objects(corpus.sources, outside=None if store is None else store.uri)
    for item in listing:
        format_of(item.uri)
    return listing


def version_key(name: str, number: int) -> str:
    """Where a version is in the store."""
    return f"corpora/{name}/versions/{number:012d}.json"


def read_version(store: Store, name: str, number: int) -> CorpusVersion:
    """One version.

    Raises
    ------
    MissingObjectError, IntegrityError, StoreError, TransientError
    """
    expected = {"corpus": name, "version": number}
    key = version_key(name, number)
    found = store.get_json(key, format_version=VERSION_FORMAT, shape=CorpusVersion, holds=expected)
    return CorpusVersion.from_json(found)


def current_version(store: Store, name: str) -> CorpusVersion | None:
    """The version with the highest number, or None before the first."""
    numbers = version_numbers(store, name)
    return read_version(store, name, numbers[-1]) if numbers else None


def version_numbers(store: Store, name: str) -> list[int]:
    """Numbers of a corpus' versions, ascending."""
    matches = (_VERSION_NAME.match(child) for child in store.children(f"corpora/{name}/versions"))
    return sorted(int(match[1]) for match in matches if match)


def latest_readable(store: Store, name: str) -> tuple[CorpusVersion | None, int]:
    """What a run begins with: the latest version that is not damaged, and the highest number, which may be higher.

    Readers use `current_version`, which refuses a damaged one: an older state must not pass for the current one. A
    run publishes the state of the sources again, under a new number.
    """
    numbers = version_numbers(store, name)
    for number in reversed(numbers):
        with suppress(DamagedError):
            return read_version(store, name, number), numbers[-1]
    return None, numbers[-1] if numbers else 0


def parent_version(store: Store, version: CorpusVersion) -> CorpusVersion | None:
    """The version before, or None for the first one and where the one before was removed."""
    if version.parent is None:
        return None
    try:
        return read_version(store, version.corpus, version.parent)
    except MissingObjectError:
        return None


def diff_sources(listing: Sequence[SourceObject], version: CorpusVersion | None, ingest_fingerprint: str) -> SourceDiff:
    """What a listing changes in a version.

    An object is unchanged when its uri, size and ETag (where there is none: modification time) are the same
    and the version was ingested with the same settings. Nothing is read.
    """
    known = {} if version is None else {entry.uri: entry for entry in version.sources}
    same_settings = version is not None and version.ingest_fingerprint == ingest_fingerprint
    added, changed, unchanged = [], [], []
    for item in listing:
        entry = known.pop(item.uri, None)
        if entry is None:
            added.append(item)
        elif same_settings and entry.listed.same_state(item):
            unchanged.append(entry)
        else:
            changed.append(item)
    return SourceDiff(tuple(added), tuple(changed), tuple(known.values()), tuple(unchanged))


def look_at_sources(
    store: Store, corpus: CorpusConfig, limits: LimitsConfig
) -> tuple[CorpusVersion | None, SourceDiff]:
    """The corpus' current version, and what a fresh listing of its sources changes in it. Reads no source.

    Raises
    ------
    SourceError, ConfigError, TransientError
        As `list_sources`.
    """
    version, _ = latest_readable(store, corpus.name)
    settings = ingest_fingerprint(corpus.fields, limits)
    return version, diff_sources(list_sources(corpus, store=store), version, settings)


def list_incomplete(store: Store, version: CorpusVersion) -> set[str]:
    """Uris of the objects of a version that lack something in the store: a record, a pack, a block, the snapshot."""
    if not store.exists(snapshot_key(version.snapshot_id)):
        return {entry.uri for entry in version.sources}
    there = {key for folder in ("objects", "blocks") for key, _ in store.list(folder)}

    def is_whole(entry: SourceEntry) -> bool:
        records = [entry.record] if entry.pack is None else [entry.record, entry.pack]
        keys = [key for record in records for key in (record_key(record), places_key(record))]
        keys += [block_key(block) for block in entry.blocks]
        return there.issuperset(keys if entry.pack is None else [*keys, rows_key(entry.record)])

    return {entry.uri for entry in version.sources if not is_whole(entry)}


def write_snapshot(store: Store, blocks: Iterable[BlockCount]) -> str:
    """Store the blocks of one state, with multiplicity; returns the snapshot's id."""
    import polars as pl

    ordered = sorted(blocks, key=lambda block: block.block_id)
    snapshot_id = fingerprint([block.block_id for block in ordered])
    frame = pl.DataFrame(
        {
            "block_id": [block.block_id for block in ordered],
            "rows": [block.rows for block in ordered],
            "characters": [block.characters for block in ordered],
        },
        schema={"block_id": pl.String, "rows": pl.UInt32, "characters": pl.UInt64},
    )
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={FORMAT_KEY: str(SNAPSHOT_FORMAT)})
    store.create(snapshot_key(snapshot_id), buffer.getvalue())
    return snapshot_id


def snapshot_key(snapshot_id: str) -> str:
    """Where a snapshot is in the store."""
    return f"snapshots/{snapshot_id}.parquet"


def read_snapshot(store: Store, snapshot_id: str) -> pl.DataFrame:
    """block_id, rows, characters of every block, sorted by id, with multiplicity.

    Raises
    ------
    IntegrityError
        It is missing or damaged.
    """
    key, columns = snapshot_key(snapshot_id), ("block_id", "rows", "characters")
    try:
        return read_stored(store, key, columns=columns, known_format=SNAPSHOT_FORMAT)
    except MissingObjectError as error:
        raise DamagedError(f"{store.url(key)} is missing; run again", store.url(key)) from error


class Placements:
    """Where the rows of a version's blocks came from, some blocks at a time.

    Parameters
    ----------
    store
        Holds the records.
    version
        Gone through once: what is asked afterwards takes time by the blocks asked for, not by the sources there are.
    """

    def __init__(self, store: Store, version: CorpusVersion) -> None:
        self._store, self._version = store, version
        self._holders: dict[str, list[SourceEntry]] = {}
        for entry in version.sources:
            for block in dict.fromkeys(entry.blocks):
                self._holders.setdefault(block, []).append(entry)

    def of(self, block_ids: Iterable[str]) -> pl.DataFrame:
        """Places of the rows of some blocks.

        Returns
        -------
        polars.DataFrame
            block_id, block_row (u32), source_uri, source_row (i64); several rows for a block row whose object was
            copied. Reads only the records that hold these blocks.

        Raises
        ------
        IntegrityError
            A block is not in the version, or a record is missing.
        """
        import polars as pl

        wanted = dict.fromkeys(block_ids)
        columns = ("block_id", "block_row", "source_uri", "source_row")
        scans: dict[str, pl.LazyFrame] = {}
        for key, entries in self._records(wanted).items():
            # a record's own blocks only: Polars holds each against every row group of the record
            own = [block for block in dict.fromkeys(entries[0].blocks) if block in wanted]
            here = self._store.scan_parquet([key]).filter(pl.col("block_id").is_in(own))
            if entries[0].pack is None:
                places = pl.LazyFrame({"source_uri": [entry.uri for entry in entries]})
                joined = here.join(places, how="cross")
            else:
                pairs = [(entry.object_sha, entry.uri) for entry in entries]
                places = pl.LazyFrame(pairs, schema={"object_sha": pl.String, "source_uri": pl.String}, orient="row")
                joined = here.join(places, on="object_sha")
            scans[key] = joined.select(columns)
        empty = {"block_id": pl.String, "block_row": pl.UInt32, "source_uri": pl.String, "source_row": pl.Int64}
        return pl.concat([pl.DataFrame(schema=empty), *_collected_places(self._store, scans)]).sort(columns)

    def _records(self, blocks: Iterable[str]) -> dict[str, list[SourceEntry]]:
        """The records and packs of some blocks, by their key, with the objects whose rows they place."""
        found: dict[str, dict[str, SourceEntry]] = {}
        for block in blocks:
            if block not in self._holders:
                raise IntegrityError(
                    f"block {block} is not in corpus {self._version.corpus} version {self._version.version}"
                )
            for entry in self._holders[block]:
                found.setdefault(places_key(entry.pack or entry.record), {})[entry.uri] = entry
        return {key: list(entries.values()) for key, entries in found.items()}


def placements(store: Store, version: CorpusVersion, block_ids: Iterable[str]) -> pl.DataFrame:
    """`Placements.of` for one question."""
    return Placements(store, version).of(block_ids)


def _collected_places(store: Store, scans: Mapping[str, pl.LazyFrame]) -> Iterator[pl.DataFrame]:
    """Many small tables, some at a time; where one is broken, one by one, so that it can be named."""
    import polars as pl

    keys = list(scans)
    for start in range(0, len(keys), _SCANS_AT_ONCE):
        few = keys[start : start + _SCANS_AT_ONCE]
        try:
            frames = store.collected(few[0], partial(pl.collect_all, [scans[key] for key in few]))
        except (IntegrityError, MissingObjectError):
            frames = [_places(store, key, scans[key]) for key in few]
        yield from frames


def _places(store: Store, key: str, scan: pl.LazyFrame) -> pl.DataFrame:
    try:
        return store.collected(key, scan.collect)
    except (IntegrityError, MissingObjectError) as error:
        raise DamagedError(f"{store.url(key)} is missing or damaged ({error}); run again", store.url(key)) from error


def read_rows(uri: str, fields: FieldMap, limits: LimitsConfig) -> list[CanonicalRow]:
    """All rows of a small file or glob, such as a target's queries.

    Raises
    ------
    SourceError
        Naming the first line that is not a good row, or the file when it has no rows.
    """
    row_bytes = int(limits.row_bytes)
    rows: list[CanonicalRow] = []
    for source in list_objects([uri]):
        with open_rows(source, row_bytes=row_bytes) as reader:
            for row in reader:
                try:
                    if isinstance(row.value, RowFault):
                        raise row.value
                    rows.append(canonical_row(row.value, fields=fields, row_bytes=row_bytes))
                except RowFault as fault:
                    raise SourceError(f"{source.uri}: {reader.unit} {row.number} {fault.reason}") from None
    if not rows:
        raise SourceError(f"{uri} has no rows")
    return rows


def read_source_row(entry: SourceEntry, source_row: int) -> str:
    """One row again, as it stands in its source object: a line, a CSV record, or a table row as JSON.

    Raises
    ------
    SourceError
        The object is gone, or is not the one that was ingested.
    """
    now = stat_object(entry.uri)
    if not now.same_state(entry.listed) and (now.size != entry.size or hash_object(entry.uri) != entry.object_sha):
        raise SourceError(f"source {entry.uri} is not what it was when it was ingested; its rows may have moved")
    with open_rows(now, row_bytes=_LINE_BYTES) as reader:
        for row in reader:
            if row.source_row < source_row:
                continue
            if row.source_row > source_row:
                break
            if row.raw is not None:
                return row.raw.decode("utf-8", "backslashreplace")
            return canonical_json(row.value) if isinstance(row.value, dict) else row.value.reason
    raise SourceError(f"source {entry.uri} has no row {source_row}")
