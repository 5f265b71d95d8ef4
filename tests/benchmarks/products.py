"""Ways to multiply stored signatures (float16) with queries, on one core, with rows in its cache: seconds and errors.

    python -m tests.benchmarks.products [--dim 24576] [--queries 1 10 100] [--runs 20] [--json FILE]

    compiled    `rise_ops.products`: widened in the registers, float32 sums
    float32     widened to float32 in panels, BLAS
    bfloat16    rows and queries rounded to bfloat16, BLAS, float32 sums
    int8        rows and queries rounded to 8 bits, each with a step of its own, integer products: what a prefilter with
                rescoring could use; SimHash codes (`rise_ops.codes`) take an eighth of its bytes

Seconds of the core's own time per gigabyte of float16 rows, the least of the runs, rounding of the rows included, that
of the queries not. Errors: the largest and the root mean square, against sums in float64, and how many of the ten best
rows of a query are among its ten best by rounded scores. Rows are random, half of them near a query.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.machine import measured_on
from rise_ops.products import inner_products
from tests.indexed import unit

Float32Array = npt.NDArray[np.float32]
_CACHED_BYTES = 4 * 2**20
_BEST = 10
_PANEL_COLUMNS = 2_048


def _float32(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], torch.Tensor]:
    out, panel = torch.empty(len(rows), len(queries)), torch.empty(len(rows) * _PANEL_COLUMNS)

    def product() -> torch.Tensor:
        parts = zip(rows.split(_PANEL_COLUMNS, 1), queries.split(_PANEL_COLUMNS, 1), strict=True)
        for number, (part, own) in enumerate(parts):
            torch.addmm(out, panel[: part.numel()].view(part.shape).copy_(part), own.T, beta=min(number, 1), out=out)
        return out

    return product


def _bfloat16(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], torch.Tensor]:
    rounded, wide = queries.bfloat16().T, torch.empty_like(rows, dtype=torch.bfloat16)
    return lambda: torch.mm(wide.copy_(rows), rounded).float()


def _int8(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], torch.Tensor]:
    steps = queries.abs().amax(1) / 127
    rounded = (queries / steps[:, None]).round().to(torch.int8).T.contiguous()

    def product() -> torch.Tensor:
        wide = rows.float()
        own = wide.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((wide / own).round().to(torch.int8), rounded).float() * own * steps

    return product


def _compiled(rows: torch.Tensor, queries: torch.Tensor) -> Callable[[], torch.Tensor]:
    out = torch.empty(len(rows), len(queries))

    def product() -> torch.Tensor:
        inner_products(rows.numpy(), queries.numpy(), out.numpy())
        return out

    return product


WAYS: dict[str, Callable[[torch.Tensor, torch.Tensor], Callable[[], torch.Tensor]]] = {
    "compiled": _compiled, "float32": _float32, "bfloat16": _bfloat16, "int8": _int8,
}  # fmt: skip


def measure(dim: int, count: int, runs: int) -> list[dict[str, Any]]:
    """One record a way."""
    queries = unit(count, dim, seed=1)
    near = max(40, _CACHED_BYTES // (2 * dim))
    rows = unit(near, dim, seed=2)
    rows[::2] += queries[np.arange(len(rows[::2])) % count] * np.linspace(0.05, 0.6, len(rows[::2]))[:, None]
    half = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    right = half.astype(np.float64) @ queries.T.astype(np.float64)
    found = []
    for name, way in WAYS.items():
        product = way(torch.from_numpy(half), torch.from_numpy(queries))
        scores = product().numpy().astype(np.float64)
        seconds = min(_timed(product) for _ in range(runs))
        best = [set(np.argsort(-column)[:_BEST]) & set(np.argsort(-wanted)[:_BEST])
                for column, wanted in zip(scores.T, right.T, strict=True)]  # fmt: skip
        errors = scores - right
        found.append({
            "queries": count, "way": name, "seconds_per_gigabyte": seconds / (half.nbytes / 1e9),
            "largest_error": float(np.abs(errors).max()), "rms_error": float(np.sqrt((errors**2).mean())),
            "recall": sum(map(len, best)) / (_BEST * count),
        })  # fmt: skip
    return found


def _timed(product: Callable[[], torch.Tensor]) -> float:
    started = time.thread_time()
    product()
    return time.thread_time() - started


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| queries | way | core s/GB | largest error | rms error | best 10 kept |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {each['queries']} | {each['way']} | {each['seconds_per_gigabyte']:.3f} | {each['largest_error']:.1e} | "
        f"{each['rms_error']:.1e} | {each['recall']:.1%} |"
        for each in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [record for count in given.queries for record in measure(given.dim, count, given.runs)]
    sys.stdout.write(table(found))
    if given.json:
        document = measured_on("cpu") | {"dim": given.dim, "figures": found}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
