"""What Prefect costs: `curate run` on a running server beside the same library calls in one plain process.

    python -m tests.benchmarks.overhead [--model DIR] [--blocks 50] [--rows 300] [--words 160] [--repeat 1]

A Prefect server with SQLite is started on loopback. A new corpus of as many blocks is curated by a process that calls
the library one step after the other, by `curate run`, and by `curate run` with a task for every block; whole processes
are timed, imports included, in turns. Prints a Markdown table: seconds, and what the flows cost over the plain process,
in all and for each block.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from rise_ops.config import CurationConfig, load_config
from rise_ops.demo.corpus import MODEL_FOLDER
from tests.corpora import make_rows

_PLAIN, _FLOW, _FLOW_PER_BLOCK = "plain library calls", "curate run", "curate run, a task for each block"


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--blocks", type=int, default=50)
    parser.add_argument("--rows", type=int, default=300, help="rows of a block")
    parser.add_argument("--words", type=int, default=160, help="words of a row")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--be", choices=(_PLAIN, _FLOW, _FLOW_PER_BLOCK), help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be:
        (_curate_plainly if options.be == _PLAIN else _curate_as_flow)(options.config, options.be)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overhead-")))
        _write_corpus(folder, options)
        os.environ |= _start_server(folder, stack)
        seconds: dict[str, list[float]] = {_PLAIN: [], _FLOW: [], _FLOW_PER_BLOCK: []}
        for turn in range(options.repeat):
            for kind, measured in seconds.items():
                measured.append(_measure(kind, folder, f"{turn}-{len(measured)}-{kind.replace(' ', '-')}"))
                sys.stderr.write(f"{kind}: {measured[-1]:.1f} s\n")
        _print(seconds, options)


def _write_corpus(folder: Path, options: argparse.Namespace) -> None:
    (folder / "raw").mkdir()
    rows = list(make_rows(options.blocks * options.rows, words=options.words))
    for block in range(options.blocks):
        part = rows[block * options.rows : (block + 1) * options.rows]
        (folder / "raw" / f"{block:03d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    document = {
        "store": "store",
        "corpus": {"name": "bench", "sources": ["raw/*.jsonl"]},
        "model": {"name": str(options.model.resolve()), "device": "cpu"},
        "targets": {"good": {"queries": "queries.jsonl"}},
        "selection": {"keep": {"fraction": 0.5}},
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")


def _start_server(folder: Path, stack: ExitStack) -> dict[str, str]:
    from tests.prefect_server import server

    (folder / "server").mkdir()
    running = stack.enter_context(server(folder / "server"))
    return {"PREFECT_API_URL": f"{running.url}/api", "PREFECT_HOME": str(folder / "home")}


def _measure(kind: str, folder: Path, store: str) -> float:
    document = yaml.safe_load((folder / "bench.yaml").read_text(encoding="utf-8"))
    path = folder / f"{store}.yaml"
    path.write_text(yaml.safe_dump({**document, "store": store}), encoding="utf-8")
    command = [sys.executable, "-m", "tests.benchmarks.overhead", "--be", kind, "--config", str(path)]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds


def _curate_as_flow(path: Path, kind: str) -> None:
    from flows import cli, stages

    if kind == _FLOW_PER_BLOCK:
        for name in ("_INGEST_BYTES", "_SKETCH_ROWS", "_VALUE_ROWS"):
            vars(stages)[name] = 1
    sys.argv = ["curate", "run", str(path), "--json"]
    cli.main()


def _curate_plainly(path: Path, _: str) -> None:
    """The library calls of the tasks, in the order of the flow."""
    from rise_ops import corpus, diff, examples, export, ingest, parts, report, runs, selection, session
    from rise_ops import evaluation as evaluations
    from rise_ops.index import prepare_index, read_records
    from rise_ops.index_plan import plan_work
    from rise_ops.indexing import sketch_blocks
    from rise_ops.reuse import read_reuse
    from rise_ops.store import Store
    from rise_ops.valuation import score_parts

    config = load_config(path)
    store, memory = Store(config.store), int(config.limits.memory)
    store.probe()
    run_id, started, clock = runs.new_run_id(config.corpus.name), runs.now(), time.perf_counter()
    change = corpus.look_at_sources(store, config.corpus, config.limits)[1]
    limits = {"corpus": config.corpus, "limits": config.limits}
    objects = [ingest.ingest_object(store, source, **limits) for source in change.to_read(deep=False)]  # type: ignore[arg-type]
    version = ingest.publish(store, objects=objects, unchanged=[], run_id=run_id, compared_with=0, **limits)  # type: ignore[arg-type]
    diff.diff_versions(store, None, version, memory=memory)
    plan = plan_work(store, config, version, run_id=run_id)
    signer = session.open_signer(store, config)
    prepare_index(store, signer, model=config.model)
    reuse = read_reuse(store, sorted(set(plan.reuse.values())), plan.missing)
    sketch_blocks(store, plan.index_id, plan.missing, dim=config.sketch.dim, signer=lambda: signer, reuse=reuse)
    tokens = sum(record.tokens for record in read_records(store, plan.index_id, plan.blocks).values())
    targets = {name: session.open_target(store, config, plan.index_id, name) for name in config.targets}
    ids = {name: target.target_id for name, target in targets.items()}
    cut = parts.cut_parts(parts.valuation_id(plan.index_id, ids, config.aggregate), plan.blocks)
    missing = parts.missing_parts(store, cut)
    score_parts(store, plan.index_id, missing, targets=targets, aggregate=config.aggregate, sketch=config.sketch,
                memory=memory)  # fmt: skip
    chosen = selection.decide(
        store, version, run_id=run_id, parts=cut, weights=config.weights, targets=list(config.targets),
        aggregate=config.aggregate, selection=config.selection, memory=memory,
    )  # fmt: skip
    lineage: dict[str, Any] = {
        "identity": [version.snapshot_id, plan.index_id],
        "corpus": {"name": version.corpus, "version": version.version, "snapshot_id": version.snapshot_id},
        "model": {"name": config.model.name, "fingerprint": plan.model_fingerprint},
        "index_id": plan.index_id,
        "weights": config.weights,
        "aggregate": config.aggregate,
        "keep": config.selection.keep.model_dump(exclude_none=True),
    }
    published = export.export_rows(
        store, version, run_id=run_id, name=config.export_name, config=config.export, lineage=lineage, memory=memory
    )
    figures = evaluations.evaluate_run(store, version, plan.blocks, ids, cut)
    examples.write_examples(store, version, plan.blocks, run_id=run_id, targets=ids, parts=cut, evaluation=figures)
    record = _record(config, run_id, started, time.perf_counter() - clock)
    record["counts"] |= {"rows": version.rows, "tokens": tokens, "rows_kept": chosen.kept}
    record |= {"export": published.label, "index_id": plan.index_id, "evaluation": figures}
    record["corpus"] |= {"version": version.version, "snapshot_id": version.snapshot_id}
    runs.write_run(store, record)
    report.write_report(store, run_id)


def _record(config: CurationConfig, run_id: str, started: str, seconds: float) -> dict[str, Any]:
    from rise_ops.runs import code_identity, now

    return {
        "run_id": run_id,
        "name": "plain",
        "status": "completed",
        "error": None,
        "started": started,
        "finished": now(),
        "seconds": seconds,
        "config": config.model_dump(mode="json"),
        "config_fingerprint": config.fingerprint,
        "code": code_identity(),
        "model": {"name": config.model.name},
        "corpus": {"name": config.corpus.name},
        "counts": {},
        "selection": None,
        "stages": [],
    }


def _print(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    plain = statistics.median(seconds[_PLAIN])
    write = sys.stdout.write
    write(f"{platform.machine()}, {os.cpu_count()} cores; {options.blocks} blocks of {options.rows} rows; seconds of ")
    write(f"whole processes, median of {options.repeat}; plain: {plain / options.blocks:.1f} s a block\n\n")
    write("| | seconds | over plain | seconds over plain, a block |\n|---|---|---|---|\n")
    for kind, measured in seconds.items():
        took = statistics.median(measured)
        write(f"| {kind} | {took:.1f} | {took / plain - 1:.1%} | {(took - plain) / options.blocks:.3f} |\n")


if __name__ == "__main__":
    main()
