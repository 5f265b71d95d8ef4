"""What the demonstration shows: how many planted rows the selection left out."""

from __future__ import annotations

import polars as pl

from rise_ops.export import list_exports
from rise_ops.store import Store


def count_planted(store: Store, export: str, *, planted: int) -> dict[str, int]:
    """Planted rows in all, and how many of them the export does not have."""
    name, version = export.split("/")
    manifest = next(item for item in list_exports(store, name) if item["version"] == version)
    files = [f"exports/{export}/{file['path']}" for file in manifest["files"]]
    kept = store.scan_parquet(files).filter(pl.col("label") == "backdoor").select(pl.len()).collect().item()
    return {"planted": planted, "planted_dropped": planted - int(kept)}
