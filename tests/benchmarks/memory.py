"""Peak memory of every stage against `limits.memory`, on a corpus and on one some times larger.

    python -m tests.benchmarks.memory [--rows 5000] [--factor 20] [--dim 24576] [--memory 1GiB] [--folder DIR]
                                      [--stages ingest value select export]

Every stage runs in a process of its own, on rows of random words; valuation on random unit signatures (it does
not care where they come from), sketching, which is left out unless asked for, with the model of the demonstration.
Prints one Markdown table: seconds and the peak of resident memory beyond what the libraries and the model take,
per stage and size, and what the stage's plan allows. Signatures take rows · dim · 2 bytes of disk: 4.9 GB for the
defaults, and as much again with sketching.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import polars as pl
from pydantic import ByteSize, TypeAdapter

from rise_ops import machine
from rise_ops.config import CurationConfig, SketchConfig, parse_config
from rise_ops.demo.corpus import MODEL_FOLDER
from rise_ops.memory import MIB, stage_memory
from rise_ops.parts import Part, cut_parts
from rise_ops.store import Store
from rise_ops.threads import ContextPool

STAGES = ("ingest", "sketch", "value", "select", "export")
INDEX = "0" * 64
QUERIES = 100
_SKETCH = {"dim_r": 128, "dim_h": 64, "dim_g": 64}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Setting:
    """What a stage is measured on."""

    folder: str
    """With `pool.jsonl` and, after ingestion, `store`."""
    memory: int
    """`limits.memory` in bytes."""
    dim: int
    """Of the random signatures; for `rank`, the number of rows."""
    sketch: dict[str, int]
    """Widths of the sketch that is computed."""
    queries: int = QUERIES
    aggregate: str = "mean"
    workers: int = 1
    """Threads that ingest, sketch and score at the same time."""
    index: str = INDEX
    """Id of the index that is filled, scored and selected from."""

    @property
    def config(self) -> CurationConfig:
        """The same as a configuration."""
        folder = Path(self.folder)
        return parse_config(
            {
                "store": str(folder / "store"),
                "corpus": {"name": "pool", "sources": [str(folder / "pool.*")]},
                "model": {"name": str(MODEL_FOLDER), "device": "cpu"},
                "sketch": self.sketch,
                "targets": {"good": {"queries": str(folder / "queries.jsonl")}},
                "aggregate": self.aggregate,
                "selection": {"keep": {"fraction": 0.5}},
                "limits": {"memory": self.memory},
            },
            base=folder,
        )


@dataclass(frozen=True, slots=True)
class Measured:
    """What a stage took."""

    seconds: float
    base: int
    """Resident bytes before it began: libraries and model."""
    peak: int
    """Bytes that it took beyond these, at most."""
    cpu: float = 0.0
    """CPU seconds of all its threads."""


def main() -> None:
    """Run every stage at both sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--factor", type=int, default=20)
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--memory", type=TypeAdapter(ByteSize).validate_python, default=2**30)
    parser.add_argument("--aggregate", default="mean")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[name for name in STAGES if name != "sketch"])
    parser.add_argument("--stage", choices=("diff", "fill", "plan", "rank", *STAGES))
    parser.add_argument("--setting")
    options = parser.parse_args()
    if options.stage:
        measured = _run_stage(options.stage, Setting(**json.loads(options.setting)))
        sys.stdout.write(json.dumps(asdict(measured)) + "\n")
        return
    sizes = (options.rows, options.rows * options.factor)
    found = {}
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_pool(Path(folder) / "pool.jsonl", rows, words=options.words)
            setting = Setting(folder, int(options.memory), options.dim, _SKETCH, aggregate=options.aggregate)
            stages = [
                stage for stage in ("ingest", "sketch", "fill", *STAGES[2:]) if stage in ("fill", *options.stages)
            ]
            found[rows] = {stage: measure(stage, setting) for stage in stages}
    plans = stage_memory(setting.config, rows=sizes[1], queries=QUERIES)
    sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n\n")
    sys.stdout.write(f"| stage | {sizes[0]:,} rows | {sizes[1]:,} rows | planned | limit |\n|---|---|---|---|---|\n")
    for stage in options.stages:
        cells = [f"{each.seconds:.1f} s, {each.peak / MIB:,.0f} MiB" for each in (found[rows][stage] for rows in sizes)]
        planned = f"{plans[stage].bytes / MIB:,.0f} MiB | {setting.memory / MIB:,.0f} MiB"
        sys.stdout.write(f"| {stage} | {' | '.join(cells)} | {planned} |\n")


def write_pool(path: Path, rows: int, *, words: int, seed: int = 0) -> None:
    """Rows of random words as JSON lines."""
    generator = np.random.default_rng(seed)
    vocabulary = np.array([f"word{number}" for number in range(5_000)])
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, 1_000):
            for row, chosen in enumerate(generator.choice(vocabulary, (min(1_000, rows - start), words)), start):
                file.write(f'{{"id": {row}, "text": "{row} {" ".join(chosen)}", "label": "x"}}\n')


def measure(stage: str, setting: Setting) -> Measured:
    """Run a stage in a process of its own.

    Raises
    ------
    subprocess.CalledProcessError
        It failed.
    """
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else __spec__.name, "--stage", stage]
    done = subprocess.run([*command, "--setting", json.dumps(asdict(setting))], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"stage {stage} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def resident(name: str) -> int:
    """A figure of this process in bytes: VmRSS, or VmHWM, its peak."""
    return machine.resident(name) or 0


def _run_stage(stage: str, setting: Setting) -> Measured:
    import pyarrow.parquet  # noqa: F401
    import zarr  # noqa: F401

    from rise_ops import evaluation, export, indexing, ingest, selection, valuation  # noqa: F401

    prepare: dict[str, Callable[[Store, Setting], Callable[[], Any]]] = {
        "ingest": _ingest,
        "diff": _diff,
        "plan": _plan,
        "sketch": _sketch,
        "fill": _fill,
        "value": _value,
        "select": _select,
        "export": _export,
        "rank": _rank,
    }
    work = prepare[stage](Store(setting.config.store), setting)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base, started, cpu = resident("VmRSS"), time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Measured(seconds, base, resident("VmHWM") - base, cpu)


def _at_once(setting: Setting, work: Callable[[Sequence[T]], Any], items: Sequence[T]) -> None:
    """Work on equal shares of items in as many threads as there are workers."""
    share = max(1, -(-len(items) // setting.workers))
    with ContextPool(setting.workers) as pool:
        list(pool.map(work, [items[start : start + share] for start in range(0, len(items), share)]))


def _ingest(store: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.corpus import look_at_sources
    from rise_ops.ingest import IngestedObject, ingest_object
    from rise_ops.publish import publish

    config = setting.config
    options: dict[str, Any] = {"corpus": config.corpus, "limits": config.limits}

    def ingest() -> None:
        _, diff = look_at_sources(store, **options)
        objects: list[IngestedObject] = []
        _at_once(setting, lambda some: objects.extend(ingest_object(store, each, **options) for each in some),
                 diff.to_read(deep=False))  # fmt: skip
        publish(store, **options, objects=objects, unchanged=diff.unchanged, run_id="benchmark")

    return ingest


def _diff(store: Store, setting: Setting) -> Callable[[], Any]:
    """The current version against the one before."""
    from rise_ops.corpus import parent_version
    from rise_ops.diff import diff_versions
    from rise_ops.session import open_corpus

    new = open_corpus(store, setting.config)
    old = parent_version(store, new)
    return lambda: diff_versions(store, old, new, memory=setting.memory)


def _plan(_: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.plan import plan_run

    return lambda: plan_run(setting.config)


def _blocks(store: Store, setting: Setting) -> dict[str, int]:
    from rise_ops.session import block_rows, open_corpus

    return block_rows(store, open_corpus(store, setting.config))


def layout(dim: int) -> SketchConfig:
    """Some sketch whose signatures have this length, a multiple of 16."""
    return SketchConfig(dim_h=8, dim_r=dim // 16, dim_g=dim // 16)


def _sketch(store: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.index import prepare_index
    from rise_ops.indexing import sketch_blocks
    from rise_ops.session import open_signer

    signer = open_signer(store, setting.config)
    identity = prepare_index(store, signer, model=setting.config.model)
    blocks = list(_blocks(store, setting))

    def fill(some: Sequence[str]) -> None:
        sketch_blocks(store, identity, some, dim=signer.sketch.dim, signer=lambda: signer)

    return lambda: _at_once(setting, fill, blocks)


def _fill(store: Store, setting: Setting) -> Callable[[], Any]:
    """Random unit signatures for every block."""
    from rise_ops.index import write_block
    from rise_ops.signatures import RowSignatures

    generator = np.random.default_rng(1)

    def fill() -> None:
        for block, rows in _blocks(store, setting).items():
            signature = generator.standard_normal((rows, setting.dim), dtype=np.float32)
            signature /= np.linalg.norm(signature, axis=1, keepdims=True)
            ones = np.ones(rows, dtype=np.int32)
            signatures = RowSignatures(signature.astype(np.float16), 60 * ones, ones)
            write_block(store, setting.index, block, signatures, seconds=0.0, producer={})

    return fill


def _value(store: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.targets import Target
    from rise_ops.valuation import score_parts

    queries = np.random.default_rng(2).standard_normal((setting.queries, setting.dim), dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    names = pl.DataFrame({"doc_id": [str(number) for number in range(setting.queries)]})
    targets = {"good": Target("benchmark", names, queries)}

    def value(parts: Sequence[Part]) -> None:
        score_parts(store, setting.index, parts, targets=targets, aggregate=setting.config.aggregate,
                    sketch=layout(setting.dim), memory=setting.memory // setting.workers)  # fmt: skip

    return lambda: _at_once(setting, value, cut_parts(setting.index, _blocks(store, setting)))


def _select(store: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.selection import decide
    from rise_ops.session import open_corpus

    config = setting.config
    return lambda: decide(
        store,
        open_corpus(store, config),
        run_id="benchmark",
        parts=cut_parts(setting.index, _blocks(store, setting)),
        weights={"good": 1.0},
        targets=["good"],
        aggregate=config.aggregate,
        selection=config.selection,
        memory=setting.memory,
    )


def _rank(_: Store, setting: Setting) -> Callable[[], Any]:
    """The sort of selection alone, on random keys."""
    from rise_ops.memory import select_memory
    from rise_ops.ordering import RECORD
    from rise_ops.ranking import Fates, Sorter, by_value

    rows = setting.dim
    plan = select_memory(setting.memory, rows=rows, queries=0, aggregate="mean")
    generator = np.random.default_rng(0)

    def rank() -> None:
        folder = Path(setting.folder)
        sorter, fates = (
            Sorter(folder / "keys", RECORD, capacity=plan.sort_rows),
            Fates(folder, capacity=plan.sort_rows),
        )
        for start in range(0, rows, 8_192):
            records = np.zeros(min(8_192, rows - start), RECORD)
            values = generator.standard_normal(len(records), dtype=np.float32)
            ties = generator.integers(0, 2**63, len(records)).astype(np.uint64)
            by_value(records, values, np.ones(len(records), np.bool_), ties)
            records["row"] = np.arange(start, start + len(records))
            sorter.add(records)
        for records in sorter.runs():
            fates.add(records["row"], records["rank"], records["code"])
        for start in range(0, rows, 8_192):
            fates.take(min(8_192, rows - start))

    return rank


def _export(store: Store, setting: Setting) -> Callable[[], Any]:
    from rise_ops.export import export_rows
    from rise_ops.session import open_corpus

    lineage = {
        "identity": [],
        "corpus": {"name": "pool", "version": 1, "snapshot_id": ""},
        "model": {"name": "unused", "fingerprint": ""},
        "index_id": setting.index,
        "weights": {"good": 1.0},
        "aggregate": "mean",
        "keep": {"fraction": 0.5},
    }
    config = setting.config
    return lambda: export_rows(
        store,
        open_corpus(store, config),
        run_id="benchmark",
        name="pool",
        config=config.export,
        lineage=lineage,
        memory=setting.memory,
    )


if __name__ == "__main__":
    main()
