"""One pass over an index beside what bounds it: reading its bytes, and the bare matrix product.

    python -m tests.benchmarks.scoring [--rows 8192] [--dim 24576] [--queries 1 10 100] [--runs 5] [--s3] [--json FILE]

Random unit signatures are stored as an index is. In turn are timed

    read   the same objects with nothing done to them: from disk in pieces of 1 MiB, into buffers that are used again
           (whole chunks take twice as long: they leave the caches), by as many threads as there are cores; from S3
           (a server on loopback, `--s3`) by the same client, 8 requests at a time
    gemm   float32 rows [1024, dim], which are in memory, times the queries, as often as the index has such rows
    scan   `rise_ops.scan.iter_scores`: read, checked and multiplied. From a disk it copies nothing, and rows come as
           float16, half the bytes of those that the bare product takes: it can be faster than either bound

Ratio: scan over the larger of the two bounds, run by run; the median is the figure. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch

from rise_ops.index import BlockRecord, write_block
from rise_ops.machine import measured_on
from rise_ops.memory import value_memory
from rise_ops.scan import iter_scores
from rise_ops.store import Store
from tests import servers
from tests.indexed import INDEX, signed, unit

GIB = 2**30
_BLOCK_ROWS = 2_048
_GEMM_ROWS = 1_024
_REQUESTS = 8
_PIECE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of each run."""

    queries: int
    read: list[float]
    gemm: list[float]
    scan: list[float]

    @property
    def ratios(self) -> list[float]:
        """Scan over the larger bound, run by run."""
        return [scan / max(read, gemm) for read, gemm, scan in zip(self.read, self.gemm, self.scan, strict=True)]


class Bench:
    """An index and what is done with it."""

    def __init__(self, store: Store, rows: int, dim: int, memory: int) -> None:
        self.store, self.dim, self.memory = store, dim, memory
        self.records: list[BlockRecord] = []
        for number, start in enumerate(range(0, rows, _BLOCK_ROWS)):
            signatures = signed(min(_BLOCK_ROWS, rows - start), dim, seed=number)
            self.records.append(
                write_block(store, INDEX, f"{number:064x}", signatures, seconds=0, producer={"device": "none"})
            )
        prefix = f"indexes/{INDEX}/blocks/"
        self.sizes = {key: size for key, size in store.list(prefix) if "/signature/c/" in key}
        self.rows = sum(record.rows for record in self.records)
        self._some = torch.from_numpy(unit(_GEMM_ROWS, dim))

    @property
    def gigabytes(self) -> float:
        """Of signatures."""
        return sum(self.sizes.values()) / 1e9

    def read(self) -> None:
        """All bytes of all signatures."""
        threads = (os.cpu_count() or 1) if self.store.is_local else _REQUESTS
        buffers = [bytearray(_PIECE_BYTES) for _ in range(threads)]
        mine = [list(self.sizes)[number::threads] for number in range(threads)]

        def some(number: int) -> None:
            for key in mine[number]:
                if not self.store.is_local:
                    self.store.get_buffer(key)
                    continue
                with open(self.store.url(key), "rb", buffering=0) as file:
                    while file.readinto(buffers[number]):
                        pass

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(some, range(threads)))

    def gemm(self, queries: torch.Tensor) -> None:
        """The product alone."""
        out = torch.empty(_GEMM_ROWS, len(queries))
        for _ in range(self.rows // _GEMM_ROWS):
            torch.mm(self._some, queries.T, out=out)

    def scan(self, queries: Any) -> None:
        """The pass."""
        plan = value_memory(self.memory, queries=len(queries), dim=self.dim, aggregate="mean")
        seen = sum(len(scores) for _, _, scores in iter_scores(self.store, INDEX, self.records, queries,
                                                               memory=plan.scan))  # fmt: skip
        assert seen == self.rows


def measure(bench: Bench, queries: int, runs: int) -> Figures:
    """All three in turn; each once before, not counted."""
    wanted = unit(queries, bench.dim, seed=12_345)
    ways: dict[str, Callable[[], None]] = {
        "read": bench.read,
        "gemm": lambda: bench.gemm(torch.from_numpy(wanted)),
        "scan": lambda: bench.scan(wanted),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return Figures(queries, **seconds)


def table(found: Sequence[Figures], gigabytes: float) -> str:
    """Markdown: seconds per gigabyte of signatures."""
    lines = ["| queries | read, s/GB | gemm, s/GB | scan, s/GB | ratio (min to max) |", "|---|---|---|---|---|"]
    for each in found:
        read, gemm, scan = (statistics.median(way) / gigabytes for way in (each.read, each.gemm, each.scan))
        ratios = each.ratios
        lines.append(
            f"| {each.queries} | {read:.3f} | {gemm:.3f} | {scan:.3f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8_192)
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--memory", type=int, default=2 * GIB)
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scoring-")))
        root = str(folder / "store")
        if given.s3:
            server = stack.enter_context(servers.running(servers.available()[0], folder))
            os.environ |= server.environment
            fsspec.filesystem("s3", use_listings_cache=False).mkdir("bench")
            root = "s3://bench/store"
        bench = Bench(Store(root), given.rows, given.dim, given.memory)
        found = [measure(bench, queries, given.runs) for queries in given.queries]
    sys.stdout.write(
        f"{bench.rows:,} rows of {given.dim:,}, {bench.gigabytes:.2f} GB, {'S3' if given.s3 else 'disk'}\n\n"
    )
    sys.stdout.write(table(found, bench.gigabytes))
    if given.json:
        document = measured_on("cpu") | {"rows": bench.rows, "dim": given.dim, "s3": given.s3}
        document["figures"] = [asdict(each) | {"ratios": each.ratios} for each in found]
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
