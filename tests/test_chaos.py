"""Crash safety: runs that are killed again and again, anywhere, end with what an undisturbed run would have made.

Every run is the real command in a process of its own, killed with SIGKILL at a step that a seed chooses
(`tests.killed`). The first kills of the chains fall on different folders of the store, and so on different stages:
locally on those with the fewest steps, on S3 on those with the most. A second one hits the run that resumes. Then one
clean run.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rise_ops.export import list_exports
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.conftest import prefect_child_environment
from tests.curation import ROWS, load, write_curation

CHAINS = [
    ("local", 3),
    pytest.param("s3", 2, marks=pytest.mark.s3),
    pytest.param("local", 10, marks=pytest.mark.thorough),
    pytest.param("s3", 10, marks=[pytest.mark.s3, pytest.mark.thorough]),
]
"""Backend, and stores; each sees two kills. Ten stores: the first kill in each of the folders that a run writes to."""
WRITTEN = {"array", "blocks", "corpora", "exports", "indexes", "objects", "runs", "scores", "snapshots", "targets"}
"""Where the stages of a run write."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("prefect_harness")]


def _curate(step: str, *arguments: str) -> tuple[str | None, list[str]]:
    """Run the command; the place at which it was killed, or None and the places of all its steps."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", step, *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | prefect_child_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == -signal.SIGKILL:
        (place,) = re.findall(r"^killed at: (\w+)$", done.stderr, re.MULTILINE)
        return place, []
    assert done.returncode == 0, done.stdout + done.stderr
    (places,) = re.findall(r"^places: (.*)$", done.stderr, re.MULTILINE)
    return None, places.split()


def _exported(store: Store) -> pl.DataFrame:
    """The rows of the latest export, with their values."""
    manifest = list_exports(store)[-1]
    keys = [f"exports/{manifest['name']}/{manifest['version']}/{file['path']}" for file in manifest["files"]]
    return store.scan_parquet(keys).collect()


def _signatures(store: Store) -> dict[str, bytes]:
    keys = [key for key, _ in store.list("indexes") if "/blocks/" in key and "/signature/c/" in key]
    return {key: store.get(key) for key in keys}


@pytest.mark.parametrize(("backend", "chains"), CHAINS)
def test_killed_runs_resume_to_the_same_export(
    backend: str, chains: int, tmp_path: Path, request: pytest.FixtureRequest, record_property: Any
) -> None:
    path = write_curation(tmp_path)
    root = str(tmp_path / "stores")
    sources: tuple[str, ...] = ()
    if backend == "s3":
        from tests.conftest import s3_filesystem

        bucket = request.getfixturevalue("s3_bucket")
        root = f"s3://{bucket}/stores"
        s3_filesystem().put(str(tmp_path / "raw"), f"{bucket}/raw", recursive=True)
        sources = ("--set", f"corpus.sources=['s3://{bucket}/raw/*.jsonl']")

    def arguments(name: str) -> Sequence[str]:
        return ("run", str(path), "--json", "--set", f"store={root}/{name}", *sources)

    _, steps = _curate("0", *arguments("undisturbed"))
    expected = _exported(Store(f"{root}/undisturbed"))
    assert expected.height == int(0.9 * ROWS)
    signatures = _signatures(Store(f"{root}/undisturbed"))
    assert len(signatures) >= 4
    # rare places come first: all stages but the one that writes arrays have few
    places = sorted(set(steps), key=lambda place: (steps.count(place), place))
    assert set(places) >= WRITTEN
    places = places if backend == "local" else places[::-1]

    def chain(number: int) -> list[str]:
        """Places of the kills of one store, and a clean run at the end."""
        generator = random.Random(f"{backend} {number}")
        store = Store(f"{root}/{number}")
        first = places[number % len(places)]
        step = f"{first}:{generator.randint(1, steps.count(first))}"
        kills: list[str] = []
        while len(kills) < 2:
            place, rest = _curate(step, *arguments(str(number)))
            kills += [] if place is None else [place]
            assert verify_store(store)["broken"] == []
            if place is None:  # that run came to its end; the next one has as many steps as a finished one takes
                step = str(generator.randint(1, len(rest) // 2))
            else:
                step = str(generator.randint(1, len(steps) // 2))
        assert kills[0] == first
        assert _curate("0", *arguments(str(number)))[0] is None
        assert _exported(store).equals(expected)
        assert _signatures(store) == signatures
        assert verify_store(store, deep=True)["broken"] == []
        return kills

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kills = [place for chain_kills in pool.map(chain, range(chains)) for place in chain_kills]
    record_property("kills", f"{len(kills)} of {len(steps)} steps: {Counter(kills)}")
    assert len(kills) == 2 * chains
    assert len(set(kills)) >= min(chains, len(places))
    assert len(load(path).targets) == 1
