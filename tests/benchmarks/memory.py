"""Peak memory of ingestion, valuation, selection and export on a corpus and on one 20 times larger.

    python -m tests.benchmarks.memory [--rows 5000] [--factor 20] [--dim 24576] [--folder DIR]

Every stage runs in a process of its own, on rows of random words with random unit signatures (valuation
does not care where they come from). Prints one Markdown table: seconds and peak resident memory per stage
and size, and the ratio. Signatures take rows · dim · 2 bytes of disk: 4.9 GB for the defaults.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from rise_ops.config import CurationConfig, ExportConfig, KeepConfig, parse_config
from rise_ops.store import Store

STAGES = ("ingest", "fill", "value", "select", "export")
QUERIES = 100
_INDEX = "benchmark"


def main() -> None:
    """Run every stage at both sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--factor", type=int, default=20)
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stage", choices=STAGES)
    options = parser.parse_args()
    if options.stage:
        _run_stage(options.stage, options.folder, options.dim)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = (options.rows, options.rows * options.factor)
        found = {rows: _measure(Path(folder) / str(rows), rows, options.dim) for rows in sizes}
    small, large = sizes
    sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n\n")
    sys.stdout.write(f"| stage | {small:,} rows | {large:,} rows | memory ratio |\n|---|---|---|---|\n")
    for stage in STAGES:
        if stage == "fill":
            continue
        cells = [f"{found[rows][stage][0]:.1f} s, {found[rows][stage][1]:,.0f} MiB" for rows in sizes]
        ratio = found[large][stage][1] / found[small][stage][1]
        sys.stdout.write(f"| {stage} | {cells[0]} | {cells[1]} | {ratio:.2f} |\n")


def _measure(folder: Path, rows: int, dim: int) -> dict[str, tuple[float, float]]:
    """Seconds and peak MiB of each stage."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(5_000)])
    with (folder / "pool.jsonl").open("w", encoding="utf-8") as file:
        for row in range(rows):
            file.write(json.dumps({"id": row, "text": " ".join(generator.choice(words, 60)), "label": "x"}) + "\n")
    found = {}
    for stage in STAGES:
        command = [sys.executable, "-m", __spec__.name, "--stage", stage, "--folder", str(folder), "--dim", str(dim)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        found[stage] = (seconds, peak)
    return found


def _run_stage(stage: str, folder: Path, dim: int) -> None:
    config = parse_config(
        {
            "store": str(folder / "store"),
            "corpus": {"name": "pool", "sources": [str(folder / "pool.jsonl")]},
            "model": {"name": "unused"},
            "targets": {"good": {"queries": "unused"}},
            "limits": {"memory": "1GiB"},
        },
        base=folder,
    )
    stages: dict[str, Callable[[Store, CurationConfig, int], None]] = {
        "ingest": _ingest,
        "fill": _fill,
        "value": _value,
        "select": _select,
        "export": _export,
    }
    started = time.perf_counter()
    stages[stage](Store(config.store), config, dim)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(json.dumps([time.perf_counter() - started, peak]) + "\n")


def _ingest(store: Store, config: CurationConfig, _: int) -> None:
    from rise_ops.ingest import ingest_corpus

    ingest_corpus(store, config, run_id="benchmark")


def _blocks(store: Store, config: CurationConfig) -> dict[str, int]:
    from rise_ops.session import block_rows, open_corpus

    return block_rows(store, open_corpus(store, config))


def _fill(store: Store, config: CurationConfig, dim: int) -> None:
    """Random unit signatures for every block."""
    from rise_ops.index import write_block
    from rise_ops.signatures import RowSignatures

    generator = np.random.default_rng(1)
    for block, rows in _blocks(store, config).items():
        signature = generator.standard_normal((rows, dim), dtype=np.float32)
        signature /= np.linalg.norm(signature, axis=1, keepdims=True)
        ones = np.ones(rows, dtype=np.int32)
        signatures = RowSignatures(signature.astype(np.float16), 60 * ones, ones)
        write_block(store, _INDEX, block, signatures, seconds=0.0, producer={})


def _value(store: Store, config: CurationConfig, dim: int) -> None:
    from rise_ops.batches import split
    from rise_ops.targets import Target
    from rise_ops.valuation import score_part

    queries = np.random.default_rng(2).standard_normal((QUERIES, dim), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    target = Target("benchmark", pl.DataFrame({"doc_id": [str(number) for number in range(QUERIES)]}), queries)
    rows_of = _blocks(store, config)
    first = 0
    for part, blocks in enumerate(split(list(rows_of), list(rows_of.values()), target=4 * 2_048)):
        score_part(
            store,
            _INDEX,
            blocks,
            run_id="benchmark",
            part=part,
            first_block=first,
            targets={"good": target},
            aggregate="mean",
        )
        first += len(blocks)


def _select(store: Store, config: CurationConfig, _: int) -> None:
    from rise_ops.selection import decide
    from rise_ops.session import open_corpus

    keys = sorted(key for key, _ in store.list("runs/benchmark/scores"))
    scores = [key for key in keys if "/part-" in key]
    parts = [(key, key.replace("/part-", "/extremes-")) for key in scores]
    decide(
        store,
        open_corpus(store, config),
        run_id="benchmark",
        parts=parts,
        weights={"good": 1.0},
        targets=["good"],
        aggregate="mean",
        keep=KeepConfig(fraction=0.5),
        memory=2**30,
    )


def _export(store: Store, config: CurationConfig, _: int) -> None:
    from rise_ops.export import export_rows
    from rise_ops.session import open_corpus

    lineage = {
        "identity": [],
        "corpus": {"name": "pool", "version": 1, "snapshot_id": ""},
        "model": {"name": "unused", "fingerprint": ""},
        "index_id": _INDEX,
        "weights": {"good": 1.0},
        "aggregate": "mean",
        "keep": {"fraction": 0.5},
    }
    version = open_corpus(store, config)
    export_rows(store, version, run_id="benchmark", name="pool", config=ExportConfig(), lineage=lineage)


if __name__ == "__main__":
    main()
