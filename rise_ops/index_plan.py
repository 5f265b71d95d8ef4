"""What an index lacks of a corpus version: blocks to fill, rows to copy, rows to compute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from rise_ops.blocks import read_doc_ids
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, parent_version
from rise_ops.index import IndexListing, index_id, index_key, tables_key
from rise_ops.model_files import model_fingerprint
from rise_ops.reuse import candidate_blocks, find_rows, write_reuse
from rise_ops.session import block_rows
from rise_ops.store import Store


@dataclass(frozen=True, slots=True)
class IndexWork:
    """The plan of one index stage."""

    index_id: str
    model_fingerprint: str
    blocks: list[str]
    """All blocks of the corpus version, in its order."""
    rows: list[int]
    """Rows of each."""
    missing: list[str]
    """Blocks that the index lacks, in the same order."""
    missing_rows: list[int]
    """Rows of each."""
    reuse: dict[str, str]
    """By block, where it is stored which of its rows can be copied (`rise_ops.reuse`)."""
    rows_to_sketch: int
    """Rows that stand nowhere in the index."""
    is_described: bool
    """Whether the index has its description and its tables."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def plan_work(store: Store, config: CurationConfig, version: CorpusVersion, *, run_id: str) -> IndexWork:
    """Compare a corpus version with the index; the rows found in other blocks are stored with the run.

    Raises
    ------
    ModelError, IntegrityError, StoreError, TransientError
    """
    model = model_fingerprint(config.model)
    identity = index_id(model, config.sketch)
    rows_of = block_rows(store, version)
    described = store.exists(index_key(identity)) and store.exists(tables_key(identity))
    earlier = parent_version(store, version)
    missing, matches = find_missing(
        store, config, identity, rows_of, earlier=earlier, doc_ids=lambda block: read_doc_ids(store, block)
    )
    keys, found = write_reuse(store, run_id, matches if described else ())
    return IndexWork(
        index_id=identity,
        model_fingerprint=model,
        blocks=list(rows_of),
        rows=list(rows_of.values()),
        missing=list(missing),
        missing_rows=list(missing.values()),
        reuse=keys,
        rows_to_sketch=sum(missing.values()) - found,
        is_described=described,
    )


def find_missing(
    store: Store,
    config: CurationConfig,
    identity: str,
    rows_of: Mapping[str, int],
    *,
    earlier: CorpusVersion | None,
    doc_ids: Callable[[str], pl.Series],
) -> tuple[dict[str, int], Iterator[pl.DataFrame]]:
    """Blocks of `rows_of` that an index lacks, with their rows, and which of these rows it has all the same.

    Parameters
    ----------
    rows_of
        Rows of each block of the corpus.
    earlier
        The corpus version before.
    doc_ids
        Reads the doc_ids of a block.
    """
    listing = IndexListing(store, identity)
    dim = config.sketch.dim
    there = listing.complete(rows_of, dim=dim)
    missing = {block: rows for block, rows in rows_of.items() if block not in there}
    if not missing:
        return {}, iter(())
    kept = {
        block: pl.Series(listing.kept_rows(block, rows, dim=dim), dtype=pl.UInt32) for block, rows in missing.items()
    }
    recorded = [block for block in listing.recorded if block not in missing]
    candidates = candidate_blocks(store, recorded, rows_of, earlier=earlier)
    wanted = ((block, doc_ids(block)) for block in missing)
    return missing, find_rows(store, wanted, candidates, memory=int(config.limits.memory), kept=kept)
