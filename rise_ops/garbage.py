"""Garbage collection: what no corpus version, run or export reaches is removed.

Kept are

- corpus versions: all, or with `keep` the latest ones of each corpus; and those of the exports that are kept;
- exports: all finished ones. What an export's manifest does not name, and an export without one, goes;
- runs: the recorded ones whose corpus version is kept, and failed ones that are younger than the oldest kept
  version of their corpus. What a killed run left goes;
- whatever these name: snapshots, object records, packs, blocks, the index blocks of kept blocks, scores,
  quarantine, comparisons, closed loops; indexes that still have a block or a run, and their targets and codes;
  attributions of these versions.

Everything is decided before anything is removed. Records go before what they vouch for, so that whatever moment
the collector is stopped at, no reader takes half of something for the whole. It gives a sign of life
(`rise_ops.alive`) and refuses to work beside a run. Keys that it does not know stay.
"""

from __future__ import annotations

import os
import re
import secrets
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rise_ops.alive import COLLECTOR, alive, described, sign_of, signs
from rise_ops.corpus import CorpusVersion, read_version, version_key, version_numbers
from rise_ops.errors import ConflictError, DamagedError, MissingObjectError
from rise_ops.export import list_exports
from rise_ops.runs import list_runs, read_run
from rise_ops.store import STORE_FOLDERS, Store

Json = dict[str, Any]

_HEX = r"[0-9a-f]{64}"
_KINDS: dict[str, re.Pattern[str]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "versions": r"corpora/(?P<corpus>[^/]+)/versions/(?P<number>\d{12})\.json",
        "runs": r"runs/(?P<id>[^/]+)/.+",
        "exports": r"exports/(?P<name>[^/]+)/(?P<version>[^/]+)/(?P<path>.+)",
        "index records": rf"indexes/(?P<index>{_HEX})/blocks/(?P<id>{_HEX})\.json",
        "targets": rf"targets/(?P<id>{_HEX})\.(json|parquet|zarr/.+)",
        "scores": rf"scores/(?P<set>{_HEX})/(?P<id>{_HEX})\..+",
        "snapshots": rf"snapshots/(?P<id>{_HEX})\.parquet",
        "object records": rf"objects/(?P<id>{_HEX})\.(json|parquet|rows\.parquet)",
        "seen objects": rf"objects/seen/{_HEX}/(?P<id>{_HEX})",
        "quarantine": r"quarantine/(?P<id>[^/]+)/.+",
        "signatures": rf"indexes/(?P<index>{_HEX})/blocks/(?P<id>{_HEX})\.zarr/.+",
        "code records": rf"indexes/(?P<index>{_HEX})/codes/[^/]+/(?P<id>{_HEX})\.json",
        "codes": rf"indexes/(?P<index>{_HEX})/codes/[^/]+/(?P<id>{_HEX})\.bin",
        "indexes": rf"indexes/(?P<index>{_HEX})/(index\.json|tables\.zarr/.+|codes/[^/]+/simhash\.npz)",
        "blocks": rf"blocks/(?P<id>{_HEX})\.parquet",
        "attributions": rf"attributions/(?P<id>{_HEX})\.json",
        "comparisons": rf"comparisons/(?P<id>{_HEX})/[^/]+\.json",
        "loops": rf"loops/(?P<id>{_HEX})/.+",
        "signs of life": r"alive/.+",
        "probes": r"\.probe/.+",
    }.items()
}
"""Kinds of objects, in the order in which they are removed."""
_LITTER = re.compile(r"#\d+$")
_AT_ONCE = 1_000


@dataclass(slots=True)
class Reached:
    """Names of what is kept."""

    versions: set[str] = field(default_factory=set)
    """Keys."""
    snapshots: set[str] = field(default_factory=set)
    blocks: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)
    """Object records and packs."""
    runs: set[str] = field(default_factory=set)
    quarantines: set[str] = field(default_factory=set)
    indexes: set[str] = field(default_factory=set)
    comparisons: set[str] = field(default_factory=set)
    loops: set[str] = field(default_factory=set)
    exports: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """Files of each finished export."""
    needed: dict[str, list[str]] = field(default_factory=dict)
    """Older versions that are only kept for exports, and these."""
    keys: set[str] = field(default_factory=set)
    """Scores that runs name, by their key without endings."""


def collect_garbage(store: Store, *, keep: int | None = None, dry_run: bool = False) -> Json:
    """Remove what nothing reaches.

    Parameters
    ----------
    keep
        Versions kept of each corpus; all where None.
    dry_run
        Only tell.

    Returns
    -------
    dict
        {store, dry_run, kept: {corpus: [versions]}, needed: {version: [exports]},
        removed: {kind: {objects, bytes}}, objects, bytes, keys}

    Raises
    ------
    ConflictError
        A run is alive.
    IntegrityError
        A version, run or export cannot be read, so that it is not known what it reaches.
    """
    name = f"{COLLECTOR}{secrets.token_hex(4)}"
    if dry_run:
        reached = find_reached(store, keep=keep)
        living = {sign.name for sign in signs(store)}
        return _report(store, reached, list(_garbage(store, reached, living)), dry_run=True)
    with alive(store, name):
        others = signs(store, but=name)
        if others:
            raise ConflictError(
                f"{store.uri} is in use by {described(others)}; nothing was removed. Run again when they have ended"
            )
        reached = find_reached(store, keep=keep)
        found = list(_garbage(store, reached, {name}))
        report = _report(store, reached, found, dry_run=False)
        _remove(store, found)
        _tidy(store)
    return report


def _remove(store: Store, found: Sequence[tuple[str, str, int]]) -> None:
    """Delete in order: kind after kind, what vouches for others first; a request deletes in no order of its own."""
    places = {kind: place for place, kind in enumerate(_KINDS)}
    ordered = sorted((places[kind], not _vouches(key), key) for kind, key, _ in found)
    for _, group in groupby(ordered, key=lambda item: item[:2]):
        keys = [key for *_, key in group]
        for start in range(0, len(keys), _AT_ONCE):
            store.delete(keys[start : start + _AT_ONCE])


def _source(store: Store, manifest: Json) -> tuple[str, int]:
    """Corpus and version that an export was made from."""
    lineage = store.get_json(f"exports/{manifest['name']}/{manifest['version']}/lineage.json")
    return str(lineage["corpus"]["name"]), int(lineage["corpus"]["version"])


def find_reached(store: Store, *, keep: int | None) -> Reached:
    """Everything that is kept, by name."""
    reached = Reached()
    exports = list_exports(store)
    exporting = {manifest["run_id"] for manifest in exports}
    for manifest in exports:
        files = {"manifest.json", "lineage.json", "README.md", *(file["path"] for file in manifest["files"])}
        reached.exports[manifest["name"], manifest["version"]] = files
    runs = {run_id: read_run(store, run_id) for run_id in list_runs(store)}
    oldest: dict[str, str] = {}
    published = [(_source(store, manifest), manifest) for manifest in exports]
    reached.runs |= exporting  # also of a run that was killed before its record was written
    for corpus in store.children("corpora"):
        there = version_numbers(store, corpus)
        numbers = set(there if keep is None else there[-keep:])
        for (name, number), manifest in published:
            if name == corpus and number in there and number not in numbers:
                label = f"{manifest['name']}/{manifest['version']}"
                reached.needed.setdefault(f"version {number} of {corpus}", []).append(f"export {label}")
        used = {number for (name, number), _ in published if name == corpus}
        versions = [read_version(store, corpus, number) for number in there if number in numbers | used]
        for version in versions:
            _reach_version(store, reached, version)
        if versions:
            oldest[corpus] = min(version.created for version in versions)
    for run_id, run in runs.items():
        if run_id in exporting or _is_kept(run, reached, oldest):
            _reach_run(reached, run_id, run)
    return reached


def _reach_version(store: Store, reached: Reached, version: CorpusVersion) -> None:
    reached.versions.add(version_key(version.corpus, version.version))
    reached.snapshots.add(version.snapshot_id)
    reached.quarantines.add(version.run_id)
    for entry in version.sources:
        reached.records.add(entry.record)
        reached.blocks.update(entry.blocks)
        if entry.pack is not None:
            reached.records.add(entry.pack)


def _is_kept(run: Json, reached: Reached, oldest: dict[str, str]) -> bool:
    corpus, number = run["corpus"]["name"], run["corpus"].get("version")
    if number is not None:
        return version_key(corpus, int(number)) in reached.versions
    return bool(run["started"] >= oldest.get(corpus, ""))


def _reach_run(reached: Reached, run_id: str, run: Json) -> None:
    reached.runs.add(run_id)
    reached.quarantines.add(run_id)
    if run.get("index_id"):
        reached.indexes.add(run["index_id"])
    if run.get("comparison"):
        reached.comparisons.add(run["comparison"]["id"])
    if run.get("closed_loop"):
        reached.loops.add(run["closed_loop"]["loop_id"])
    for stage in run["stages"]:
        for item in (*stage["inputs"], *stage["outputs"]):
            found = re.search(rf"scores/{_HEX}/{_HEX}(?=\.)", item["uri"])
            if found:
                reached.keys.add(found[0])


def _garbage(store: Store, reached: Reached, living: Collection[str]) -> Iterator[tuple[str, str, int]]:
    """(kind, key, bytes) of everything that nothing reaches."""
    indexed: Counter[str] = Counter()
    idle: list[tuple[str, str, int]] = []
    aside: list[tuple[str, str, str, int]] = []
    for key, size in store.list(""):
        kind, match = _kind(key)
        if match is None:
            continue
        if kind == "indexes":
            idle.append((match["index"], key, size))
        elif kind == "targets":
            aside.append((match["id"], kind, key, size))
        elif kind == "attributions":
            if not _is_answered(store, reached, key):
                yield kind, key, size
        elif not _keeps(reached, kind, match, key, living):
            yield kind, key, size
        elif kind == "index records":
            indexed[match["index"]] += 1
    kept = reached.indexes | {identity for identity, count in indexed.items() if count}
    yield from (("indexes", key, size) for identity, key, size in idle if identity not in kept)
    targets = {name: _index_of(store, name) in kept for name in {item[0] for item in aside}}
    yield from ((kind, key, size) for name, kind, key, size in aside if not targets[name])


def _is_answered(store: Store, reached: Reached, key: str) -> bool:
    """Whether the corpus version that an attribution quotes is kept, or it does not say which."""
    try:
        found = store.get_json(key).get("corpus")
    except (MissingObjectError, DamagedError):
        return False
    return found is None or version_key(found["name"], found["version"]) in reached.versions


def _index_of(store: Store, target: str) -> str | None:
    """The index that a target belongs to; None where its writing did not come to an end."""
    try:
        found: str = store.get_json(f"targets/{target}.json")["index_id"]
    except (MissingObjectError, DamagedError, KeyError):
        return None
    return found


def _kind(key: str) -> tuple[str, re.Match[str] | None]:
    for kind, pattern in _KINDS.items():
        match = pattern.fullmatch(key)
        if match is not None:
            return kind, match
    return "", None


def _keeps(reached: Reached, kind: str, match: re.Match[str], key: str, living: Collection[str]) -> bool:
    names = {
        "runs": reached.runs,
        "snapshots": reached.snapshots,
        "object records": reached.records,
        "seen objects": reached.records,
        "quarantine": reached.quarantines,
        "comparisons": reached.comparisons,
        "loops": reached.loops,
        "index records": reached.blocks,
        "signatures": reached.blocks,
        "code records": reached.blocks,
        "codes": reached.blocks,
        "blocks": reached.blocks,
    }
    if kind in names:
        return match["id"] in names[kind]
    if kind == "versions":
        return key in reached.versions
    if kind == "exports":
        return match["path"] in reached.exports.get((match["name"], match["version"]), ())
    if kind == "scores":
        return key.partition(".")[0] in reached.keys
    return kind == "signs of life" and sign_of(key) in living


def _vouches(key: str) -> bool:
    """Whether an object makes others count."""
    return key.endswith(".json") and (key.endswith("/run.json") or not key.startswith("runs/"))


def _report(store: Store, reached: Reached, found: Sequence[tuple[str, str, int]], *, dry_run: bool) -> Json:
    removed: dict[str, dict[str, int]] = {}
    kept: dict[str, list[int]] = {corpus: [] for corpus in store.children("corpora")}
    for key in sorted(reached.versions):
        _, corpus, _, name = key.split("/")
        kept[corpus].append(int(name.removesuffix(".json")))
    for kind, _, size in found:
        counted = removed.setdefault(kind, {"objects": 0, "bytes": 0})
        counted["objects"] += 1
        counted["bytes"] += size
    return {
        "store": store.uri,
        "dry_run": dry_run,
        "kept": kept,
        "needed": reached.needed,
        "removed": removed,
        "objects": len(found),
        "bytes": sum(size for _, _, size in found),
        "keys": sorted(key for _, key, _ in found),
    }


def _tidy(store: Store) -> None:
    """On a local disk: folders that are empty now, and what killed writers left beside their objects."""
    if not store.is_local:
        return
    for top in (*STORE_FOLDERS, ".probe"):
        for folder, _, files in os.walk(store.url(top), topdown=False):
            for name in files:
                if _LITTER.search(name):
                    Path(folder, name).unlink(missing_ok=True)
            if not os.listdir(folder):
                os.rmdir(folder)
