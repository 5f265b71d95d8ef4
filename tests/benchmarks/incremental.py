"""What small changes of a corpus cost, beside a full run: objects read, rows sketched, blocks written, seconds.

    python -m tests.benchmarks.incremental [--pool FILE ...] [--model DIR] [--rows 21000] [--objects 50] [--s3]

A corpus of many objects is curated, changed in one way after the other, and curated again each time, by the
command line as a user would. At the end the last state is curated from nothing, and every signature of the
incremental index is compared with its twin. Prints one Markdown table and the smallest cosine.

Without `--pool` (JSON lines with known row shapes) the rows are made of random words. Long rows are cut into
pieces of 40 words, so that a run on two cores takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import yaml

from rise_ops.blocks import read_block
from rise_ops.config import FieldMap, LimitsConfig
from rise_ops.corpus import current_version, read_rows
from rise_ops.demo.corpus import MODEL_FOLDER
from rise_ops.index import iter_signatures, read_record
from rise_ops.session import block_rows
from rise_ops.store import Store
from tests import servers
from tests.corpora import make_rows

Row = dict[str, Any]
_WORDS = 40


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, nargs="*", default=[])
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--rows", type=int, default=21_000)
    parser.add_argument("--objects", type=int, default=50)
    parser.add_argument("--s3", action="store_true", help="sources and store in a bucket of a server on loopback")
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="incremental-")))
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        place = Place(folder, stack, s3=options.s3)
        objects = _objects(list(_rows(options.pool, options.rows)), options.objects)
        bench = Bench(place, folder, objects, model=options.model.resolve())
        bench.measure("full run", lambda: None)
        for name, change in _changes(objects).items():
            bench.measure(name, change)
        bench.measure("full run of the last state", lambda: None, store="again")
        _print(bench, place)


class Place:
    """Where sources and stores are: a folder, or a bucket of a server that is started for it."""

    def __init__(self, folder: Path, stack: ExitStack, *, s3: bool) -> None:
        self.root = str(folder / "data")
        self.files: Any = fsspec.filesystem("file", auto_mkdir=True)
        if s3:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-")))
            os.environ |= stack.enter_context(servers.running(servers.available()[0], home)).environment
            self.root = "s3://bench"
            self.files = fsspec.filesystem("s3", use_listings_cache=False)
            self.files.mkdir("bench")

    def url(self, name: str) -> str:
        """Where a source object is."""
        return f"{self.root}/raw/{name}"


class Bench:
    """The corpus as it changes, and what each run said."""

    def __init__(self, place: Place, folder: Path, objects: dict[str, list[Row]], *, model: Path) -> None:
        self.place = place
        self.objects = objects
        self.results: list[tuple[str, Mapping[str, Any]]] = []
        self._folder = folder
        self._written: dict[str, list[Row]] = {}
        first = next(iter(objects.values()))
        queries = folder / "queries.jsonl"
        queries.write_bytes(_lines(first[:20]))
        self._config: Row = {
            "corpus": {"name": "bench", "sources": [f"{place.root}/raw/*.jsonl"]},
            "model": {"name": str(model), "device": "cpu"},
            "sketch": {"temperature": 1.0},
            "targets": {"good": {"queries": str(queries)}},
            "selection": {"keep": {"fraction": 0.5}},
        }

    def store(self, name: str = "store") -> Store:
        """The store of that name."""
        return Store(f"{self.place.root}/{name}")

    def measure(self, name: str, change: Callable[[], None], *, store: str = "store") -> None:
        """Change the sources, run, remember the figures."""
        change()
        self._synchronise()
        path = self._folder / "bench.yaml"
        path.write_text(yaml.safe_dump({**self._config, "store": self.store(store).uri}), encoding="utf-8")
        summary = _curate("run", str(path))
        record = _curate("lineage", self.store(store).uri, str(summary["run_id"]))
        self.results.append((name, {**summary, **record["counts"]}))
        sys.stderr.write(f"{name}: {summary['seconds']:.1f} s\n")

    def _synchronise(self) -> None:
        """Bring the place to the state of `objects`, touching nothing that is the same."""
        files, url = self.place.files, self.place.url
        gone = {name: rows for name, rows in self._written.items() if name not in self.objects}
        for name, rows in self.objects.items():
            moved = next((old for old, held in gone.items() if held == rows), None)
            if moved is not None:
                files.mv(url(moved), url(name))
                del gone[moved]
            elif self._written.get(name) != rows:
                files.pipe_file(url(name), _lines(rows))
        for name in gone:
            files.rm_file(url(name))
        self._written = {name: list(rows) for name, rows in self.objects.items()}


def _changes(objects: dict[str, list[Row]]) -> dict[str, Callable[[], None]]:
    names = list(objects)
    total = sum(map(len, objects.values()))

    def renamed() -> None:
        objects["renamed.jsonl"] = objects.pop(names[30])

    def removed() -> None:
        del objects[names[40]]

    def deleted() -> None:
        del objects[names[5]][7]

    appended = [{"text": f"An appended row, number {number}, like no other."} for number in range(total // 100)]
    middle = objects[names[10]]
    return {
        "nothing": lambda: None,
        "1 row changed": lambda: middle.__setitem__(len(middle) // 2, {"text": "A corrected row."}),
        "1 % appended to one object": lambda: objects[names[20]].extend(appended),
        "1 row inserted at the top": lambda: objects[names[0]].insert(0, {"text": "A row that was inserted."}),
        "1 row deleted": deleted,
        "1 object renamed": renamed,
        "1 object removed": removed,
    }


def _rows(pools: Sequence[Path], count: int) -> Iterator[Row]:
    """Distinct short rows, in an order that a seed decides."""
    if not pools:
        yield from make_rows(count, words=_WORDS // 2)
        return
    pieces: dict[str, None] = {}
    for pool in pools:
        for row in read_rows(str(pool), FieldMap(), LimitsConfig()):
            words = row.text.split()
            pieces |= {" ".join(words[start : start + _WORDS]): None for start in range(0, len(words), _WORDS)}
    chosen = [{"text": piece} for piece in pieces if " " in piece]
    random.Random(0).shuffle(chosen)
    yield from chosen[:count]


def _objects(rows: list[Row], count: int) -> dict[str, list[Row]]:
    """Rows in objects of about the same size."""
    size = -(-len(rows) // count)
    return {f"part-{part:03d}.jsonl": rows[part * size : (part + 1) * size] for part in range(count)}


def _lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _curate(*arguments: str) -> dict[str, Any]:
    command = [shutil.which("curate", path=str(Path(sys.executable).parent)) or "curate", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _signatures(store: Store, index_id: str) -> dict[str, np.ndarray[Any, np.dtype[np.float16]]]:
    version = current_version(store, "bench")
    assert version is not None
    found: dict[str, np.ndarray[Any, np.dtype[np.float16]]] = {}
    for block in block_rows(store, version):
        signatures = np.concatenate(list(iter_signatures(store, index_id, read_record(store, index_id, block))))
        found |= dict(zip(read_block(store, block, ["doc_id"])["doc_id"].to_list(), signatures, strict=True))
    return found


def _smallest_cosine(bench: Bench) -> tuple[int, float]:
    index_id = str(bench.results[0][1]["index_id"])
    one, two = (_signatures(bench.store(name), index_id) for name in ("store", "again"))
    assert one.keys() == two.keys()
    cosines = (
        float(np.dot(left := one[name].astype(np.float32), right := two[name].astype(np.float32)))
        / float(np.linalg.norm(left) * np.linalg.norm(right))
        for name in one
    )
    return len(one), min(cosines)


def _print(bench: Bench, place: Place) -> None:
    write = sys.stdout.write
    write(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}, {place.root}\n\n")
    write("| change | objects read | rows new | rows sketched | rows copied | blocks written | seconds |\n")
    write("|---|---|---|---|---|---|---|\n")
    for name, found in bench.results:
        copied = found["rows_reused"]
        figures = (found[key] for key in ("objects_read", "rows_new", "rows_sketched"))
        cells = [*(f"{figure:,}" for figure in figures), f"{copied:,}", f"{found['blocks_written']:,}"]
        write(f"| {name} | {' | '.join(cells)} | {found['seconds']:.1f} |\n")
    rows, cosine = _smallest_cosine(bench)
    write(f"\n{rows:,} signatures, incremental against full: smallest cosine {cosine:.7f}\n")


if __name__ == "__main__":
    main()
