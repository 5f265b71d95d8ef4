"""Near-duplicates and diversity: time, peak memory, candidates and recall.

    python -m tests.benchmarks.near_duplicates [--rows 20000 100000] [--dim 2048] [--common 0.3] [--cosine 0.98]
        [--recall 0.99] [--share 0.1] [--memory 1GiB] [--folder DIR] [--config CURATION.yaml] [--diversity 0.25]

Made-up signatures share a direction, so that strangers have the cosine `common`; `share` of the rows are copies of
others, half of them at `cosine`, half at a random one above, and priorities are random. With `--config` the rows are
those of an indexed corpus instead, and every pair is compared by brute force to tell what was found. Each size
runs in a process of its own. Prints a Markdown table of near-duplicates and, with `--diversity`, one of k-centre
orders of that part of the rows, out of all. Signatures take rows · dim · 2 bytes of disk.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ByteSize, TypeAdapter

from rise_ops.memory import MIB
from rise_ops.store import Store
from tests.benchmarks.memory import resident

INDEX = "0" * 64
_BLOCK_ROWS = 4_096

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is measured."""

    work: str
    """near_duplicates or diversity."""
    folder: str
    rows: int
    dim: int
    common: float
    cosine: float
    recall: float
    share: float
    memory: int
    config: str | None = None


@dataclass(frozen=True, slots=True)
class Made:
    """An index, and where its rows are known, who copies whom."""

    store: Store
    identity: str
    blocks: list[str]
    rows: int
    dim: int
    copies: npt.NDArray[np.int64] | None = None
    """[pairs, 2]: a row and its original."""
    cosines: npt.NDArray[np.float64] | None = None
    """Of these pairs."""


def strangers(rows: int, dim: int, *, common: float = 0.0, seed: int = 0) -> Float32Array:
    """Unit rows that have about the cosine `common` with each other."""
    random = np.random.default_rng(seed)
    shared = np.random.default_rng(4_711).standard_normal(dim, np.float32)
    own = random.standard_normal((rows, dim), np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    mixed = np.sqrt(common) * shared / np.linalg.norm(shared) + np.sqrt(1 - common) * own
    return np.asarray(mixed / np.linalg.norm(mixed, axis=1, keepdims=True), np.float32)


def at_cosine(row: Float32Array, cosine: float, *, seed: int) -> Float32Array:
    """A unit row at this cosine to another one."""
    row = row / np.linalg.norm(row)
    away = np.random.default_rng(seed).standard_normal(len(row)).astype(np.float32)
    away -= (away @ row) * row
    return np.asarray(cosine * row + np.sqrt(1 - cosine**2) * away / np.linalg.norm(away), np.float32)


def main() -> None:
    """Measure every size and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 100_000])
    parser.add_argument("--dim", type=int, default=2_048)
    parser.add_argument("--common", type=float, default=0.3)
    parser.add_argument("--cosine", type=float, default=0.98)
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--memory", type=TypeAdapter(ByteSize).validate_python, default=2**30)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--config")
    parser.add_argument("--diversity", type=float, default=0.0)
    parser.add_argument("--setting")
    parser.add_argument("--fill", action="store_true")
    options = parser.parse_args()
    if options.setting:
        setting = Setting(**json.loads(options.setting))
        sys.stdout.write(json.dumps(_fill(setting) if options.fill else _run(setting)) + "\n")
        return
    found: dict[str, list[dict[str, Any]]] = {"near_duplicates": [], "diversity": []}
    for rows in options.rows if options.config is None else [0]:
        for work in found if options.diversity else ["near_duplicates"]:
            share = options.share if work == "near_duplicates" else options.diversity
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                setting = Setting(
                    work, folder, rows, options.dim, options.common, options.cosine, options.recall, share,
                    int(options.memory), options.config,
                )  # fmt: skip
                if options.config is None:
                    measure(setting, fill=True)
                found[work].append(measure(setting))
    sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}\n")
    for table in found.values():
        _print(table)


def _print(table: list[dict[str, Any]]) -> None:
    if not table:
        return
    sys.stdout.write(f"\n| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}\n")
    for row in table:
        cells = [f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
                 for value in row.values()]  # fmt: skip
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def measure(setting: Setting, *, fill: bool = False) -> dict[str, Any]:
    """Run it, or make the signatures for it, in a process of its own.

    Raises
    ------
    RuntimeError
        It failed.
    """
    command = [sys.executable, "-m", "tests.benchmarks.near_duplicates", "--setting", json.dumps(asdict(setting))]
    done = subprocess.run([*command, "--fill"] if fill else command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{setting} failed:\n{done.stderr}")
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _run(setting: Setting) -> dict[str, Any]:
    from rise_ops import diversity, near_duplicates  # noqa: F401

    made = _made_up(setting) if setting.config is None else _real(setting.config)
    work: dict[str, Callable[[Setting, Made], tuple[float, int, dict[str, Any]]]] = {
        "near_duplicates": _near_duplicates,
        "diversity": _diversity,
    }
    seconds, peak, more = work[setting.work](setting, made)
    return {"rows": made.rows, "dim": made.dim, **more, "s": seconds, "peak MiB": round(peak / MIB)}


def _timed(work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds, bytes beyond those before, and the result."""
    Path("/proc/self/clear_refs").write_text("5")
    base, started = resident("VmRSS"), time.perf_counter()
    found = work()
    return time.perf_counter() - started, resident("VmHWM") - base, found


def _near_duplicates(setting: Setting, made: Made) -> tuple[float, int, dict[str, Any]]:
    from rise_ops.near_duplicates import NearDuplicates, near_duplicates

    priority = np.random.default_rng(0).permutation(made.rows).astype(np.uint64)
    seconds, peak, done = _timed(
        lambda: near_duplicates(
            made.store, made.identity, made.blocks, priority, cosine=setting.cosine, recall=setting.recall,
            memory=setting.memory, folder=Path(setting.folder),
        )
    )  # fmt: skip
    found: NearDuplicates = done
    if made.copies is None:
        pairs, at, all_found = _brute_force(setting, made, found.leaders)
    else:
        assert made.cosines is not None
        pairs, at, all_found = _known(setting, made.copies, made.cosines, found.leaders)
    bands = found.bands
    return seconds, peak, {
        "cosine": setting.cosine,
        "recall asked": setting.recall,
        "bits × bands": f"{bands.bits} × {bands.bands}" if bands else "",
        "true pairs": pairs,
        "found at the cosine": at,
        "found of all": all_found,
        "removed": found.removed,
        "candidates": found.candidates,
        "candidates per pair": found.candidates / max(1, pairs),
        "cosines computed": found.compared,
        "pairs/s": made.rows * (made.rows - 1) / 2 / seconds,
    }  # fmt: skip


def _known(setting: Setting, copies: npt.NDArray[np.int64], cosines: npt.NDArray[np.float64],
           leaders: npt.NDArray[np.int64]) -> tuple[int, float, float]:  # fmt: skip
    """Pairs that were planted, and the parts of them that were found: at the cosine, and of all."""
    hit = (leaders[copies[:, 0]] == copies[:, 1]) | (leaders[copies[:, 1]] == copies[:, 0])
    return len(hit), float(hit[cosines < setting.cosine + 1e-3].mean()), float(hit.mean())


def _brute_force(setting: Setting, made: Made, leaders: npt.NDArray[np.int64]) -> tuple[int, float, float]:
    """All pairs at the cosine, and rows that went as part of those that the exact greedy removal takes."""
    from rise_ops.index import iter_signatures, read_records

    records = read_records(made.store, made.identity, made.blocks).values()
    rows = np.concatenate([part for record in records for part in iter_signatures(made.store, made.identity, record)])
    wide = rows.astype(np.float32)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    wide /= np.where(lengths > 0, lengths, 1)
    near = wide @ wide.T >= setting.cosine
    np.fill_diagonal(near, False)
    left, gone = np.ones(len(rows), np.bool_), np.zeros(len(rows), np.bool_)
    for row in np.argsort(np.random.default_rng(0).permutation(len(rows))):
        left[row] = False
        if not gone[row]:
            gone |= near[row] & left
    return int(near.sum()) // 2, float("nan"), float((leaders >= 0).sum() / max(1, gone.sum()))


def _diversity(setting: Setting, made: Made) -> tuple[float, int, dict[str, Any]]:
    from rise_ops.diversity import k_center_order, plan_k_center

    candidates = np.random.default_rng(0).permutation(made.rows)
    count = int(setting.share * made.rows)
    plan = plan_k_center(len(candidates), count, dim=made.dim)
    seconds, peak, _ = _timed(
        lambda: k_center_order(
            made.store, made.identity, made.blocks, candidates, count, memory=setting.memory,
            folder=Path(setting.folder),
        )
    )  # fmt: skip
    rate = 2 * plan.greedy * made.rows * plan.width / seconds / 1e9
    return seconds, peak, {"picked": count, "greedily": plan.greedy, "compared width": plan.width, "GFLOP/s": rate}


def _made_up(setting: Setting) -> Made:
    """What `_fill` makes, without its signatures."""
    blocks, pairs, cosines = [], [], []
    for start in range(0, setting.rows, _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, setting.rows - start)
        copies = min(rows // 2, int(setting.share * rows)) if setting.work != "diversity" else 0
        random = np.random.default_rng(start)
        least = setting.cosine + 2e-4  # or rounding to 16 bits would take some below
        cosines += [least if copy % 2 else random.uniform(least, 1) for copy in range(copies)]
        pairs += [(start + rows - 1 - copy, start + copy) for copy in range(copies)]
        blocks.append(f"{start:064x}")
    made = np.array(pairs, np.int64).reshape(-1, 2)
    store = Store(f"{setting.folder}/store")
    return Made(store, INDEX, blocks, setting.rows, setting.dim, made, np.array(cosines))


def _fill(setting: Setting) -> dict[str, Any]:
    """Write the signatures, in a process of its own: what it leaves in memory would count."""
    from rise_ops.index import write_block
    from rise_ops.signatures import RowSignatures

    made = _made_up(setting)
    assert made.copies is not None and made.cosines is not None
    for block in made.blocks:
        start = int(block, 16)
        rows = min(_BLOCK_ROWS, setting.rows - start)
        signatures = strangers(rows, setting.dim, common=setting.common, seed=start)
        for (copy, original), cosine in zip(made.copies.tolist(), made.cosines.tolist(), strict=True):
            if start <= copy < start + rows:
                signatures[copy - start] = at_cosine(signatures[original - start], cosine, seed=original)
        ones = np.ones(rows, np.int32)
        signed = RowSignatures(signatures.astype(np.float16), ones, ones)
        write_block(made.store, INDEX, block, signed, seconds=0.0, producer={})
    return {}


def _real(path: str) -> Made:
    from rise_ops.config import load_config
    from rise_ops.index import read_records
    from rise_ops.session import open_indexed

    config = load_config(path)
    store = Store(config.store)
    indexed = open_indexed(store, config)
    records = list(read_records(store, indexed.index_id, indexed.blocks).values())
    return Made(store, indexed.index_id, list(indexed.blocks), sum(record.rows for record in records), records[0].dim)


if __name__ == "__main__":
    main()
