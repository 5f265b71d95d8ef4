"""Where a source object went: which corpus versions, runs and exports hold its rows.

For a person or a publisher who wants their data taken out. The answer is made from what the store holds: corpus
versions name their objects; decisions name the source of every row; exports carry it with every row. A row's text may
stand in several objects, and an export names one place a row. So rows of an export that come from elsewhere, but
whose text and prompt (`doc_id`) the object had in a known version too, are counted beside its own.

Tables are read a slice at a time, and doc_ids in parts, so memory does not grow with the corpus.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from rise_ops.blocks import read_doc_ids
from rise_ops.config import resolve_path
from rise_ops.corpus import SourceEntry, read_version, version_key, version_numbers
from rise_ops.errors import ConfigError, IntegrityError, MissingObjectError
from rise_ops.export import manifest_key, read_manifest
from rise_ops.folders import MAGIC
from rise_ops.objects import read_rows_doc_ids
from rise_ops.quarantine import quarantine_key
from rise_ops.runs import decisions_key, read_run
from rise_ops.shapes import AttributionShape
from rise_ops.store import Store
from rise_ops.tables import iter_table

Json = dict[str, Any]

LISTED = 10_000
"""Rows of an export, and objects of a corpus, that the answer lists; it counts all."""

_SLICE_ROWS = 65_536
_PART_ROWS = 500_000
"""doc_ids of the object that are held at a time."""
_UNSEARCHED = (
    "rows that a run read and then failed before it published are not searched in blocks/ and objects/; "
    "`curate gc` removes them"
)
_COLUMNS = ("doc_id", "source_uri", "source_row")


@dataclass(slots=True)
class _Search:
    """What is looked for, and what could not be read on the way."""

    store: Store
    pattern: str
    unreadable: dict[str, str] = field(default_factory=dict)
    entries: dict[str, SourceEntry] = field(default_factory=dict)
    """One entry of each state that an object had, by its record."""
    free: set[tuple[str, int]] = field(default_factory=set)
    """Corpus versions without such an object."""

    def matches(self, uri: str) -> bool:
        if uri == self.pattern or (self.pattern.endswith("/") and uri.startswith(self.pattern)):
            return True
        return any(sign in self.pattern for sign in MAGIC) and fnmatch.fnmatchcase(uri, self.pattern)

    def found(self, frame: pl.DataFrame) -> pl.Series:
        """Which rows of a table with `source_uri` come from there."""
        uris = [uri for uri in frame["source_uri"].unique() if self.matches(uri)]
        return frame["source_uri"].is_in(uris)

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Note what cannot be read, and go on: the rest of the answer still counts."""
        try:
            yield
        except (IntegrityError, MissingObjectError) as error:
            self.unreadable[key] = str(error)


def trace_source(store: Store, uri: str) -> Json:
    """Everything that the store knows of a source object.

    Parameters
    ----------
    uri
        As a run lists it: an absolute path or URL; a path may be relative. One that ends in `/` stands for all that
        is below; `*`, `?` and `[…]` match as in a shell, also across `/`.

    Returns
    -------
    dict
        {kind, store, source, corpora, runs, quarantines, exports, attributions, unreadable, next}

    Raises
    ------
    ConfigError
        Nothing in the store comes from there.
    """
    search = _Search(store, _absolute(uri))
    corpora = [each for name in store.children("corpora") if (each := _corpus(search, name))["objects"]]
    runs = [run for run_id in reversed(store.children("runs")) if (run := _run(search, run_id)) is not None]
    quarantines = [each for run_id in store.children("quarantine") if (each := _quarantine(search, run_id))["rows"]]
    exports = [made for manifest in _manifests(search) if (made := _export(search, manifest)) is not None]
    attributions = [name for name in store.children("attributions") if _is_cited(search, f"attributions/{name}")]
    if not (corpora or runs or quarantines or exports or attributions or search.unreadable):
        raise ConfigError(f"nothing in {store.uri} comes from {search.pattern}{_nearest(search)} ({_UNSEARCHED})")
    found = {
        "kind": "source",
        "store": store.uri,
        "source": search.pattern,
        "corpora": corpora,
        "runs": runs,
        "quarantines": quarantines,
        "exports": exports,
        "attributions": attributions,
        "unreadable": [{"key": key, "problem": problem} for key, problem in search.unreadable.items()],
    }
    return found | {"next": _next(found)}


def _absolute(uri: str) -> str:
    if uri.startswith("s3a://"):
        return f"s3{uri[3:]}"
    path = uri.removeprefix("file://")
    return resolve_path(path, Path.cwd()) + ("/" if path.endswith("/") and "://" not in path else "")


def _corpus(search: _Search, name: str) -> Json:
    """Its objects that match, with the versions that had them."""
    objects: dict[str, Json] = {}
    numbers = version_numbers(search.store, name)
    for number in numbers:
        with search.reading(version_key(name, number)):
            version = read_version(search.store, name, number)
            mine = [entry for entry in version.sources if search.matches(entry.uri)]
            if not mine:
                search.free.add((name, number))
            for entry in mine:
                search.entries[entry.record] = entry
                known = objects.setdefault(entry.uri, {"uri": entry.uri, "versions": []})
                known["versions"].append(number)
                known |= {"object_sha": entry.object_sha, "rows": entry.rows, "rejected": entry.rejected}
    for known in objects.values():
        known["current"] = known["versions"][-1] == numbers[-1]
    return {
        "corpus": name,
        "current_version": numbers[-1] if numbers else None,
        "count": len(objects),
        "current": sum(known["current"] for known in objects.values()),
        "objects": [objects[uri] for uri in sorted(objects)[:LISTED]],
    }


def _run(search: _Search, run_id: str) -> Json | None:
    """What a run decided on rows from there; None where it had none."""
    record: Mapping[str, Any] = {}
    with search.reading(f"runs/{run_id}/run.json"):
        if search.store.exists(f"runs/{run_id}/run.json"):
            record = read_run(search.store, run_id)
    corpus = record.get("corpus", {})
    key = decisions_key(run_id)
    if (corpus.get("name"), corpus.get("version")) in search.free or not search.store.exists(key):
        return None
    rows = kept = 0
    with search.reading(key):
        for frame in iter_table(search.store, key, columns=["source_uri", "kept"], rows=_SLICE_ROWS):
            mine = frame.filter(search.found(frame))
            rows += mine.height
            kept += int(mine["kept"].sum())
    if not rows:
        return None
    return {"run_id": run_id, "recorded": bool(record), "corpus": corpus.get("name"),
            "version": corpus.get("version"), "rows": rows, "kept": kept, "export": record.get("export")}  # fmt: skip


def _quarantine(search: _Search, run_id: str) -> Json:
    """Rejected rows from there, which a run keeps as they were read, also one that failed then."""
    key, rows = quarantine_key(run_id), 0
    if search.store.exists(key):
        with search.reading(key):
            for frame in iter_table(search.store, key, columns=["source_uri"], rows=_SLICE_ROWS):
                rows += int(search.found(frame).sum())
    return {"run_id": run_id, "rows": rows, "key": key}


def _manifests(search: _Search) -> Iterator[Json]:
    """Of all exports; those that cannot be read, and folders without one, are noted."""
    for name in search.store.children("exports"):
        for version in search.store.children(f"exports/{name}"):
            key = manifest_key(name, version)
            if not search.store.exists(key):
                search.unreadable[f"exports/{name}/{version}"] = "it has no manifest.json: its rows were not searched"
                continue
            manifest = None
            with search.reading(key):
                manifest = read_manifest(search.store, name, version)
            if manifest is not None:
                yield manifest


def _export(search: _Search, manifest: Json) -> Json | None:
    """Rows of an export that come from there, or whose content stood there too; None where it has none."""
    label = f"{manifest['name']}/{manifest['version']}"
    counted, read_from = _nothing(), "data"
    try:
        _count(search, _Exported(search.store, manifest), counted)
    except (IntegrityError, MissingObjectError) as error:  # then the decisions tell what is in it
        search.unreadable[f"exports/{label}"] = str(error)
        counted, read_from = _nothing(), "decisions"
        with search.reading(decisions_key(manifest["run_id"])):
            _count(search, _Kept(search.store, manifest["run_id"]), counted)
    if not (counted["rows"] or counted["rows_elsewhere"]):
        return None
    return {"export": label, "run_id": manifest["run_id"], "rows_in_all": manifest["rows"], "read_from": read_from,
            "folder": search.store.url(f"exports/{label}"), **counted}  # fmt: skip


def _nothing() -> Json:
    """What `_count` adds to."""
    return {"rows": 0, "rows_elsewhere": 0, "places": [], "elsewhere": []}


def _count(search: _Search, frames: Iterable[pl.DataFrame], counted: Json) -> None:
    """Add the rows of an export's frames, which can be gone through once for each part of the doc_ids."""
    total = sum(entry.rows for entry in search.entries.values())
    parts = 1 + total // _PART_ROWS
    for part in range(parts):
        wanted = _doc_ids(search, part, parts)
        for frame in frames:
            own = search.found(frame)
            if part == 0:
                _add(counted, "rows", "places", frame.filter(own))
            _add(counted, "rows_elsewhere", "elsewhere", frame.filter(~own).join(wanted, on="doc_id", how="semi"))


def _add(counted: Json, count: str, listed: str, rows: pl.DataFrame) -> None:
    counted[count] += rows.height
    counted[listed] += rows.head(LISTED - len(counted[listed])).to_dicts()


def _doc_ids(search: _Search, part: int, parts: int) -> pl.DataFrame:
    """Those of one part of all rows that the object ever had, as far as versions tell, once each."""
    found = pl.DataFrame(schema={"doc_id": pl.String})
    number = pl.col("doc_id").str.head(16).str.to_integer(base=16, dtype=pl.UInt64)
    for entry in search.entries.values():
        is_packed = entry.pack is not None
        kind, read = ("object", read_rows_doc_ids) if is_packed else ("block", read_doc_ids)
        for name in [entry.record] if is_packed else entry.blocks:
            with search.reading(f"{kind} {name}"):
                column = read(search.store, name).to_frame("doc_id")
                found = pl.concat([found, column.filter(number % parts == part)])
        found = found.unique()
    return found


@dataclass(frozen=True, slots=True)
class _Exported:
    """The rows of an export, from its own data; can be gone through again."""

    store: Store
    manifest: Json

    def __iter__(self) -> Iterator[pl.DataFrame]:
        folder = f"exports/{self.manifest['name']}/{self.manifest['version']}"
        for file in self.manifest["files"]:
            key = f"{folder}/{file['path']}"
            if key.endswith(".parquet"):
                yield from iter_table(self.store, key, columns=_COLUMNS, rows=_SLICE_ROWS)
            else:
                yield from _lines(self.store, key)


@dataclass(frozen=True, slots=True)
class _Kept:
    """The rows that a run kept, from its decisions; can be gone through again."""

    store: Store
    run_id: str

    def __iter__(self) -> Iterator[pl.DataFrame]:
        columns = [*_COLUMNS, "kept"]
        for frame in iter_table(self.store, decisions_key(self.run_id), columns=columns, rows=_SLICE_ROWS):
            yield frame.filter("kept").select(_COLUMNS)


def _lines(store: Store, key: str) -> Iterator[pl.DataFrame]:
    import zstandard

    schema = {"doc_id": pl.String, "source_uri": pl.String, "source_row": pl.Int64}
    with zstandard.open(io.BytesIO(store.get_buffer(key)), "rb") as packed, io.BufferedReader(packed) as lines:
        try:
            while some := [json.loads(line) for line in islice(lines, _SLICE_ROWS // 8)]:
                yield pl.DataFrame({name: [row[name] for row in some] for name in _COLUMNS}, schema=schema)
        except (zstandard.ZstdError, ValueError, KeyError) as error:
            raise IntegrityError(f"{store.url(key)} is damaged ({type(error).__name__})") from error


def _is_cited(search: _Search, key: str) -> bool:
    """Whether a stored attribution shows rows from there."""
    answers: list[Json] = []
    with search.reading(key):
        answers = search.store.get_json(key, shape=AttributionShape)["queries"]
    hits = (hit for answer in answers for side in ("hits", "bottom") for hit in answer.get(side, []))
    return any(search.matches(hit["source_uri"]) for hit in hits)


def _nearest(search: _Search) -> str:
    known: list[str] = []
    for name in search.store.children("corpora"):
        numbers = version_numbers(search.store, name)
        with search.reading(name):
            known += [entry.uri for entry in read_version(search.store, name, numbers[-1]).sources[:LISTED]]
    close = difflib.get_close_matches(search.pattern, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else "; `curate status` tells what the store holds"


def _next(found: Json) -> list[str]:
    """What to do so that nothing of it is left."""
    steps = []
    names = ", ".join(item["corpus"] for item in found["corpora"] if item["current"])
    if names:
        steps.append(
            f"take it out of corpus.sources of {names}, or delete it there, then `curate run`: it publishes a version "
            "and an export without it"
        )
    holding = [item for item in found["exports"] if item["rows"]]
    steps += [f"remove the folder {item['folder']}, and tell those who use its rows" for item in holding]
    elsewhere = [item for item in found["exports"] if item["rows_elsewhere"]]
    if elsewhere:
        labels = ", ".join(item["export"] for item in elsewhere)
        steps.append(f"decide on the rows of {labels} that other sources have too: they stay as long as those do")
    if found["attributions"]:
        steps.append(f"remove {', '.join(found['attributions'])} from {found['store']}: they quote its rows")
    if found["quarantines"]:
        runs = ", ".join(item["run_id"] for item in found["quarantines"])
        steps.append(f"see that the folders of {runs} in {found['store']}/quarantine are gone after `curate gc`, or "
                     "remove them: they hold rejected rows as they were read")  # fmt: skip
    steps.append(
        "delete Prefect artifacts with its text on the Prefect server (tables `attribution` quote hits): `curate gc` "
        "does not reach them"
    )
    steps.append(
        f"at last `curate gc {found['store']} --keep 1`: it removes the older versions, and blocks, signatures, "
        f"scores, decisions, reports and rejected rows that only they need; {_UNSEARCHED}"
    )
    if found["unreadable"]:
        steps.append("look at what could not be read: this answer says nothing of it")
    return steps
