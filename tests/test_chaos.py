"""Crash safety: runs that are killed again and again, anywhere, end with what an undisturbed run would have made.

Every run is the real command in a process of its own, killed with SIGKILL at a step that a seed chooses
(`tests.killed`). The first kills of the chains are spread evenly over all steps of a run, and so over all its
stages; a second one hits the run that resumes. Then one clean run.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rise_ops.export import list_exports
from rise_ops.store import STORE_FOLDERS, Store
from rise_ops.verify import verify_store
from tests.conftest import prefect_child_environment
from tests.curation import ROWS, load, write_curation

CHAINS = 8
"""Stores a backend; each sees two kills: 32 in all."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("prefect_harness")]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    killed: bool
    steps: int
    place: str
    """Folder of the key at which it was killed; that of an array's own keys is "array"."""


def _curate(step: int, *arguments: str) -> Ended:
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed", str(step), *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | prefect_child_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    killed = done.returncode == -signal.SIGKILL
    assert killed or done.returncode == 0, done.stdout + done.stderr
    steps = re.search(r"^steps: (\d+)$", done.stderr, re.MULTILINE)
    key = re.search(r"^killed at: \W*(\w+)", done.stderr, re.MULTILINE)
    place = key[1] if key and key[1] in STORE_FOLDERS else "array"
    return Ended(killed, int(steps[1]) if steps else 0, place)


def _exported(store: Store) -> pl.DataFrame:
    """The rows of the latest export, with their values."""
    manifest = list_exports(store)[-1]
    keys = [f"exports/{manifest['name']}/{manifest['version']}/{file['path']}" for file in manifest["files"]]
    return store.scan_parquet(keys).collect()


def _signatures(store: Store) -> dict[str, bytes]:
    keys = [key for key, _ in store.list("indexes") if "/blocks/" in key and "/signature/c/" in key]
    return {key: store.get(key) for key in keys}


@pytest.mark.parametrize("backend", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_killed_runs_resume_to_the_same_export(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest, record_property: Any
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

    undisturbed = _curate(0, *arguments("undisturbed"))
    expected = _exported(Store(f"{root}/undisturbed"))
    assert expected.height == int(0.9 * ROWS)
    signatures = _signatures(Store(f"{root}/undisturbed"))
    assert len(signatures) >= 4

    places: list[str] = []

    def chain(number: int) -> list[int]:
        """Kills of one store, and a clean run at the end."""
        generator = random.Random(f"{backend} {number}")
        store = Store(f"{root}/{number}")
        span = undisturbed.steps / CHAINS
        kills: list[int] = []
        step = int(number * span + generator.uniform(1, span))
        while len(kills) < 2:
            ended = _curate(step, *arguments(str(number)))
            if ended.killed:
                kills.append(step)
                places.append(ended.place)
                step = generator.randrange(1, max(2, undisturbed.steps - step))
            else:  # so much was done already that the run ended before: earlier, then
                step = max(1, step // 2)
            assert verify_store(store)["broken"] == []
        assert not _curate(0, *arguments(str(number))).killed
        assert _exported(store).equals(expected)
        assert _signatures(store) == signatures
        assert verify_store(store, deep=True)["broken"] == []
        return kills

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kills = [step for chain_kills in pool.map(chain, range(CHAINS)) for step in chain_kills]
    record_property("kills", f"{len(kills)} of {undisturbed.steps} steps: {sorted(kills)}")
    record_property("places", str(Counter(places)))
    assert len(kills) == 2 * CHAINS
    assert {"array", "runs"} < set(places) and len(set(places)) >= 5, places
    assert len(load(path).targets) == 1
