"""The flow `watch_corpus`: one look at the sources; where they differ from what is published, it says so.

Its event starts the deployment that indexes the corpus (`deployments/prefect.yaml`).
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from rise_ops.config import CurationConfig
from tasks.watch import announce_change, look_at_corpus


@flow(name="watch_corpus", flow_run_name=lambda: run_name("watch"), **FLOW_OPTIONS)
def watch_corpus(config: CurationConfig) -> dict[str, Any]:
    """Compare a listing of the sources with the published version, and announce a difference.

    Reads no source object and writes nothing to the store.

    Returns
    -------
    dict
        {corpus, store, version, is_changed, unchanged, counts, added, changed, removed, left_out, announced, waiting}
    """
    found: dict[str, Any] = look_at_corpus(store_uri=config.store, config=config)
    told = {"announced": False, "waiting": None}
    if found["is_changed"]:
        told = announce_change(store_uri=config.store, config=config, found=found)
    return {**found, **told}
