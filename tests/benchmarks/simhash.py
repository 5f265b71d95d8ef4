"""SimHash codes: what they find of what the float index finds, and how fast they are searched.

    python -m tests.benchmarks.simhash recall [--config CURATION.yaml] [--bits 1024 8192] [--rows 20000] [--dim 24576]
    python -m tests.benchmarks.simhash rate [--rows 1000000] [--bits 8192] [--queries 1 10 100] [--threads 2]
    python -m tests.benchmarks.simhash exact [--rows 8192] [--dim 24576] [--queries 1 10 100] [--threads 2]

`recall`: of the k rows of highest score that an exact search finds for a query, the part that a search over codes
finds, averaged over queries; with rows scored anew from the index (`rescore`) and without. With `--config` the corpus,
index and targets are a curation's, whose store gets the codes; otherwise signatures are made up: some of their
directions are shared, so that some rows are near each query.

`rate`: rows per second of a search over random codes on disk (in the page cache), and of its arithmetic alone over
codes in memory; beside it, in turn with it, a float32 product with the same codes as signs, unpacked before or on the
way, and counting bits for queries of one bit a coordinate. Medians of `--repeat`.

`exact`: rows per second of the exact search beside a scan that keeps float32 scores in order of position.

Each prints a Markdown table. Made-up data goes to `--folder`: 1 GiB for 1,000,000 codes, 48 KiB a signature.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.checksums import crc32c
from rise_ops.code_search import CodeScorer, search_codes
from rise_ops.codes import FORMAT_VERSION, codes_folder, missing_codes, open_simhash, write_codes
from rise_ops.config import SimHashConfig, load_config
from rise_ops.index import write_block
from rise_ops.scan import Extremes, score_blocks
from rise_ops.search import search
from rise_ops.session import block_rows, open_indexed, open_target
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from rise_ops.tuning import settled

INDEX = "0" * 64
_BLOCK_ROWS = 4_096
_TILE = 1_024
_DEPTHS = (10, 50)
_RESCORE = (0, 1, 2, 4, 8)
_SHARED = 20
_POPCOUNT_QUERIES = 10

Float32Array = npt.NDArray[np.float32]
Table = list[dict[str, Any]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recall", "rate", "exact"])
    parser.add_argument("--config", help="an indexed curation")
    parser.add_argument("--set", action="append", default=[], help="key=value, changes its configuration")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--dim", type=int, default=24_576)
    parser.add_argument("--bits", type=int, nargs="+", default=[8_192])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        table = {"recall": _recall, "rate": _rate, "exact": _exact}[options.what](options, Store(folder))
    sys.stdout.write(f"{platform.platform()}, {os.cpu_count()} cores, {options.threads} threads, PyTorch "
                     f"{torch.__version__}\n\n| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}\n")  # fmt: skip
    for row in table:
        cells = [f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
                 for value in row.values()]  # fmt: skip
        sys.stdout.write(f"| {' | '.join(cells)} |\n")


def _recall(options: argparse.Namespace, scratch: Store) -> Table:
    sets: list[tuple[str, Store, str, list[str], Float32Array]] = []
    if options.config:
        config = load_config(options.config, overrides=options.set)
        store = Store(config.store)
        config = settled(store, config)
        indexed = open_indexed(store, config)
        for name in config.targets:
            target = open_target(store, config, indexed.index_id, name)
            sets.append((name, store, indexed.index_id, list(indexed.blocks), target.signature))
        rows_of = block_rows(store, indexed.version)
    else:
        rows_of = _fill(scratch, options.rows or 20_000, options.dim)
        sets.append(("made up", scratch, INDEX, list(rows_of), _unit(100, options.dim, seed=1)))
    table = []
    for name, store, identity, blocks, queries in sets:
        exact = search(store, identity, blocks, queries, k=max(_DEPTHS))[0].rows
        for bits in options.bits:
            codes = SimHashConfig(bits=bits)
            missing = missing_codes(store, identity, rows_of, codes)
            write_codes(store, identity, missing, codes, dim=queries.shape[1])
            for rescore in _RESCORE:
                row: dict[str, Any] = {"target": name, "rows": sum(rows_of.values()), "queries": len(queries)}
                row |= {"bits": bits, "bytes a row": bits // 8, "of the index": f"1/{16 * queries.shape[1] / bits:.0f}"}
                row["rescore"] = rescore
                for depth in _DEPTHS:
                    found = search_codes(store, identity, blocks, queries, codes, k=depth, rescore=rescore)[0].rows
                    row[f"recall@{depth}"] = _overlap(found, exact[:, :depth])
                table.append(row)
    return table


def _overlap(found: npt.NDArray[np.int64], exact: npt.NDArray[np.int64]) -> float:
    parts = [len(set(one) & set(other)) / len(other) for one, other in zip(found.tolist(), exact.tolist(), strict=True)]
    return statistics.fmean(parts)


def _rate(options: argparse.Namespace, store: Store) -> Table:
    rows, config, dim = options.rows or 1_000_000, SimHashConfig(bits=options.bits[0]), 64
    rows_of = _fill(store, rows, dim)
    codes = np.concatenate(list(_random_codes(store, rows_of, config, dim)))
    table: Table = []
    for count in options.queries:
        queries = _unit(count, dim, seed=2)
        projected = open_simhash(store, INDEX, config, dim=dim).project(queries)
        signs = torch.from_numpy(projected).t().contiguous()
        find = partial(search_codes, store, INDEX, list(rows_of), queries, config, k=10)
        ways: dict[str, Callable[[], Any]] = {
            "search on disk, top 10": partial(find, rescore=0),
            "search on disk, rescored": find,
            "int8 product": partial(_each, codes, CodeScorer(projected).score),
            "float32 product": partial(_plain, codes, signs, unpack=False),
            "float32 product, unpacked on the way": partial(_plain, codes, signs, unpack=True),
        }
        if count <= _POPCOUNT_QUERIES:
            ways["popcount, queries of one bit"] = partial(_counted, codes, np.packbits(projected > 0, axis=1))
        seconds = _in_turn(ways, options.repeat)
        plain = seconds["float32 product"]
        table += [
            {"queries": count, "codes": rows, "bits": config.bits, "way": way, "s": took, "rows/s": rows / took,
             "times the float32 product": plain / took}
            for way, took in seconds.items()
        ]  # fmt: skip
    return table


def _exact(options: argparse.Namespace, store: Store) -> Table:
    rows_of = _fill(store, options.rows or 8_192, options.dim)
    rows, blocks = sum(rows_of.values()), list(rows_of)
    table: Table = []
    for count in options.queries:
        queries = _unit(count, options.dim, seed=1)

        def scan(queries: Float32Array = queries) -> None:
            for _ in score_blocks(store, INDEX, blocks, queries, extremes=Extremes(10)):
                pass

        ways: dict[str, Callable[[], Any]] = {
            "float32 scores in order of position": scan,
            "exact search": partial(search, store, INDEX, blocks, queries, k=10, k_bottom=10),
        }
        seconds = _in_turn(ways, options.repeat)
        table += [{"queries": count, "rows": rows, "dim": options.dim, "way": way, "s": took, "rows/s": rows / took}
                  for way, took in seconds.items()]  # fmt: skip
    return table


def _in_turn(ways: dict[str, Callable[[], Any]], repeat: int) -> dict[str, float]:
    """Median seconds of each, taken in turn, so that what else the machine does meets all alike."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, work in ways.items():
            started = time.perf_counter()
            work()
            seconds[way].append(time.perf_counter() - started)
    return {way: statistics.median(each) for way, each in seconds.items()}


def _each(codes: npt.NDArray[np.uint8], work: Callable[[npt.NDArray[np.uint8]], Any]) -> None:
    for tile in _tiles(codes):
        work(tile)


def _plain(codes: npt.NDArray[np.uint8], queries: torch.Tensor, *, unpack: bool) -> None:
    """float32 products; without unpacking, always of the same signs: all of them would take 32 KiB a row."""
    ready = torch.from_numpy(_signs(codes[:_TILE]))
    for tile in _tiles(codes):
        torch.mm(torch.from_numpy(_signs(tile)) if unpack else ready[: len(tile)], queries)


def _counted(codes: npt.NDArray[np.uint8], queries: npt.NDArray[np.uint8]) -> None:
    for tile in _tiles(codes):
        for query in queries.view(np.uint64):
            np.bitwise_count(tile.view(np.uint64) ^ query).sum(axis=1, dtype=np.int32)


def _tiles(codes: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
    return (codes[start : start + _TILE] for start in range(0, len(codes), _TILE))


def _signs(codes: npt.NDArray[np.uint8]) -> Float32Array:
    return np.unpackbits(codes, axis=1).astype(np.float32) * 2 - 1


def _unit(rows: int, dim: int, *, seed: Any) -> Float32Array:
    """Rows of unit length with a third of their square in a few directions that all share."""
    random = np.random.default_rng(seed)
    shared = np.random.default_rng(4_711).standard_normal((_SHARED, dim), np.float32) / np.sqrt(np.float32(dim))
    own = random.standard_normal((rows, dim), np.float32) / np.sqrt(np.float32(dim))
    own += random.standard_normal((rows, _SHARED), np.float32) @ shared / np.sqrt(np.float32(2 * _SHARED))
    return np.asarray(own / np.linalg.norm(own, axis=1, keepdims=True), np.float32)


def _fill(store: Store, rows: int, dim: int) -> dict[str, int]:
    """Blocks of made-up signatures; their rows by id."""
    rows_of = {f"{start:064x}": min(_BLOCK_ROWS, rows - start) for start in range(0, rows, _BLOCK_ROWS)}
    for block, count in rows_of.items():
        ones = np.ones(count, np.int32)
        signatures = RowSignatures(_unit(count, dim, seed=[3, int(block, 16)]).astype(np.float16), ones, ones)
        write_block(store, INDEX, block, signatures, seconds=0.0, producer={})
    return rows_of


def _random_codes(store: Store, rows_of: dict[str, int], config: SimHashConfig, dim: int,
                  ) -> Iterator[npt.NDArray[np.uint8]]:  # fmt: skip
    """Random codes of blocks in the store: making real ones of a million rows would take minutes."""
    rotation = open_simhash(store, INDEX, config, dim=dim).identity
    folder, random = codes_folder(INDEX, config), np.random.default_rng(0)
    for block, rows in rows_of.items():
        codes = random.integers(0, 256, (rows, config.bits // 8), np.uint8)
        data = codes.tobytes()
        store.create(f"{folder}/{block}.bin", data)
        record = {"block_id": block, "rows": rows, "simhash": rotation, "crc32c": crc32c(memoryview(data))}
        store.create_json(f"{folder}/{block}.json", {"format_version": FORMAT_VERSION, **record})
        yield codes


if __name__ == "__main__":
    main()
