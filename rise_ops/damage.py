"""Damage: what was found broken is noted, and the next run mends it.

    damage/<sha256 of the key>.json   key, problem; by `curate verify`, and by runs that meet it

A run begins with `heal`: what is noted is removed, after the record that vouches for it. What is missing then is
made again like anything that is missing: blocks and records from their sources, signatures from their blocks,
scores and exports from both. What cannot be made again (an old corpus version, the decisions of a run that ended)
is left as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass

from rise_ops.corpus import version_key
from rise_ops.errors import DamagedError, IntegrityError
from rise_ops.export import manifest_key
from rise_ops.hashing import sha256_hex
from rise_ops.index import read_record
from rise_ops.shapes import NoteShape
from rise_ops.store import Store

FORMAT_VERSION = 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Damage:
    """One broken object."""

    key: str
    problem: str


def note_damage(store: Store, found: Iterable[Damage]) -> int:
    """Note broken objects for the next run; a run makes them again. Returns how many.

    Raises
    ------
    StoreError, TransientError
    """
    count = 0
    for damage in found:
        note = {"format_version": FORMAT_VERSION, "key": damage.key, "problem": damage.problem}
        store.create_json(_note_key(damage.key), note)
        count += 1
    return count


def damage_of(store: Store, error: DamagedError) -> Damage | None:
    """The object of this store that an error is about."""
    prefix = f"{store.uri}/"
    if not error.where.startswith(prefix):
        return None
    return Damage(error.where.removeprefix(prefix), str(error))


def heal(store: Store) -> list[str]:
    """Remove what is noted as broken, so that this run makes it again. Returns the keys."""
    healed = []
    for note, _ in sorted(store.list("damage")):
        key = str(store.get_json(note, format_version=FORMAT_VERSION, shape=NoteShape)["key"])
        doomed = _doomed(store, key)
        if doomed:
            _logger.warning("%s is broken and will be made again", store.url(key))
            healed.append(key)
            for each in doomed:
                store.delete([each])  # one after the other: the record first
        store.delete([note])
    return healed


def _note_key(key: str) -> str:
    return f"damage/{sha256_hex(key.encode())}.json"


def _doomed(store: Store, key: str) -> list[str]:
    """What has to go for an object to be made again, in order; nothing where it cannot be."""
    folder = key.split("/")[0]
    if folder in ("blocks", "snapshots"):
        return [key]
    if folder in ("objects", "targets", "scores"):
        stem = key.partition(".")[0]
        around = sorted(name for name, _ in store.list(stem.rpartition("/")[0]) if name.startswith(f"{stem}."))
        return sorted(around, key=lambda name: not name.endswith(".json"))
    if folder == "exports":
        name, version, *_ = key.split("/")[1:]
        return [manifest_key(name, version), key]
    if folder == "indexes":
        index = "/".join(key.split("/")[:2])
        if "/tables.zarr/" in key:
            return [f"{index}/index.json", *(name for name, _ in store.list(f"{index}/tables.zarr"))]
        return [] if _is_good_record(store, key) else [key]
    return [key] if _is_latest_version(store, key) else []


def _is_good_record(store: Store, key: str) -> bool:
    """Whether this is the record of an index block that can be read: what it lacks is seen without a note, and it
    tells whether the rest of the block is right."""
    match = re.fullmatch(r"indexes/([^/]+)/blocks/([^/]+)\.json", key)
    if match is None:
        return False
    try:
        read_record(store, match[1], match[2])
    except IntegrityError:
        return False
    return True


def _is_latest_version(store: Store, key: str) -> bool:
    match = re.fullmatch(r"corpora/([^/]+)/versions/(\d{12})\.json", key)
    if match is None:
        return False
    numbers = [name.removesuffix(".json") for name in store.children(f"corpora/{match[1]}/versions")]
    return key == version_key(match[1], max(int(name) for name in numbers if name.isdigit()))
