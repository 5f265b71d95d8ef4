"""Prefect assets: what runs publish, as the server on loopback has it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.types.names import validate_valid_asset_key

from flows.curate import curate
from rise_ops.store import Store
from tasks.assets import asset_of
from tests.curation import load, write_curation

Json = dict[str, Any]

_MATERIALISED = "prefect.asset.materialization.succeeded"


@pytest.mark.parametrize(
    ("store", "folder", "key"),
    [
        ("s3://bucket/prefix", "corpora/tiny", "s3://bucket/prefix/corpora/tiny"),
        ("/mnt/store", "exports/tiny", "file:///mnt/store/exports/tiny"),
        ("/mnt/my [store] #1?", "exports/a%b", "file:///mnt/my__store___1_/exports/a_b"),
    ],
)
def test_keys_are_valid(store: str, folder: str, key: str) -> None:
    asset = asset_of(Store(store), folder, name="x")
    assert asset is not None
    assert asset.key == validate_valid_asset_key(key) == key


def test_a_path_that_is_too_long_names_none() -> None:
    assert asset_of(Store(f"/{'a' * 600}"), "exports/tiny") is None


def stored(prefix: str) -> list[Json]:
    """Asset events about a store, oldest first, once the server has all that were sent before now."""
    emit_event(event="prefect.asset.last", resource={"prefect.resource.id": f"{prefix}/last"})
    within = {"resource": {"id_prefix": [prefix]}, "event": {"prefix": ["prefect.asset."]}}
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            answer = client._client.post("/events/filter", json={"filter": within, "limit": 50})
            answer.raise_for_status()
            events: list[Json] = sorted(answer.json()["events"], key=lambda event: str(event["occurred"]))
            if events and events[-1]["event"] == "prefect.asset.last":
                return events[:-1]
            assert time.monotonic() < deadline, "the server did not store the events"
            time.sleep(0.2)


@pytest.mark.usefixtures("prefect_harness")
def test_what_is_published_is_told_once(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path))
    first = curate(config)
    curate(config)  # publishes nothing
    events = stored(f"file://{config.store}")
    told = [(event["event"], event["resource"]["prefect.resource.id"]) for event in events]
    corpus, export = f"file://{config.store}/corpora/tiny", f"file://{config.store}/exports/tiny"
    assert told == [(_MATERIALISED, corpus), ("prefect.asset.referenced", corpus), (_MATERIALISED, export)]
    published, _, exported = events
    assert published["payload"] == {"version": 1, "snapshot_id": first["snapshot_id"], "rows": first["rows"]}
    assert published["resource"]["prefect.resource.name"] == "corpus tiny"
    assert exported["payload"]["rows"] == first["rows_kept"]
    assert exported["payload"]["version"] == "0001"
    assert exported["payload"]["run_id"] == first["run_id"]
    related = {item["prefect.resource.role"]: item["prefect.resource.id"] for item in exported["related"]}
    assert related["asset"] == corpus
    assert {"flow-run", "task-run"} <= related.keys()
    assert "AWS" not in json.dumps(events)
