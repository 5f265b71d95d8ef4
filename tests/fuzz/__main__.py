"""Fuzz for some time: `python -m tests.fuzz --seconds 60 --seed 1 [--target sources|documents] [--keep FOLDER]`.

The work is done by child processes, because a case may end its process. Prints one JSON object: executions,
seconds, outcomes, findings with their files. Exit code 1 where there are findings. The damage is drawn from the
seed; where atheris is installed, half the time for sources goes to `tests.fuzz.guided`, which is led by coverage.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Documents, Finding, Sources, run_case

_TARGETS: dict[str, Any] = {"sources": Sources, "documents": Documents}


def main() -> int:
    """Run the command."""
    arguments = _parser().parse_args()
    if arguments.child:
        return _work(arguments, Path(arguments.child))
    started = time.monotonic()
    total: Counter[str] = Counter()
    findings: dict[str, str] = {}
    executions, seed = _guided(arguments, findings), arguments.seed
    while (left := arguments.seconds - (time.monotonic() - started)) > 0:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            report = _child(arguments, Path(folder), seed=seed, seconds=left)
            executions += report["executions"]
            total.update(report["outcomes"])
            for problem, where in report["findings"].items():
                findings.setdefault(problem, where)
        seed += 1_000_003
    result = {
        "executions": executions,
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": dict(total.most_common()),
        "findings": findings,
    }
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return bool(findings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", choices=[*_TARGETS, "both"], default="both")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _guided(arguments: argparse.Namespace, findings: dict[str, str]) -> int:
    """Runs of `tests.fuzz.guided`, where it can be; what it finds ends it and stays in `keep`."""
    if arguments.target == "documents" or importlib.util.find_spec("atheris") is None:
        return 0
    arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="corpus-", dir=arguments.keep) as folder:
        command = [sys.executable, "-m", "tests.fuzz.guided", f"{folder}/inputs", f"-seed={arguments.seed}"]
        command += [f"-max_total_time={int(arguments.seconds / 2)}", f"-artifact_prefix={arguments.keep}{os.sep}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        findings[done.stderr[-2000:]] = str(arguments.keep)
    runs = re.search(r"Done (\d+) runs", done.stderr)
    return int(runs[1]) if runs else 0


def _child(arguments: argparse.Namespace, folder: Path, *, seed: int, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", f"{seconds:.1f}", "--seed", str(seed)]
    command += ["--target", arguments.target, "--keep", str(arguments.keep), "--child", str(folder)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    if not (folder / "case").exists():
        raise SystemExit(f"the fuzzer did not start:\n{done.stderr}")
    if done.returncode != 0:
        current = (folder / "case").read_bytes()
        name = (folder / "name").read_text()
        problem = f"the process ended with {done.returncode}: {done.stderr[-2000:]}"
        report["findings"][problem] = _keep(arguments.keep, Finding(name, current, problem))
    return report


def _work(arguments: argparse.Namespace, folder: Path) -> int:
    chosen = _TARGETS if arguments.target == "both" else {arguments.target: _TARGETS[arguments.target]}
    started = time.monotonic()
    choose = random.Random(arguments.seed)
    outcomes: Counter[str] = Counter()
    findings: dict[str, str] = {}
    executions = 0
    _report(folder, executions, outcomes, findings)
    targets = [make(folder) for make in chosen.values()]
    while time.monotonic() - started < arguments.seconds:
        target = targets[0] if choose.randrange(8) else targets[-1]
        name, data = target.pick(choose)
        (folder / "name").write_text(name)
        (folder / "case").write_bytes(data)
        _report(folder, executions, outcomes, findings)
        outcome, finding = run_case(target, name, data)
        executions += 1
        outcomes.update(outcome)
        if finding is not None:
            problem = finding.problem.strip().splitlines()
            place = next((line.strip() for line in reversed(problem) if line.strip().startswith("File")), "")
            findings.setdefault(f"{problem[-1][:200]} ({place})", _keep(arguments.keep, finding))
    _report(folder, executions, outcomes, findings)
    return 0


def _report(folder: Path, executions: int, outcomes: Counter[str], findings: dict[str, str]) -> None:
    report = {"executions": executions, "outcomes": dict(outcomes), "findings": findings}
    (folder / "report.json").write_text(json.dumps(report))


def _keep(folder: Path, finding: Finding) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{time.time_ns()}-{os.getpid()}"
    (folder / f"{stem}.txt").write_text(f"{finding.name}\n{finding.problem}")
    (folder / f"{stem}.bin").write_bytes(finding.data)
    return str(folder / f"{stem}.bin")


if __name__ == "__main__":
    sys.exit(main())
