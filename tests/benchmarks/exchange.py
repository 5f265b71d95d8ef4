"""The round trip with the reference implementation's index format, beside computing the signatures anew.

    python -m tests.benchmarks.exchange DATA.jsonl MODEL [--rows 5000] [--temperature 1] [--folder DIR]

Indexes the first rows of a file with a model, exports the index, and imports it into a second store. Prints a Markdown
table: seconds, rows per second, MiB per second of vectors, the peak of resident memory so far, and whether all
signatures, tokens and chunks of the second store are those of the first, bit by bit.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from rise_ops.config import CurationConfig, parse_config
from rise_ops.exchange_import import import_reference_index
from rise_ops.exchange_read import open_reference_index
from rise_ops.exchange_write import export_reference_index
from rise_ops.index import index_id, iter_signatures, prepare_index, read_counts, read_record
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_corpus
from rise_ops.model_files import model_fingerprint
from rise_ops.session import block_rows, open_corpus, open_signer
from rise_ops.store import Store

T = TypeVar("T")


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where stores and index go; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        with options.data.open("rb") as lines:
            (folder / "pool.jsonl").write_bytes(b"".join(islice(lines, options.rows)))
        first, second = (_config(folder, name, options) for name in ("first", "second"))
        stores = Store(first.store), Store(second.store)
        for store, config in zip(stores, (first, second), strict=True):
            ingest_corpus(store, config, run_id="run")
        rows = open_corpus(stores[0], first).rows
        size = 2 * rows * first.sketch.dim
        sys.stdout.write("| step | seconds | rows/s | MiB/s | peak MiB |\n|---|---|---|---|---|\n")
        _timed("index", rows, size, lambda: _index(stores[0], first))
        out = folder / "index"
        _timed("export", rows, size, lambda: export_reference_index(stores[0], first, out))
        opened = _timed("open", rows, size, lambda: open_reference_index(out))
        _timed("verify", rows, size, opened.verify)
        _timed("import", rows, size, lambda: import_reference_index(stores[1], second, out))
        same = _same(stores, first)
        sys.stdout.write(f"\n{rows:,} rows of {first.sketch.dim:,}: {'every bit the same' if same else 'DIFFERENT'}\n")


def _config(folder: Path, store: str, options: argparse.Namespace) -> CurationConfig:
    document = {
        "store": store,
        "corpus": {"name": "pool", "sources": ["pool.jsonl"]},
        "model": {"name": str(options.model.resolve())},
        "sketch": {"temperature": options.temperature},
        "limits": {"bad_rows": 0.5},
    }
    return parse_config(document, base=folder)


def _index(store: Store, config: CurationConfig) -> None:
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    blocks = list(block_rows(store, open_corpus(store, config)))
    sketch_blocks(store, identity, blocks, dim=config.sketch.dim, signer=lambda: signer)


def _timed(name: str, rows: int, size: int, call: Callable[[], T]) -> T:
    began = time.perf_counter()
    found = call()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    sys.stdout.write(f"| {name} | {seconds:.2f} | {rows / seconds:,.0f} | {size / 2**20 / seconds:,.0f} | {peak:,} |\n")
    sys.stdout.flush()
    return found


def _same(stores: tuple[Store, Store], config: CurationConfig) -> bool:
    identity = index_id(model_fingerprint(config.model), config.sketch)
    for block in block_rows(stores[0], open_corpus(stores[0], config)):
        first, second = (read_record(store, identity, block) for store in stores)
        pieces = zip(
            iter_signatures(stores[0], identity, first), iter_signatures(stores[1], identity, second), strict=True
        )
        counts = zip(read_counts(stores[0], identity, first), read_counts(stores[1], identity, second), strict=True)
        if not all(np.array_equal(a.view(np.uint16), b.view(np.uint16)) for a, b in pieces):
            return False
        if not all(np.array_equal(a, b) for a, b in counts):
            return False
    return True


if __name__ == "__main__":
    main()
