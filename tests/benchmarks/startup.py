"""How long commands take that have nothing to compute, and how long until a run has its first indexed block.

    python -m tests.benchmarks.startup [--repeat 5] [--runs 1] [--folder FOLDER]

First the demonstration is curated in new folders, `--runs` times, by the command `curate run`. From its start are
counted: until the flow begins (imports and a temporary Prefect server), until the stage `index` begins, until the
completion record of the first block is in the store (by the time of the file), until the command ends. Then commands
without a model on the store of the last run, in turn with `python -c pass`: medians of whole processes, the part of it
that is import time (`python -X importtime`, itself slower than without), and the packages that take most of that.

Measured on 2 cores that nothing else used: `--help` 0.27 s, `status` 0.94, `lineage` 0.97, `verify` 1.03, `gc` 1.00,
`report` 1.28, `diff` 0.84, `watch` 0.72; `plan` 3.5 (it imports PyTorch), `models` 7.1 (transformers as well). The flow
of the demo begins after 10.6 s (7.4 where Prefect's database is there already), the stage `index` after 11.2, and the
first block is indexed after 19.4, when PyTorch's and the model's code is loaded and the estimator compiled; all of it
ends after 30.1.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from rise_ops.demo import write_demo
from rise_ops.runs import list_runs, read_run
from rise_ops.store import Store

CURATE = ["-c", "from flows.cli import main; main()"]
COMMANDS = (
    "--help",
    "config {config}",
    "status {store}",
    "lineage {store} {run}",
    "verify {store}",
    "gc {store} --dry-run",
    "report {store} {run} --output {page}",
    "diff {store} demo",
    "watch {config}",
    "plan {config}",
    "models pythia-14m",
)
_IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)$")
_NAMED = 4


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the store; default: the system's temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "PREFECT_HOME": str(folder / "prefect")}
        runs = [_curated(folder / f"demo-{number}") for number in range(options.runs)]
        sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}; seconds, "
                         f"median of {options.repeat}\n\n")  # fmt: skip
        _print([{"curate run, the demo, from its start until": step,
                 "s": f"{statistics.median(run[step] for run in runs):.2f}"}
                for step in runs[0]])  # fmt: skip
        _print(_commands(folder / f"demo-{options.runs - 1}", options.repeat))


def _curated(folder: Path) -> dict[str, float]:
    """Seconds from the start of the command to each step."""
    config = write_demo(folder).folder / "curate.yaml"
    started = time.time()
    _python(*CURATE, "run", str(config), "--json")
    ended = time.time()
    store = _store(folder)
    record = read_run(store, list_runs(store)[-1])
    index = next(stage for stage in record["stages"] if stage["name"] == "index")
    blocks = [when.timestamp() for key, _, when in store.list_times("indexes") if re.search(r"/blocks/\w+\.json$", key)]
    return {
        "the flow begins": _timestamp(record["started"]) - started,
        "the stage index begins": _timestamp(index["started"]) - started,
        "the first block is indexed": min(blocks) - started,
        "it ends": ended - started,
    }


def _commands(folder: Path, repeat: int) -> list[dict[str, Any]]:
    store = _store(folder)
    names = {"config": folder / "curate.yaml", "store": store.uri, "run": list_runs(store)[-1],
             "page": folder / "page.html"}  # fmt: skip
    words = {command: command.format(**names).split() for command in COMMANDS}
    seconds: dict[str, list[float]] = {command: [] for command in ("python -c pass", *COMMANDS)}
    for _ in range(repeat):
        for command, measured in seconds.items():
            started = time.perf_counter()
            _python(*([*CURATE, *words[command]] if command in words else ["-c", "pass"]))
            measured.append(time.perf_counter() - started)
    bare = statistics.median(seconds["python -c pass"])
    table = []
    for command, measured in seconds.items():
        took = statistics.median(measured)
        row = {"command": command, "s": f"{took:.2f}", "s over python -c pass": f"{took - bare:.2f}"}
        costs = _imports(words[command]) if command in words else Counter()
        row["s of imports"] = f"{sum(costs.values()) / 1e6:.2f}"
        row["most of it"] = ", ".join(f"{name} {cost / 1e6:.2f}" for name, cost in costs.most_common(_NAMED))
        table.append(row)
    return table


def _imports(words: list[str]) -> Counter[str]:
    """Microseconds by package."""
    costs: Counter[str] = Counter()
    for line in _python("-X", "importtime", *CURATE, *words).splitlines():
        found = _IMPORT.match(line)
        if found:
            costs[found[2].partition(".")[0]] += int(found[1])
    return costs


def _python(*arguments: str) -> str:
    """What a Python process writes to stderr."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"python {' '.join(arguments)}: {done.stderr[-2_000:]}")
    return done.stderr


def _store(folder: Path) -> Store:
    return Store(str(folder / "store"))


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def _print(table: list[dict[str, Any]]) -> None:
    sys.stdout.write(f"| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}\n")
    for row in table:
        sys.stdout.write(f"| {' | '.join(row.values())} |\n")
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
