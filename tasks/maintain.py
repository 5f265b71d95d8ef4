"""Maintaining a store: checking it, and removing what nothing reaches."""

from __future__ import annotations

from prefect.artifacts import create_table_artifact

from rise_ops.errors import ConflictError
from rise_ops.garbage import collect_garbage
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tasks.policy import S3, Json, stage

_SHOWN = 100


@stage("verify", tags=[S3])
def verify_contents(store_uri: str, deep: bool) -> Json:
    """Check the store; what is broken is an artifact, and noted so that the next run makes it again."""
    store = Store(store_uri)
    store.require()
    found = verify_store(store, deep=deep)
    broken = found["broken"]
    if broken:
        description = f"{len(broken):,} of {found['checked']:,} blocks and files in {store.uri} are broken"
        create_table_artifact(broken[:_SHOWN], key="store-faults", description=description)
    return {**found, "broken": broken[:_SHOWN], "faults": len(broken)}


@stage("collect")
def collect(store_uri: str, keep: int | None) -> Json:
    """Remove what nothing reaches; beside a run at work nothing is removed, which is told and is no error."""
    store = Store(store_uri)
    try:
        found = collect_garbage(store, keep=keep)
    except ConflictError as error:
        return {"objects": 0, "bytes": 0, "refused": str(error)}
    table = [{"kind": kind, **counted} for kind, counted in found["removed"].items()]
    if table:
        create_table_artifact(table, key="store-garbage", description=f"Removed from {store.uri}")
    return {"objects": found["objects"], "bytes": found["bytes"], "kept": found["kept"], "refused": None}
