"""How every stage grows: with rows, blocks, queries, the width of signatures, and workers; and a run with no news.

    python -m tests.benchmarks.scaling [--quick] [--tables rows blocks queries dims workers rerun] [--json FILE]
                                       [--folder DIR] [--largest 1000000]

Rows are of 12 random words; except for `sketch`, which runs the model of the demonstration, signatures are random: no
other stage cares where they come from. Every stage runs in a process of its own (`tests.benchmarks.memory`), the
small ones up to three times; the fastest counts. Prints Markdown tables, and with `--json` writes the same figures
with the facts of the machine.

`growth` is the slope of a least-squares line through log seconds over log size, at the sizes where a stage takes at
least three times what it takes at the smallest one, so that fixed costs are a third of it at most; at least the two
largest sizes. `last step` is the slope between these two alone. Peaks are beyond libraries and model, at the largest
size. The run with no news is one of the whole flow, in process (library) and by the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rise_ops.index import index_id
from rise_ops.memory import MIB
from rise_ops.model_files import model_fingerprint
from tests.benchmarks.memory import Measured, Setting, layout, measure, write_pool

Json = dict[str, Any]
Figures = dict[str, dict[int, Measured]]
"""By stage, by size."""

MEMORY = 2 * 2**30
DIMS = (352, 1_536, 6_144, 24_576)
_WORDS = 12
_DIM = 32
_BLOCK_ROWS = 256
_QUICK_SECONDS = 1.0
"""A stage that takes longer is run once."""


class Bench:
    """Measures stages on corpora in a folder."""

    def __init__(self, folder: Path, *, quick: bool, largest: int) -> None:
        self._folder = folder
        self._quick = quick
        self._largest = min(largest, 10_000) if quick else largest

    def rows(self) -> Json:
        """All stages by rows of the corpus, in one source object; `plan` and `diff` of one that is all new."""
        figures: Figures = {}
        for rows in self._sizes(1_000, self._largest):
            with self._corpus([rows]) as setting:
                _note(figures, rows, setting, ("ingest", "fill", "value", "select", "export"))
                Path(setting.folder, "pool.0.jsonl").unlink()
                write_pool(Path(setting.folder, "pool.0.jsonl"), rows, words=_WORDS, seed=1)
                _note(figures, rows, setting, ("plan",))
                measure("ingest", setting)
                _note(figures, rows, setting, ("diff",))
        for rows in self._sizes(100, 1_000 if self._quick else 10_000):
            with self._corpus([rows]) as setting:
                measure("ingest", setting)
                _note(figures, rows, replace(setting, sketch=_sketch(352)), ("sketch",))
        return _table("rows", figures)

    def blocks(self) -> Json:
        """The same by blocks, each of 256 rows and from an object of its own; `again`: with nothing changed."""
        figures: Figures = {}
        for blocks in self._sizes(4, self._largest // _BLOCK_ROWS):
            with self._corpus([_BLOCK_ROWS] * blocks) as setting:
                _note(figures, blocks, setting, ("ingest", "fill", "value", "select", "export"))
                _note(figures, blocks, setting, ("ingest",), named="ingest again")
                _note(figures, blocks, setting, ("plan",), named="plan again")
        return _table("blocks", figures)

    def queries(self) -> Json:
        """Scoring by queries."""
        figures: Figures = {}
        rows, dim = (1_000, 352) if self._quick else (20_000, 1_536)
        with self._corpus([rows], dim=dim) as setting:
            for stage in ("ingest", "fill"):
                measure(stage, setting)
            for queries in (1, 10, 100) if self._quick else (1, 10, 100, 300, 1_000):
                shutil.rmtree(Path(setting.folder, "store", "scores"), ignore_errors=True)
                _note(figures, queries, replace(setting, queries=queries), ("value",), afresh=True)
        return _table("queries", figures, {"rows": rows, "dim": dim})

    def dims(self) -> Json:
        """Writing and scoring by the width of signatures."""
        figures: Figures = {}
        rows = 500 if self._quick else 8_000
        for dim in DIMS[:2] if self._quick else DIMS:
            with self._corpus([rows], dim=dim) as setting:
                measure("ingest", setting)
                _note(figures, dim, setting, ("fill", "value"))
        return _table("dims", figures, {"rows": rows, "queries": setting.queries})

    def workers(self) -> Json:
        """Stages that several workers share, as threads."""
        figures: Figures = {}
        objects = 4 if self._quick else 40
        for workers in (1, 2):
            with self._corpus([500] * objects) as setting:
                shared = replace(setting, workers=workers, sketch=_sketch(352))
                _note(figures, workers, shared, ("ingest",))
                _note(figures, workers, shared, ("sketch",))
            with self._corpus([5_000] * (objects // 2), dim=1_536) as setting:
                for stage in ("ingest", "fill"):
                    measure(stage, setting)
                _note(figures, workers, replace(setting, workers=workers), ("value",))
        return _table("workers", figures, {"objects": objects})

    def rerun(self) -> Json:
        """A whole run, and again with nothing changed: 1,000 objects of 1,000 rows, random signatures."""
        objects = 10 if self._quick else min(1_000, max(1, self._largest // 1_000))
        with self._corpus([1_000] * objects) as setting:
            for stage in ("ingest", "fill"):
                measure(stage, setting)
            config = _configured(setting)
            first, again = (_curate("run", str(config)) for _ in range(2))
            library = json.loads(_python("--again", str(config)))
            planned = _curate("plan", str(config))
        found = {"objects": objects, "rows": first["rows"], "first": first, "again": again, "library": library}
        return {"axis": "rerun", **found, "plan": planned}

    def _sizes(self, smallest: int, largest: int) -> list[int]:
        sizes = [smallest]
        while sizes[-1] * 10 <= largest:
            sizes.append(sizes[-1] * 10)
        return sizes if sizes[-1] == largest else [*sizes, largest]

    def _corpus(self, objects: Sequence[int], *, dim: int = _DIM) -> _Corpus:
        return _Corpus(self._folder, objects, dim)


class _Corpus:
    """Objects of so many rows in a folder of their own, which goes at the end; gives the setting to measure with."""

    def __init__(self, folder: Path, objects: Sequence[int], dim: int) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=folder, prefix="scaling-")
        self._objects, self._dim = objects, dim

    def __enter__(self) -> Setting:
        folder = Path(self._temporary.name)
        for number, rows in enumerate(self._objects):
            write_pool(folder / f"pool.{number}.jsonl", rows, words=_WORDS, seed=number)
        queries = "".join(f'{{"text": "query {number} word{number} word{number + 1}"}}\n' for number in range(10))
        (folder / "queries.jsonl").write_text(queries)
        setting = Setting(str(folder), MEMORY, self._dim, _sketch(self._dim), queries=10)
        config = setting.config
        return replace(setting, index=index_id(model_fingerprint(config.model), config.sketch))

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()


def main() -> None:
    """Measure the chosen tables and print them."""
    if sys.argv[1:2] == ["--again"]:
        sys.stdout.write(json.dumps(_again(Path(sys.argv[2]))))
        return
    tables = ("rows", "blocks", "queries", "dims", "workers", "rerun")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes: a minute or two")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--largest", type=int, default=1_000_000, help="rows of the largest corpus")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    bench = Bench(options.folder, quick=options.quick, largest=options.largest)
    found: Json = {"machine": machine_facts(), "tables": {}}
    sys.stdout.write(", ".join(f"{name} {value}" for name, value in found["machine"].items()) + "\n")
    for name in options.tables:
        work: Callable[[], Json] = getattr(bench, name)
        table = found["tables"][name] = work()
        sys.stdout.write(f"\n### {name}\n\n{_markdown_rerun(table) if name == 'rerun' else _markdown(table)}")
        sys.stdout.flush()
        if options.json is not None:  # after each: what was measured is kept when a later table fails
            options.json.write_text(json.dumps(found, indent=1) + "\n")


def machine_facts() -> Json:
    """What the figures were measured on."""
    import polars
    import pyarrow
    import torch
    import zarr

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {each.__name__: each.__version__ for each in (np, polars, pyarrow, torch, zarr)}
    return {
        "platform": platform.platform(),
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **versions,
    }


def growth(seconds: Mapping[int, float]) -> tuple[float, float]:
    """Exponent of growth where fixed costs do not dominate, and that of the last step (see the module).

    Parameters
    ----------
    seconds
        By size; of two sizes at least.
    """
    sizes = sorted(seconds)
    fixed = seconds[sizes[0]]
    chosen = [size for size in sizes if seconds[size] >= 3 * fixed]
    chosen = sizes[-2:] if len(chosen) < 2 else chosen

    def slope(of: Sequence[int]) -> float:
        return float(np.polyfit(np.log(of), np.log([seconds[size] for size in of]), 1)[0])

    return slope(chosen), slope(sizes[-2:])


def _note(figures: Figures, size: int, setting: Setting, stages: Sequence[str], *, named: str | None = None,
          afresh: bool = False) -> None:  # fmt: skip
    """Measure stages one after the other; those that can be had again in the same store, the fastest of three."""
    for stage in stages:
        found = measure(stage, setting)
        for _ in range(2 if afresh or stage in ("diff", "plan") or named else 0):
            if found.seconds < _QUICK_SECONDS:
                if afresh:
                    shutil.rmtree(Path(setting.folder, "store", "scores"), ignore_errors=True)
                found = min(found, measure(stage, setting), key=lambda each: each.seconds)
        figures.setdefault(named or stage, {})[size] = found


def _sketch(dim: int) -> dict[str, int]:
    chosen = layout(dim)
    return {"dim_r": chosen.dim_r, "dim_h": chosen.dim_h, "dim_g": chosen.dim_g}


def _configured(setting: Setting) -> Path:
    """The setting as a configuration file, with the index described in the store as a run would."""
    from rise_ops.index import prepare_index
    from rise_ops.session import open_signer
    from rise_ops.store import Store

    config, store = setting.config, Store(setting.config.store)
    prepare_index(store, open_signer(store, config), model=config.model)
    path = Path(setting.folder, "curate.yaml")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return path


def _curate(*arguments: str) -> Json:
    command = [shutil.which("curate", path=str(Path(sys.executable).parent)) or "curate", *arguments, "--json"]
    started = time.perf_counter()
    environment = {**os.environ, "PREFECT_HOME": str(Path(arguments[1]).with_name("prefect"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    kept: Json = {
        name: found[name] for name in ("seconds", "rows", "rows_kept", "rows_sketched", "stages") if name in found
    }
    return {**kept, "wall": time.perf_counter() - started}


def _python(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.scaling", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]


def _again(path: Path) -> Json:
    """Seconds by stage of a run with nothing changed, without Prefect: what the tasks of the flow call."""
    from rise_ops.config import load_config
    from rise_ops.runs import new_run_id
    from tasks import index, ingest, publish, value

    config = load_config(path)
    uri, run_id = config.store, new_run_id(config.corpus.name)
    common = {"corpus": config.corpus, "limits": config.limits}
    clock: dict[str, float] = {}

    def timed(stage: str, work: Callable[..., Json], /, **call: Any) -> Json:
        started = time.perf_counter()
        found = work(uri, **call)
        clock[stage] = clock.get(stage, 0.0) + time.perf_counter() - started
        return found

    seen = timed("ingest", ingest.survey.fn, **common, deep=False, healed=False)
    corpus = timed("ingest", ingest.publish_corpus.fn, **common, objects=[], parent=seen["parent"],
                   previous=seen["parent"], unchanged=seen["unchanged"], run_id=run_id)  # fmt: skip
    version = corpus["version"]
    plan = timed("index", index.plan_index.fn, config=config, version=version, run_id=run_id)
    timed("index", index.count_tokens.fn, index_id=plan["index_id"], blocks=plan["blocks"])
    signed = timed("value", value.sign_queries.fn, config=config, index_id=plan["index_id"], name="good")
    targets = {"good": signed["target_id"]}
    scores = timed("value", value.plan_value.fn, config=config, index_id=plan["index_id"], targets=targets,
                   blocks=plan["blocks"])  # fmt: skip
    if seen["read"] or plan["missing"] or scores["missing"]:
        raise SystemExit("something has changed")
    call = {"config": config, "version": version, "valuation": scores["valuation"], "blocks": plan["blocks"]}
    timed("select", value.select_rows.fn, **call, index_id=plan["index_id"], run_id=run_id)
    timed("select", value.stability.fn, config=config, run_id=run_id, rows=corpus["rows"])
    selection = config.selection.model_dump(mode="json", exclude_none=True)
    identity = [corpus["snapshot_id"], plan["index_id"], config.weights, config.aggregate, selection]
    exported = timed("export", publish.export_kept.fn, config=config, version=version, run_id=run_id,
                     lineage={"identity": identity})  # fmt: skip
    figures = timed("evaluate", publish.evaluate_targets.fn, **call, targets=targets)
    timed("evaluate", publish.collect_examples.fn, **call, targets=targets, run_id=run_id,
          evaluation=figures["evaluation"])  # fmt: skip
    if not exported["reused"]:
        raise SystemExit("the export is another one")
    return {"stages": clock, "seconds": sum(clock.values())}


def _table(axis: str, figures: Figures, fixed: Mapping[str, int] | None = None) -> Json:
    """Figures as plain values, with what follows from them."""
    stages: Json = {}
    for stage, by_size in figures.items():
        seconds = {size: found.seconds for size, found in by_size.items()}
        slope, last = growth(seconds)
        largest = by_size[max(by_size)]
        stages[stage] = {
            "measured": {str(size): asdict(found) for size, found in by_size.items()},
            "growth": slope,
            "growth_cpu": growth({size: found.cpu for size, found in by_size.items()})[0],
            "last_step": last,
            "peak": largest.peak,
        }
    return {"axis": axis, "fixed": dict(fixed or {}), "stages": stages}


def _markdown(table: Json) -> str:
    sizes = sorted({size for stage in table["stages"].values() for size in stage["measured"]}, key=int)
    fixed = ", ".join(f"{value:,} {name}" for name, value in table["fixed"].items())
    lines = _head([table["axis"], *(f"{int(size):,}" for size in sizes), "growth", "of CPU time", "last step",
                   "peak, MiB"])  # fmt: skip
    for name, stage in table["stages"].items():
        measured = stage["measured"]
        cells = [f"{measured[size]['seconds']:.2f} s" if size in measured else "–" for size in sizes]
        slopes = [f"{stage[key]:.2f}" for key in ("growth", "growth_cpu", "last_step")]
        lines.append(_line([name, *cells, *slopes, f"{stage['peak'] / MIB:,.0f}"]))
    return "\n".join([*lines, "", *([f"At {fixed}.", ""] if fixed else [])])


def _markdown_rerun(table: Json) -> str:
    names = list(table["again"]["stages"])
    lines = [f"{table['objects']:,} objects, {table['rows']:,} rows.", ""]
    lines += _head(["run", *names, "all stages", "command"])
    for name in ("first", "again"):
        run = table[name]
        cells = [f"{run['stages'][stage]['seconds']:.1f} s" for stage in names]
        lines.append(_line([name, *cells, f"{run['seconds']:.1f} s", f"{run['wall']:.1f} s"]))
    library = table["library"]
    cells = [f"{library['stages'][stage]:.1f} s" for stage in names]
    lines.append(_line(["again, without Prefect", *cells, f"{library['seconds']:.1f} s", "–"]))
    return "\n".join([*lines, "", f"`curate plan`: {table['plan']['wall']:.1f} s.", ""])


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), f"|{'---|' * len(names)}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
