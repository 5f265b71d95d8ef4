"""An indexed corpus without a model: real rows in the store, random unit signatures in the index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops import valuation
from rise_ops.config import CorpusConfig, SketchConfig
from rise_ops.corpus import CorpusVersion, read_block
from rise_ops.hashing import canonical_json, fingerprint
from rise_ops.index import checksums, write_block, write_signatures
from rise_ops.parts import Part, part_of
from rise_ops.session import block_rows
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from rise_ops.targets import FORMAT_VERSION, Target
from rise_ops.valuation import Aggregate
from tests.corpora import corpus_of, ingest_all, write_as

INDEX = "1" * 64
DIM = 32
SKETCH = SketchConfig(dim_r=4, dim_h=4, dim_g=4)
"""Whose signatures have this length."""

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Indexed:
    """A corpus whose blocks are all in index INDEX."""

    store: Store
    version: CorpusVersion
    blocks: list[str]
    signatures: dict[str, RowSignatures]
    """By block."""

    @property
    def matrix(self) -> Float32Array:
        """All signatures, in the corpus' order of blocks."""
        return np.concatenate([self.signatures[block].signature for block in self.blocks]).astype(np.float32)

    @property
    def chunks(self) -> npt.NDArray[np.int32]:
        """Chunks of all rows, in the same order."""
        return np.concatenate([self.signatures[block].chunks for block in self.blocks])

    @property
    def rows(self) -> pl.DataFrame:
        """All rows, in the same order, with `block` and `block_row`."""
        frames = [
            read_block(self.store, block).with_columns(block=pl.lit(place, pl.UInt32)).with_row_index("block_row")
            for place, block in enumerate(self.blocks)
        ]
        return pl.concat(frames)


def unit(rows: int, dim: int = DIM, *, seed: int = 0) -> Float32Array:
    """Random rows of unit length."""
    drawn = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), dtype=np.float32)


def signed(rows: int, dim: int = DIM, *, seed: int = 0, silent: Sequence[int] = ()) -> RowSignatures:
    """Signatures of a block; rows in `silent` are too short to have one."""
    signature = unit(rows, dim, seed=seed).astype(np.float16)
    tokens = np.random.default_rng(seed).integers(2, 50, rows).astype(np.int32)
    chunks = np.ones(rows, dtype=np.int32)
    for row in silent:
        signature[row], tokens[row], chunks[row] = 0, 1, 0
    return RowSignatures(signature, tokens, chunks)


def index_corpus(store: Store, corpus: CorpusConfig, *, silent: int = 0, dim: int = DIM) -> Indexed:
    """Ingest a corpus and index it; the first `silent` rows of each block have no signature."""
    version = ingest_all(store, corpus)
    rows_of = block_rows(store, version)
    signatures = {
        block: signed(rows, dim, seed=int(block[:8], 16), silent=range(silent)) for block, rows in rows_of.items()
    }
    for block, signature in signatures.items():
        write_block(store, INDEX, block, signature, seconds=0.0, producer={})
    return Indexed(store, version, list(rows_of), signatures)


def index_rows(store: Store, folder: Path, files: Mapping[str, Sequence[Mapping[str, Any]]], *, silent: int = 0,
               ) -> Indexed:  # fmt: skip
    """The same for rows by file name."""
    for name, rows in files.items():
        write_as(folder / name, rows)
    return index_corpus(store, corpus_of(*(folder / name for name in files)), silent=silent)


def make_target(queries: int, *, seed: int = 1, dim: int = DIM, columns: Sequence[Mapping[str, Any]] | None = None,
                ) -> Target:  # fmt: skip
    """A target with random queries; `columns`: the original columns of each."""
    meta = [canonical_json(row) for row in columns] if columns else ["{}"] * queries
    frame = pl.DataFrame(
        {
            "doc_id": [fingerprint([seed, query]) for query in range(queries)],
            "text": [f"query {query}" for query in range(queries)],
            "prompt": pl.Series([None] * queries, dtype=pl.String),
            "meta": meta,
        }
    )
    return Target(fingerprint(seed), frame, unit(queries, dim, seed=seed))


def _layout(dim: int) -> SketchConfig:
    """Some sketch whose signatures have this length."""
    return SKETCH if dim == DIM else SketchConfig(channels=("rh",), dim_r=dim, dim_h=1)


def score_parts(indexed: Indexed, targets: Mapping[str, Target], *, aggregate: Aggregate = "mean", run_id: str = "run",
                size: int = 1) -> list[Part]:  # fmt: skip
    """Score all blocks, `size` of them a part, as the valuation `run_id`."""
    firsts = range(0, len(indexed.blocks), size)
    parts = [part_of(fingerprint(run_id), indexed.blocks[first : first + size], first) for first in firsts]
    valuation.score_parts(indexed.store, INDEX, parts, targets=targets, aggregate=aggregate,
                          sketch=_layout(next(iter(targets.values())).signature.shape[1]), memory=2**30)  # fmt: skip
    return parts


def store_target(store: Store, target: Target) -> str:
    """Put a target into the store as `sign_target` does; returns its id."""
    name = target.target_id
    rows = len(target.queries)
    counts = np.ones(rows, dtype=np.int32)
    signatures = RowSignatures(target.signature.astype(np.float16), counts, counts)
    write_signatures(store, f"targets/{name}.zarr", signatures)
    buffer = BytesIO()
    target.queries.write_parquet(buffer)
    store.create(f"targets/{name}.parquet", buffer.getvalue())
    record = {"format_version": FORMAT_VERSION, "crc32c": checksums(store, f"targets/{name}.zarr")}
    store.create_json(f"targets/{name}.json", record)
    return name
