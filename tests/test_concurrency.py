"""Two runs on one corpus at the same moment: both finish or one is refused, and no version mixes two states.

Two processes start the flow at the same time, again and again, while a third party changes the sources one
object at a time. Every state that the sources ever had is known, so every published version must be one of them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rise_ops.blocks import read_doc_ids
from rise_ops.corpus import current_version, placements, read_snapshot, read_version
from rise_ops.export import list_exports
from rise_ops.hashing import sha256_hex
from rise_ops.runs import read_run
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.conftest import prefect_child_environment
from tests.curation import load, write_curation

State = tuple[tuple[str, str], ...]
"""Uri and SHA-256 of every object."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_harness")]


def _runs(path: str, environment: dict[str, str], rounds: int, barrier: Any, results: Any) -> None:
    """What one of the two processes does."""
    os.environ |= environment
    from flows.curate import curate
    from rise_ops.errors import CurationError

    config = load(Path(path))
    for round_ in range(rounds):
        barrier.wait(240)
        try:
            summary = curate(config)
            results.put((round_, summary["run_id"], None))
        except CurationError as error:
            results.put((round_, None, f"{type(error).__name__}: {error}"))
        barrier.wait(240)


def _state(folder: Path) -> State:
    return tuple(sorted((str(file), sha256_hex(file.read_bytes())) for file in folder.glob("*.jsonl")))


def _change(folder: Path, number: int, generator: random.Random) -> None:
    """One atomic change: an object added, replaced or removed."""
    draft = folder / "draft.tmp"
    rows = [{"text": f"Row {row} of change {number}, said {generator.random()}."} for row in range(5)]
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    extra = sorted(folder.glob("more-*.jsonl"))
    if len(extra) > 3:
        draft.unlink()
        generator.choice(extra).unlink()
    elif extra and generator.random() < 0.5:
        draft.replace(generator.choice(extra))
    else:
        draft.replace(folder / f"more-{number}.jsonl")


@pytest.mark.parametrize("rounds", [8, pytest.param(20, marks=pytest.mark.thorough)])
def test_no_two_runs_make_a_mixed_state(rounds: int, tmp_path: Path, record_property: Any) -> None:
    path = write_curation(tmp_path)
    config = load(path)
    folder = tmp_path / "raw"
    generator = random.Random(0)
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(3), spawn.Queue()
    environment = prefect_child_environment()
    arguments = (str(path), environment, rounds, barrier, results)
    processes = [spawn.Process(target=_runs, args=arguments, daemon=True) for _ in range(2)]
    for process in processes:
        process.start()
    states = [_state(folder)]
    outcomes = []
    for round_ in range(rounds):
        barrier.wait(120)
        for change in range(generator.choice((0, 1, 2))):  # while both are at work
            time.sleep(generator.uniform(0.0, 0.3))
            _change(folder, 10 * round_ + change, generator)
            states.append(_state(folder))
        outcomes += [results.get(timeout=300) for _ in processes]
        _change(folder, 10 * round_ + 9, generator)  # so that the next round has something to do
        states.append(_state(folder))
        barrier.wait(120)
    for process in processes:
        process.join(60)
    record_property("finished", sum(run_id is not None for _, run_id, _ in outcomes))
    record_property("refused", [error for _, _, error in outcomes if error])
    _check(Store(config.store), set(states), outcomes, rounds)


def _check(store: Store, states: set[State], outcomes: list[tuple[int, str | None, str | None]], rounds: int) -> None:
    assert len(outcomes) == 2 * rounds
    refused = [error for _, run_id, error in outcomes if run_id is None]
    reasons = ("meanwhile", "changed while it was read", "removed while", "is not the file that was listed")
    assert all(any(reason in str(error) for reason in reasons) for error in refused), refused
    finished = Counter(round_ for round_, run_id, _ in outcomes if run_id)
    assert set(finished) == set(range(rounds)), refused  # at least one of the two, every time
    latest = current_version(store, "tiny")
    assert latest is not None and latest.version >= rounds // 2
    for number in range(1, latest.version + 1):
        version = read_version(store, "tiny", number)
        assert tuple((entry.uri, entry.object_sha) for entry in version.sources) in states
        rows = read_snapshot(store, version.snapshot_id)["rows"].sum()
        assert rows == version.rows
    for _, run_id, _ in outcomes:
        if run_id is not None:
            _check_run(store, run_id)
    assert verify_store(store, deep=True)["broken"] == []
    assert list(store.list("alive")) == []


def _check_run(store: Store, run_id: str) -> None:
    """A run's decisions cover its own version, and its export is what they keep."""
    record = read_run(store, run_id)
    version = read_version(store, "tiny", record["corpus"]["version"])
    blocks = read_snapshot(store, version.snapshot_id)["block_id"].to_list()
    expected = Counter(doc_id for block in blocks for doc_id in read_doc_ids(store, block).to_list())
    decisions = store.scan_parquet([f"runs/{run_id}/decisions.parquet"]).collect()
    assert Counter(decisions["doc_id"].to_list()) == expected
    places = placements(store, version, blocks).select("source_uri", "source_row").sort("source_uri", "source_row")
    assert decisions.select("source_uri", "source_row").sort("source_uri", "source_row").equals(places)
    (manifest,) = [item for item in list_exports(store) if f"{item['name']}/{item['version']}" == record["export"]]
    keys = [f"exports/{record['export']}/{file['path']}" for file in manifest["files"]]
    exported = store.scan_parquet(keys).select("doc_id", "value").sort("doc_id").collect()
    kept = decisions.filter(pl.col("kept")).select("doc_id", "value").sort("doc_id")
    assert exported["doc_id"].to_list() == kept["doc_id"].to_list()
