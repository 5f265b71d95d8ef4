"""Lineage: from a run, an export or an exported row back to what made it.

A row is found by its doc_id in the decisions of the runs; its place there names the source object and the
row in it, and the corpus version names the object's bytes. If the object is still the same, its line is
read again and shown. Model, configuration and code are those of the latest run that exported the row, or, where none
did, that decided on it.
"""

from __future__ import annotations

from typing import Any

import polars as pl
from pydantic import ValidationError

from rise_ops.config import CurationConfig
from rise_ops.corpus import read_source_row, read_version
from rise_ops.errors import ConfigError, IntegrityError, SourceError
from rise_ops.export import list_exports
from rise_ops.runs import decisions_key, lineage_key, list_runs, read_run
from rise_ops.store import Store

Json = dict[str, Any]

_MIN_DOC_ID = 8


def trace(store: Store, target: str) -> Json:
    """Lineage of a run id, an export (`name` or `name/version`) or a doc_id (8 or more hexadecimal digits).

    Raises
    ------
    ConfigError
        The store knows nothing by that name.
    """
    if target in store.children("runs"):
        return {"kind": "run", **_run(store, target)}
    name, _, version = target.partition("/")
    if name in store.children("exports"):
        return _trace_export(store, name, version)
    if len(target) >= _MIN_DOC_ID and set(target) <= set("0123456789abcdef"):
        return _trace_row(store, target)
    raise ConfigError(
        f"{store.uri} has no run or export {target}, and it is not a doc_id (hexadecimal, {_MIN_DOC_ID} digits or more)"
    )


def _trace_export(store: Store, name: str, version: str) -> Json:
    manifests = list_exports(store, name)
    chosen = [manifest for manifest in manifests if not version or manifest["version"] == version]
    if not chosen:
        known = ", ".join(manifest["version"] for manifest in manifests) or "none finished"
        raise ConfigError(f"{store.uri} has no export {name}/{version}; versions: {known}")
    manifest = chosen[-1]
    made_by = store.get_json(f"exports/{name}/{manifest['version']}/lineage.json")
    recorded = manifest["run_id"] in list_runs(store)
    return {
        "kind": "export",
        **manifest,
        "lineage": made_by,
        "run": _run(store, manifest["run_id"]) if recorded else None,
    }


def _run(store: Store, run_id: str) -> Json:
    """A run's record, what matters of its configuration, and where its events are."""
    record, key = read_run(store, run_id), lineage_key(run_id)
    return record | {"made_with": _made_with(record), "events": store.url(key) if store.exists(key) else None}


def _made_with(record: Json) -> Json | None:
    """What of a recorded configuration decides on a row; None where this program does not know its keys."""
    try:
        config = CurationConfig.model_validate(record.get("config"))
    except ValidationError:
        return None
    return {
        "revision": config.model.revision,
        "temperature": config.sketch.temperature,
        "targets": {
            name: {"queries": target.queries, "weight": config.weights.get(name, 0.0)}
            for name, target in config.targets.items()
        },
        "aggregate": config.aggregate,
        "keep": config.selection.keep.model_dump(exclude_none=True),
        "selection": config.selection.model_dump(mode="json", exclude_none=True),
    }


def _trace_row(store: Store, prefix: str) -> Json:
    occurrences = []
    for run_id in reversed(list_runs(store)):
        if not store.exists(decisions_key(run_id)):
            continue
        found = _decided(store, run_id, prefix)
        occurrences += [{"run_id": run_id, **row} for row in found.iter_rows(named=True)]
    if not occurrences:
        raise ConfigError(f"no run in {store.uri} decided on a row {prefix}")
    names = sorted({row["doc_id"] for row in occurrences})
    if len(names) > 1:
        raise ConfigError(f"{prefix} is the beginning of {len(names)} rows: {', '.join(names[:5])}; give more digits")
    published = {manifest["run_id"]: f"{manifest['name']}/{manifest['version']}" for manifest in list_exports(store)}
    exports = {run_id: read_run(store, run_id)["export"] for run_id in {row["run_id"] for row in occurrences}}
    for row in occurrences:
        row["export"] = exports[row["run_id"]] if row["kept"] else None
    exporting = [row["run_id"] for row in occurrences if row["export"] in published.values()]
    maker = read_run(store, next(iter(exporting), occurrences[0]["run_id"]))
    return {
        "kind": "row",
        "doc_id": names[0],
        "decisions": occurrences,
        "exports": sorted({row["export"] for row in occurrences if row["export"] in published.values()}),
        "run_id": maker["run_id"],
        "sources": _sources(store, maker, [row for row in occurrences if row["run_id"] == maker["run_id"]]),
        "model": maker["model"],
        "index_id": maker["index_id"],
        "corpus": maker["corpus"],
        "code": maker["code"],
        "config_fingerprint": maker["config_fingerprint"],
        "config": maker.get("config"),
        "made_with": _made_with(maker),
        "record": store.url(f"runs/{maker['run_id']}/run.json"),
    }


def _decided(store: Store, run_id: str, prefix: str) -> pl.DataFrame:
    """A run's decisions on rows whose doc_id begins so."""
    key = decisions_key(run_id)
    rows = store.scan_parquet([key]).filter(pl.col("doc_id").str.starts_with(prefix))
    return store.collected(key, lambda: rows.collect(engine="streaming"))


def _sources(store: Store, run: Json, rows: list[Json]) -> list[Json]:
    number = run["corpus"].get("version")
    if number is None:
        raise IntegrityError(f"the record of run {run['run_id']} does not say which corpus version it read")
    version = read_version(store, run["corpus"]["name"], number)
    entries = {entry.uri: entry for entry in version.sources}
    found = []
    for row in rows:
        entry = entries.get(row["source_uri"])
        if entry is None:
            raise IntegrityError(f"run {run['run_id']} decided on a row of {row['source_uri']}, which its corpus lacks")
        item: Json = {"uri": entry.uri, "row": row["source_row"], "object_sha": entry.object_sha}
        try:
            item["line"] = read_source_row(entry, row["source_row"])
        except SourceError as error:
            item["unavailable"] = str(error)
        found.append(item)
    return found
