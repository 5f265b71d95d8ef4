"""The report: seconds to draw it, memory, and size of the page.

    python -m tests.benchmarks.report [--rows 10000 100000 1000000] [--folder DIR] [--write FILE]

The run is made up (`tests.report_runs`) and has every column and section: copies of 100,000 decisions where there
are more. Each size is drawn in a process of its own. Prints a Markdown table; memory is what a second drawing takes
at most beyond what the process had after the first, pages of mapped files among it. `--write` keeps the page of the
last size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

from rise_ops.memory import MIB
from rise_ops.report import render_report
from rise_ops.store import Store
from tests.benchmarks.memory import resident
from tests.report_runs import RUN, run_record, synthetic_decisions, synthetic_examples

_COPIED = 100_000
_GROUP_ROWS = 8_192


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--folder", help="local disk for the decisions; default: a temporary folder")
    parser.add_argument("--write", type=Path, help="where the page of the last size is put")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        sys.stdout.write(_measured(Store(given.one), given.write))
        return
    sys.stdout.write("| rows | seconds | memory, MiB | page, kB |\n|---:|---:|---:|---:|\n")
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            _write_run(Store(folder), Path(folder), rows)
            command = [sys.executable, "-m", "tests.benchmarks.report", "--one", folder]
            command += ["--write", str(given.write)] if given.write else []
            line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        sys.stdout.write(f"| {rows:,} {line}\n")
        sys.stdout.flush()


def _measured(store: Store, write: Path | None) -> str:
    render_report(store, RUN)  # imports and first use are not the page's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, began = resident("VmRSS"), time.perf_counter()
    page = render_report(store, RUN)
    seconds, taken = time.perf_counter() - began, resident("VmHWM") - before
    if write is not None:
        write.write_text(page, encoding="utf-8")
    return f"| {seconds:.2f} | {taken / MIB:,.0f} | {len(page.encode()) / 1_000:,.0f} |"


def _write_run(store: Store, folder: Path, rows: int) -> None:
    frame = synthetic_decisions(min(rows, _COPIED))
    copies = -(-rows // _COPIED)
    store.create_json(f"runs/{RUN}/run.json", run_record(frame))
    store.create_json(f"runs/{RUN}/examples.json", synthetic_examples(frame))
    with pq.ParquetWriter(folder / f"runs/{RUN}/decisions.parquet", frame.to_arrow().schema) as writer:
        for copy in range(copies):
            renamed = [
                pl.format("{}{}", pl.lit(f"{copy:04x}"), pl.col(name).str.slice(4)).alias(name)
                for name in ("doc_id", "duplicate_of")
            ]
            rank = (pl.col("rank").cast(pl.Int64) * copies + copy).cast(pl.UInt32)
            writer.write_table(frame.with_columns(*renamed, rank=rank).to_arrow(), row_group_size=_GROUP_ROWS)


if __name__ == "__main__":
    main()
