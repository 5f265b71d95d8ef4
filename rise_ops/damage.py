"""Damage: what was found broken is noted, and the next run mends it.

    damage/<sha256 of the key>.json      key, problem, checksum of the broken bytes; by `curate verify`, and by runs
    damage/<sha256 of the key>.removed   the object was removed and has to be made again

A run begins with `heal`: what is noted and has not changed since is removed, after the record that vouches for it,
and made again like anything that is missing: blocks and records from their sources, signatures from their blocks,
codes from these, scores from both. The note of what only the sources can give back stays until it is there again, so
that a run that ends before leaves the task to the next one. An export is only touched by the run that makes the same
one again (`rise_ops.export`), a corpus version only once a newer one is published. What cannot be made again is left
alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rise_ops.checksums import stored_crc32c
from rise_ops.corpus import latest_readable, version_numbers
from rise_ops.errors import DamagedError, IntegrityError, MissingObjectError
from rise_ops.hashing import sha256_hex
from rise_ops.index import read_record
from rise_ops.shapes import NoteShape
from rise_ops.store import Store

FORMAT_VERSION = 1

_FROM_SOURCES = ("blocks", "objects", "snapshots")
_VERSION = re.compile(r"corpora/([^/]+)/versions/(\d{12})\.json")
_INDEX_BLOCK = re.compile(r"(indexes/([^/]+)/blocks/([^./]+))\.(json|zarr/.+)")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Damage:
    """One broken object."""

    key: str
    problem: str


@dataclass(frozen=True, slots=True)
class _Note:
    key: str
    stem: str
    """Of the note's own keys."""
    crc32c: int | None
    """Checksum of the broken bytes; None where the object was missing."""


def note_damage(store: Store, found: Iterable[Damage]) -> int:
    """Note broken objects for the next run. Returns how many.

    Raises
    ------
    StoreError, TransientError
    """
    count = 0
    for damage in found:
        note = {"key": damage.key, "problem": damage.problem, "crc32c": _checksum(store, damage.key)}
        store.create_json(f"{_stem(damage.key)}.json", {"format_version": FORMAT_VERSION, **note})
        count += 1
    return count


def damage_of(store: Store, error: DamagedError) -> Damage | None:
    """The object of this store that an error is about."""
    prefix = f"{store.uri}/"
    if not error.where.startswith(prefix):
        return None
    return Damage(error.where.removeprefix(prefix), str(error))


def noted_keys(store: Store, prefix: str) -> set[str]:
    """Keys below a prefix that are noted and have not changed since."""
    notes = (note for note in _notes(store) if note.key.startswith(prefix))
    return {note.key for note in notes if not _has_changed(store, note)}


def heal(store: Store) -> list[str]:
    """Remove what is noted as broken, so that this run makes it again. Returns what is to be made again."""
    missing = []
    for note in _notes(store):
        removed = store.exists(f"{note.stem}.removed")
        if _has_changed(store, note):
            _forget(store, note)
        elif removed:
            missing.append(note.key)
        elif note.key.startswith("runs/"):  # nothing makes it again
            _forget(store, note)
        elif (doomed := _doomed(store, note.key)) is not None:
            _logger.warning("%s is broken and will be made again", store.url(note.key))
            missing.append(note.key)
            for each in doomed:
                store.delete([each])  # one after the other: what vouches for others goes first
            if note.key.startswith(_FROM_SOURCES):
                store.create(f"{note.stem}.removed", b"")
            else:
                _forget(store, note)
    return missing


def settle(store: Store, *, prefix: str = "") -> None:
    """Forget the notes of what is there again, and damaged corpus versions that a newer one has followed."""
    for note in _notes(store):
        if not note.key.startswith(prefix):
            continue
        match = _VERSION.fullmatch(note.key)
        if match is not None and version_numbers(store, match[1])[-1] > int(match[2]):
            if not _has_changed(store, note):
                store.delete([note.key])
            _forget(store, note)
        elif _has_changed(store, note):
            _forget(store, note)


def _notes(store: Store) -> Iterator[_Note]:
    for name, _ in sorted(store.list("damage")):
        if name.endswith(".json"):
            try:
                found = store.get_json(name, format_version=FORMAT_VERSION, shape=NoteShape)
            except MissingObjectError:
                continue  # another run has just settled it
            yield _Note(str(found["key"]), name.removesuffix(".json"), found.get("crc32c"))


def _stem(key: str) -> str:
    return f"damage/{sha256_hex(key.encode())}"


def _forget(store: Store, note: _Note) -> None:
    store.delete([f"{note.stem}.json"])
    store.delete([f"{note.stem}.removed"])


def _checksum(store: Store, key: str) -> int | None:
    try:
        return stored_crc32c(store, key)
    except MissingObjectError:
        return None


def _has_changed(store: Store, note: _Note) -> bool:
    """Whether there is an object now that is not the broken one."""
    now = _checksum(store, note.key)
    return now is not None and (now != note.crc32c or store.exists(f"{note.stem}.removed"))


def _doomed(store: Store, key: str) -> list[str] | None:
    """What has to go for an object to be made again, in order; None where it is not for this module to remove."""
    folder = key.split("/")[0]
    if folder in ("blocks", "snapshots"):
        return [key]
    stem = key.partition(".")[0]
    if folder == "objects":
        return [f"{stem}.json", key]
    if folder in ("targets", "scores"):
        return [f"{stem}.json", *_below(store, stem)]
    if folder == "indexes":
        return _doomed_signatures(store, key)
    return None


def _doomed_signatures(store: Store, key: str) -> list[str]:
    if "/tables.zarr/" in key:  # index.json stays: it tells whether the tables that are drawn again are the same
        return [name for name, _ in store.list(f"{key.partition('/tables.zarr/')[0]}/tables.zarr")]
    if "/codes/" in key and not key.endswith(".npz"):
        stem = key.rpartition(".")[0]
        return [f"{stem}.json", f"{stem}.bin"]
    match = _INDEX_BLOCK.fullmatch(key)
    if match is None:
        return [key]
    block, identity, block_id, rest = match.groups()
    if block_id in _current_blocks(store) and _is_readable(store, identity, block_id):
        return [] if rest == "json" else [key]  # what a block lacks is seen; its record tells what else is right
    return [f"{block}.json", *_below(store, block)]


def _below(store: Store, stem: str) -> list[str]:
    """All that an id has beside its record: `<stem>.zarr/…`, `<stem>.parquet` and the like."""
    folder, _, name = stem.rpartition("/")
    files = [f"{folder}/{child}" for child in store.children(folder) if child.startswith(f"{name}.")]
    inner = [key for file in files if file.endswith(".zarr") for key, _ in store.list(file)]
    return [*(file for file in files if not file.endswith((".json", ".zarr"))), *inner]


def _current_blocks(store: Store) -> set[str]:
    """Blocks of the latest version of every corpus: runs make their signatures again."""
    versions = (latest_readable(store, name)[0] for name in store.children("corpora"))
    return {block for version in versions if version for entry in version.sources for block in entry.blocks}


def _is_readable(store: Store, identity: str, block_id: str) -> bool:
    try:
        read_record(store, identity, block_id)
    except IntegrityError:
        return False
    return True
