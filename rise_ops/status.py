"""What a store holds, at a glance: corpora, indexes, exports and the latest runs."""

from __future__ import annotations

from typing import Any

from rise_ops.corpus import current_version
from rise_ops.export import list_exports
from rise_ops.index import describe_index, list_indexes
from rise_ops.runs import list_runs, read_run
from rise_ops.store import Store

RUNS = 10
"""Runs shown, latest first."""

Json = dict[str, Any]


def store_status(store: Store) -> Json:
    """Corpora, indexes, exports and runs of a store; empty lists where there are none."""
    return {
        "store": store.uri,
        "corpora": [_corpus(store, name) for name in store.children("corpora")],
        "indexes": [_index(store, name) for name in list_indexes(store)],
        "exports": [
            {"name": item["name"], "version": item["version"], "rows": item["rows"], "run_id": item["run_id"]}
            for item in list_exports(store)
        ],
        "runs": [_run(read_run(store, run_id)) for run_id in reversed(list_runs(store)[-RUNS:])],
    }


def _corpus(store: Store, name: str) -> Json:
    version = current_version(store, name)
    if version is None:
        return {"name": name, "version": None}
    return {
        "name": name,
        "version": version.version,
        "snapshot_id": version.snapshot_id,
        "objects": len(version.sources),
        "rows": version.rows,
        "rejected": version.rejected,
    }


def _index(store: Store, identity: str) -> Json:
    described = describe_index(store, identity)
    sizes = dict(store.list(f"indexes/{identity}/blocks"))
    return {
        "index_id": identity,
        "model": described["model"]["name"],
        "model_fingerprint": described["model"]["fingerprint"],
        "dim": described["dim"],
        "temperature": described["sketch"]["temperature"],
        "blocks": sum(key.count("/") == 3 and key.endswith(".json") for key in sizes),
        "bytes": sum(sizes.values()),
        "codes": store.children(f"indexes/{identity}/codes"),
    }


def _run(record: Json) -> Json:
    names = ("run_id", "name", "status", "error", "started", "seconds", "export")
    return {**{name: record.get(name) for name in names}, "rows_kept": record["counts"].get("rows_kept")}
