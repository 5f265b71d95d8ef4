"""Commands that need no model import none of the libraries that take seconds.

What is looked at is `sys.modules` at a command's end, never a clock; `tests/benchmarks/startup.py` has the seconds.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.curate import curate
from rise_ops.config import CurationConfig
from tests.curation import load, write_curation

ROOT = Path(__file__).parents[1]
SLOW = ("prefect", "torch", "transformers")
_PROGRAM = f"""
import sys
from flows.cli import main
try:
    main()
finally:
    print(*sorted(set({SLOW!r}) & set(sys.modules)), file=sys.stderr)
"""


@dataclass(frozen=True)
class Curated:
    """A curation that has run once."""

    path: Path
    config: CurationConfig
    run_id: str

    def filled(self, command: str) -> list[str]:
        """The words of a command, with this curation's names."""
        output = self.path.parent / "page.html"
        names = {"config": self.path, "store": self.config.store, "run": self.run_id, "output": output,
                 "source": f"{self.path.parent}/raw/"}  # fmt: skip
        return [word.format(**names) for word in command.split()]


@pytest.fixture(scope="module")
def curated(prefect_harness: None, tmp_path_factory: pytest.TempPathFactory) -> Curated:
    path = write_curation(tmp_path_factory.mktemp("curated"))
    config = load(path)
    return Curated(path, config, curate(config)["run_id"])


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "config {config}",
        "diff {store} tiny",
        "gc {store} --dry-run",
        "gc {store} --yes",
        "lineage {store} {run}",
        "lineage {store} --source {source}",
        "report {store} {run}",
        "report {store} {run} --output {output}",
        "status {store}",
        "verify {store}",
        "watch {config}",
    ],
)
def test_commands_without_a_model_import_nothing_slow(curated: Curated, command: str) -> None:
    assert slow_imports(curated.filled(command)) == []


def test_a_plan_with_nothing_to_compute_loads_no_model(curated: Curated) -> None:
    assert {"prefect", "transformers"}.isdisjoint(slow_imports(curated.filled("plan {config}")))


def slow_imports(arguments: list[str]) -> list[str]:
    """Which of SLOW a command has imported when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split()
