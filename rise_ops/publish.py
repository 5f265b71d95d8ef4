"""Publishing a corpus version: pack, check the limit of bad rows, then snapshot, then version.

The version is written last, by exclusive create. Whoever loses a race reads the winner's version: equal
content is success. Otherwise the sources are listed again: a run that saw them as they still are takes the next
number; one whose look is outdated is refused, so that no older state follows a newer one. Where nothing changed,
nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from rise_ops.config import CorpusConfig, LimitsConfig
from rise_ops.corpus import (
    CorpusVersion,
    SourceEntry,
    latest_readable,
    list_sources,
    snapshot_key,
    version_key,
    write_snapshot,
)
from rise_ops.errors import ConflictError
from rise_ops.objects import BlockCount, IngestedObject, ObjectRecord, read_record
from rise_ops.packs import Pack, pack_objects
from rise_ops.quarantine import check_rows
from rise_ops.rows import ingest_fingerprint
from rise_ops.sources import SourceObject
from rise_ops.store import Store
from rise_ops.threads import ContextPool

_ATTEMPTS = 5
_CONNECTIONS = 16


def publish(
    store: Store,
    *,
    corpus: CorpusConfig,
    objects: Sequence[IngestedObject],
    unchanged: Sequence[SourceEntry],
    run_id: str,
    limits: LimitsConfig,
    compared_with: int | None = None,
) -> CorpusVersion:
    """Make ingested objects the current version of a corpus.

    Parameters
    ----------
    store
        Holds their records.
    corpus, limits
        As they were ingested with; `limits.bad_rows` is checked here.
    objects
        New and changed objects.
    unchanged
        Entries of the current version that stay.
    run_id
        Who publishes.
    compared_with
        Number of the version that the listing was compared with, 0 where there was none; by default the current
        one.

    Returns
    -------
    CorpusVersion
        The new version, or the current one where it says the same.

    Raises
    ------
    BadRowsError
        Too many rejected rows.
    SourceError
        No rows at all.
    ConflictError
        Another run published first and the sources have changed since, or others published first five times.
    """
    settings = ingest_fingerprint(corpus.fields, limits)
    entries = _merged(objects, unchanged)
    check_rows(store, entries, corpus=corpus.name, run_id=run_id, limits=limits)
    current, number = latest_readable(store, corpus.name)
    if (
        current is not None
        and current.version == number
        and current.ingest_fingerprint == settings
        and current.sources == entries
        and store.exists(snapshot_key(current.snapshot_id))
    ):
        return current
    records = _records(store, entries)
    packs = {record: pack for pack in pack_objects(store, records.values()) for record in pack.members}
    entries = tuple(_located(entry, packs.get(entry.record)) for entry in entries)
    snapshot_id = write_snapshot(store, _blocks(entries, records, packs))
    draft = CorpusVersion(
        corpus=corpus.name,
        version=0,
        parent=None,
        snapshot_id=snapshot_id,
        run_id=run_id,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ingest_fingerprint=settings,
        rows=sum(entry.rows for entry in entries),
        rejected=sum(entry.rejected for entry in entries),
        fields=_fields(records.values()),
        sources=entries,
    )
    seen = compared_with if compared_with is not None else current.version if current else 0
    return _commit(store, draft, current, number, corpus=corpus, seen=seen)


def _merged(objects: Sequence[IngestedObject], unchanged: Sequence[SourceEntry]) -> tuple[SourceEntry, ...]:
    entries = {entry.uri: entry for entry in unchanged}
    for made in objects:
        entries[made.uri] = SourceEntry(
            uri=made.uri,
            size=made.size,
            etag=made.etag,
            mtime=made.mtime,
            object_sha=made.object_sha,
            record=made.record,
            pack=None,
            rows=made.rows,
            rejected=made.rejected,
            blocks=made.blocks,
        )
    return tuple(entries[uri] for uri in sorted(entries))


def _records(store: Store, entries: Sequence[SourceEntry]) -> dict[str, ObjectRecord]:
    names = sorted({entry.record for entry in entries})
    with ContextPool(_CONNECTIONS) as pool:
        return dict(zip(names, pool.map(lambda name: read_record(store, name), names), strict=True))


def _located(entry: SourceEntry, pack: Pack | None) -> SourceEntry:
    if pack is None:
        return entry
    return replace(entry, pack=pack.pack, blocks=(pack.block.block_id,))


def _blocks(
    entries: Sequence[SourceEntry], records: Mapping[str, ObjectRecord], packs: Mapping[str, Pack]
) -> Iterator[BlockCount]:
    for entry in entries:
        yield from records[entry.record].blocks
    yield from {pack.pack: pack.block for pack in packs.values()}.values()


def _fields(records: Iterable[ObjectRecord]) -> dict[str, str]:
    fields: dict[str, str] = {}
    for record in records:
        for name, kind in record.fields.items():
            known = fields.get(name, "null")
            if known in ("null", kind):
                fields[name] = kind
            elif kind != "null":
                fields[name] = "json"
    return dict(sorted(fields.items()))


def _commit(
    store: Store, draft: CorpusVersion, current: CorpusVersion | None, number: int, *, corpus: CorpusConfig, seen: int
) -> CorpusVersion:
    """Publish after `current`, under a number above `number`, the highest that there is, readable or not."""
    for _ in range(_ATTEMPTS):
        if current is not None and current.version == number and _says_the_same(current, draft):
            return current
        if current is not None and current.version != seen:
            _refuse_outdated(store, draft, current, corpus=corpus)
        parent = None if current is None else current.version
        version = replace(draft, version=number + 1, parent=parent)
        if store.create_json(version_key(version.corpus, version.version), version.to_json()):
            return version
        current, number = latest_readable(store, draft.corpus)
    raise ConflictError(
        f"corpus {draft.corpus}: other runs published {_ATTEMPTS} versions meanwhile; run again when they have finished"
    )


def _refuse_outdated(store: Store, draft: CorpusVersion, current: CorpusVersion, *, corpus: CorpusConfig) -> None:
    """Raise ConflictError where the sources are not any more as the draft saw them."""
    now = {item.uri: item for item in list_sources(corpus, store=store)}
    same = now.keys() == {entry.uri for entry in draft.sources}
    if not same or not all(_unchanged(entry, now[entry.uri]) for entry in draft.sources):
        raise ConflictError(
            f"corpus {draft.corpus}: run {current.run_id} published version {current.version} meanwhile, and the "
            "sources have changed since this run listed them; run again"
        )


def _unchanged(entry: SourceEntry, now: SourceObject) -> bool:
    if entry.etag is None and entry.mtime is None:
        return entry.size == now.size  # nothing else is known of it
    return entry.listed.same_state(now)


def _says_the_same(one: CorpusVersion, other: CorpusVersion) -> bool:
    return (one.snapshot_id, one.ingest_fingerprint, one.sources) == (
        other.snapshot_id,
        other.ingest_fingerprint,
        other.sources,
    )
