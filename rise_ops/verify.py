"""Is everything in the store that its records promise?

Shallow: every corpus version can be read, and its snapshot, records, packs and blocks are there; every recorded
index block has all its objects in full size; every target, every scored part and every finished export is whole. Deep:
contents are hashed again, too: blocks against their ids, sketch tables against the index, export files against the
SHA-256 in the manifest, all else against the CRC-32C in its record. JSON documents carry their own checksum.

Nothing is changed. What is broken is noted (`rise_ops.damage`), and the next run makes it again where it can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from rise_ops.blocks import block_key, read_block, read_stored
from rise_ops.checksums import crc32c, stored_crc32c
from rise_ops.corpus import CorpusVersion, read_snapshot, read_version, snapshot_key, version_key, version_numbers
from rise_ops.damage import Damage, note_damage
from rise_ops.errors import CurationError, IntegrityError, MissingObjectError
from rise_ops.export import manifest_key, read_manifest
from rise_ops.hashing import fingerprint
from rise_ops.index import IndexListing, describe_index, index_key, list_indexes, read_record, tables_key
from rise_ops.objects import RECORD_FORMAT, places_key, record_key, rows_key
from rise_ops.objects import read_record as read_object_record
from rise_ops.packs import read_pack
from rise_ops.runs import decisions_key, read_run
from rise_ops.shapes import (
    CodesShape,
    FactsShape,
    LoopResultShape,
    OutcomeShape,
    PartShape,
    TargetShape,
    TuningShape,
)
from rise_ops.store import Store
from rise_ops.targets import read_target

Json = dict[str, Any]

AGAIN = "the next run makes it again"
EXPORT = "`curate export` with the configuration that made it makes it again"
PUBLISH = "the next run publishes the corpus under a new version"
COMPRESS = "`curate compress` makes it again"
DROP = "the next run removes it: only older versions of a corpus have this block"
GONE = "nothing makes it again; restore it from a backup"


@dataclass(frozen=True, slots=True)
class _Check:
    """One thing to look at."""

    key: str
    remedy: str
    look: Callable[[], str | None]
    """Tells what is wrong, or raises."""


def verify_store(store: Store, *, deep: bool = False) -> Json:
    """What is broken: {store, checked: things looked at, deep, broken: [{key, problem, remedy}], noted}.

    `noted` is False where the store could not take the notes.
    """
    checked = 0
    broken: list[dict[str, str]] = []
    for check in _checks(store, deep=deep):
        checked += 1
        problem = _problem(check)
        if problem is not None:
            broken.append({"key": check.key, "problem": problem, "remedy": check.remedy})
    noted = True
    try:
        note_damage(store, [Damage(item["key"], item["problem"]) for item in broken if item["remedy"] != GONE])
    except CurationError:
        noted = False
    return {"store": store.uri, "deep": deep, "checked": checked, "broken": broken, "noted": noted}


def _problem(check: _Check) -> str | None:
    try:
        return check.look()
    except MissingObjectError:
        return "is missing"
    except IntegrityError as error:
        return str(error)
    except (pl.exceptions.PolarsError, KeyError, ValueError, TypeError) as error:
        return f"is damaged ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__})"


def _checks(store: Store, *, deep: bool) -> Iterator[_Check]:
    current: set[str] = set()
    yield from _corpora(store, current, deep=deep)
    yield from _indexes(store, current, deep=deep)
    yield from _targets(store, deep=deep)
    yield from _scores(store, deep=deep)
    yield from _exports(store, deep=deep)
    yield from _runs(store)
    yield from _tunings(store)
    yield from _comparisons(store)
    yield from _loops(store)


def _corpora(store: Store, current_blocks: set[str], *, deep: bool) -> Iterator[_Check]:
    versions: list[CorpusVersion] = []
    latest: list[CorpusVersion] = []
    for corpus in store.children("corpora"):
        numbers = version_numbers(store, corpus)
        for number in numbers:
            yield _version(store, corpus, number, versions, is_latest=number == numbers[-1])
        latest += versions[-1:] if versions and versions[-1].corpus == corpus else []
    # what the latest versions have, runs make again; of the rest, the sources may not be what they were
    current = {name for version in latest for name in _names(version)}
    rest = {name for version in versions for name in _names(version)} - current
    current_blocks |= {name for kind, name in current if kind == "block"}
    objects, blocks = ({key for key, _ in store.list(folder)} for folder in ("objects", "blocks"))
    for names, remedy in ((current, AGAIN), (rest, GONE)):
        for check in _contents(store, sorted(names), objects, blocks, deep=deep):
            yield replace(check, remedy=remedy)


def _names(version: CorpusVersion) -> Iterator[tuple[str, str]]:
    """Everything that a version names, by kind; blocks before the snapshot that counts their rows."""
    for entry in version.sources:
        yield "record", entry.record
        if entry.pack is not None:
            yield "pack", entry.pack
        yield from (("block", block) for block in entry.blocks)
    yield "snapshot", version.snapshot_id


def _contents(
    store: Store, names: Sequence[tuple[str, str]], objects: set[str], blocks: set[str], *, deep: bool
) -> Iterator[_Check]:
    counts: dict[str, tuple[int, int]] = {}
    for kind, name in names:
        if kind == "record":
            yield from _record(store, name, objects, deep=deep)
        elif kind == "pack":
            yield from _pack(store, name, objects, deep=deep)
        elif kind == "block":
            yield _block(store, name, blocks, counts, deep=deep)
        else:
            yield _snapshot(store, name, counts, deep=deep)


def _version(store: Store, corpus: str, number: int, found: list[CorpusVersion], *, is_latest: bool) -> _Check:
    def look() -> None:
        found.append(read_version(store, corpus, number))

    return _Check(version_key(corpus, number), PUBLISH if is_latest else GONE, look)


def _snapshot(store: Store, snapshot: str, counts: Mapping[str, tuple[int, int]], *, deep: bool) -> _Check:
    """`counts`: rows and characters of the blocks that were read."""
    key = snapshot_key(snapshot)

    def look() -> str | None:
        if not deep:
            return None if store.exists(key) else "is missing"
        frame = read_snapshot(store, snapshot)
        if fingerprint(frame["block_id"].to_list()) != snapshot:
            return "does not hold the blocks that its name says"
        wrong = [block for block, *found in frame.iter_rows() if counts.get(block, tuple(found)) != tuple(found)]
        return f"counts the rows of block {wrong[0]} wrongly" if wrong else None

    return _Check(key, AGAIN, look)


def _record(store: Store, record: str, there: set[str], *, deep: bool) -> Iterator[_Check]:
    sums: dict[str, int] = {}
    keys = {"places": places_key(record)}

    def look() -> None:
        known = read_object_record(store, record)
        sums.update(known.crc32c)
        if known.small:
            keys["rows"] = rows_key(record)

    yield _Check(record_key(record), AGAIN, look)
    for name, key in keys.items():
        yield _file(store, key, there, sums.get(name), deep=deep)


def _pack(store: Store, pack: str, there: set[str], *, deep: bool) -> Iterator[_Check]:
    sums: dict[str, int] = {}

    def look() -> None:
        sums.update(read_pack(store, pack).get("crc32c", {}))

    yield _Check(record_key(pack), AGAIN, look)
    yield _file(store, places_key(pack), there, sums.get("places"), deep=deep)


def _file(store: Store, key: str, there: set[str], checksum: int | None, *, deep: bool) -> _Check:
    def look() -> str | None:
        if key not in there:
            return "is missing"
        return _mismatch(store, key, checksum) if deep else None

    return _Check(key, AGAIN, look)


def _mismatch(store: Store, key: str, checksum: int | None) -> str | None:
    """What is wrong with a file whose checksum is recorded; one from before checksums only has to decode."""
    if checksum is None:
        read_stored(store, key, known_format=RECORD_FORMAT)
        return None
    return None if stored_crc32c(store, key) == checksum else "does not match its checksum"


def _block(store: Store, block_id: str, there: set[str], counts: dict[str, tuple[int, int]], *, deep: bool) -> _Check:
    key = block_key(block_id)

    def look() -> str | None:
        if key not in there:
            return "is missing"
        if deep:
            texts = read_block(store, block_id)["text"]  # which compares all its columns with the id
            counts[block_id] = (len(texts), int(texts.str.len_chars().sum()))
        return None

    return _Check(key, AGAIN, look)


def _indexes(store: Store, current_blocks: set[str], *, deep: bool) -> Iterator[_Check]:
    for identity in list_indexes(store):
        yield from _index(store, identity, deep=deep)
        listing = IndexListing(store, identity)
        for block_id in listing.recorded:
            remedy = AGAIN if block_id in current_blocks else DROP
            for check in _index_block(store, identity, block_id, listing, deep=deep):
                yield replace(check, remedy=remedy)
        yield from _codes(store, identity, deep=deep)


def _codes(store: Store, identity: str, *, deep: bool) -> Iterator[_Check]:
    """Codes of an index: their rotation, and each record with its bits."""
    for name in store.children(f"indexes/{identity}/codes"):
        folder = f"indexes/{identity}/codes/{name}"
        there = {key for key, _ in store.list(folder)}
        rotation = f"{folder}/simhash.npz"

        def turn(key: str = rotation) -> None:
            from rise_ops.simhash import SimHash  # brings PyTorch, which a store without codes is checked without

            SimHash.from_bytes(bytes(store.get(key)), where=store.url(key))

        yield _Check(rotation, COMPRESS, turn)
        for key in sorted(key for key in there if key.endswith(".json")):
            sums: dict[str, int] = {}

            def look(key: str = key, sums: dict[str, int] = sums) -> None:
                sums["codes"] = store.get_json(key, shape=CodesShape)["crc32c"]

            yield _Check(key, COMPRESS, look)
            if sums:
                file = _file(store, f"{key.removesuffix('.json')}.bin", there, sums["codes"], deep=deep)
                yield replace(file, remedy=COMPRESS)


def _index(store: Store, identity: str, *, deep: bool) -> Iterator[_Check]:
    expected: list[str] = []

    def look() -> None:
        expected.append(describe_index(store, identity)["tables_sha256"])

    def look_at_tables() -> str | None:
        from rise_ops.sketch import load_tables

        found = load_tables(store, f"indexes/{identity}/tables.zarr").sha256
        return None if [found] == expected else "belongs to other sketch tables than the index was made with"

    yield _Check(index_key(identity), AGAIN, look)
    if deep and expected:
        yield _Check(tables_key(identity), AGAIN, look_at_tables)


def _index_block(store: Store, identity: str, block_id: str, listing: IndexListing, *, deep: bool) -> Iterator[_Check]:
    prefix = f"indexes/{identity}/blocks/{block_id}"
    sums: dict[str, int] = {}

    def look() -> str | None:
        record = read_record(store, identity, block_id)
        sums.update(record.crc32c)
        return None if listing.complete({block_id: record.rows}, dim=record.dim) else "lacks objects of its block"

    yield _Check(f"{prefix}.json", AGAIN, look)
    if deep:
        for name, checksum in sums.items():
            yield _object(store, f"{prefix}.zarr/{name}", lambda data, right=checksum: crc32c(data) == right)  # type: ignore[misc]


def _object(store: Store, key: str, is_right: Callable[[memoryview], bool]) -> _Check:
    def look() -> str | None:
        return None if is_right(store.get_buffer(key, size=store.size(key))) else "does not match its checksum"

    return _Check(key, AGAIN, look)


def _targets(store: Store, *, deep: bool) -> Iterator[_Check]:
    for file in store.children("targets"):
        if file.endswith(".json"):
            name = file.removesuffix(".json")

            def look(name: str = name) -> None:
                if deep:
                    read_target(store, name)
                else:
                    store.get_json(f"targets/{name}.json", shape=TargetShape)

            yield _Check(f"targets/{file}", AGAIN, look)


def _scores(store: Store, *, deep: bool) -> Iterator[_Check]:
    there = {key for key, _ in store.list("scores")}
    for key in sorted(key for key in there if key.endswith(".json")):
        sums: dict[str, int] = {}

        def look(key: str = key, sums: dict[str, int] = sums) -> None:
            sums.update(store.get_json(key, shape=PartShape)["crc32c"])

        yield _Check(key, AGAIN, look)
        stem = key.removesuffix(".json")
        for name, file in (("scores", f"{stem}.parquet"), ("extremes", f"{stem}.extremes.parquet")):
            yield _file(store, file, there, sums.get(name), deep=deep)


def _runs(store: Store) -> Iterator[_Check]:
    """Records of runs, and whether their decisions are there."""
    for run_id in store.children("runs"):
        key = f"runs/{run_id}/run.json"
        if not store.exists(key):
            continue
        decided: list[str] = []

        def look(run_id: str = run_id, decided: list[str] = decided) -> None:
            if read_run(store, run_id).get("selection"):
                decided.append(decisions_key(run_id))

        yield _Check(key, GONE, look)
        for name in decided:
            yield _Check(name, GONE, lambda name=name: None if store.exists(name) else "is missing")  # type: ignore[misc]


def _documents(store: Store, keys: Iterable[str], shape: type[Any], remedy: str) -> Iterator[_Check]:
    """JSON documents that stand for themselves: whether they can be read and have their shape."""
    for key in keys:

        def look(key: str = key) -> None:
            store.get_json(key, shape=shape)

        yield _Check(key, remedy, look)


def _tunings(store: Store) -> Iterator[_Check]:
    yield from _documents(store, _below(store, "tunings"), TuningShape, GONE)


def _comparisons(store: Store) -> Iterator[_Check]:
    for folder in _below(store, "comparisons"):
        for key in _below(store, folder):
            yield from _documents(store, [key], FactsShape if key.endswith("/facts.json") else OutcomeShape, AGAIN)


def _loops(store: Store) -> Iterator[_Check]:
    for folder in _below(store, "loops"):
        yield from _documents(store, _below(store, f"{folder}/results"), LoopResultShape, AGAIN)


def _below(store: Store, folder: str) -> list[str]:
    return [f"{folder}/{name}" for name in store.children(folder)]


def _exports(store: Store, *, deep: bool) -> Iterator[_Check]:
    for name in store.children("exports"):
        for version in store.children(f"exports/{name}"):
            if store.exists(manifest_key(name, version)):
                yield from _export(store, name, version, deep=deep)


def _export(store: Store, name: str, version: str, *, deep: bool) -> Iterator[_Check]:
    folder = f"exports/{name}/{version}"
    files: list[Json] = []

    def look() -> None:
        files.extend(read_manifest(store, name, version)["files"])

    yield _Check(manifest_key(name, version), EXPORT, look)
    for file in files:
        yield _exported(store, f"{folder}/{file['path']}", file, deep=deep)


def _exported(store: Store, key: str, file: Json, *, deep: bool) -> _Check:
    def look() -> str | None:
        if store.size(key) != file["bytes"]:
            return "is missing or has another size"
        if deep and hashlib.sha256(store.get_buffer(key, size=file["bytes"])).hexdigest() != file["sha256"]:
            return "does not match its checksum"
        return None

    return _Check(key, EXPORT, look)
