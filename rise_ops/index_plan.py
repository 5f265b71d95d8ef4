"""What an index lacks of a corpus version: blocks to fill, rows to copy, rows to compute."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rise_ops.blocks import read_doc_ids
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, parent_version
from rise_ops.index import IndexListing, index_id, index_key
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
    reuse: str | None
    """Key of the rows that can be copied (`rise_ops.reuse`)."""
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
    listing = IndexListing(store, identity)
    there = listing.complete(rows_of, dim=config.sketch.dim)
    missing = {block: rows for block, rows in rows_of.items() if block not in there}
    recorded = [block for block in listing.recorded if block not in missing]
    found: dict[str, int] = {}
    key = None
    described = store.exists(index_key(identity))
    if missing and recorded and described:
        candidates = candidate_blocks(store, recorded, rows_of, earlier=parent_version(store, version))
        columns = ((block, read_doc_ids(store, block)) for block in missing)
        matches = find_rows(store, columns, candidates, memory=int(config.limits.memory))
        key, found = write_reuse(store, run_id, matches)
    return IndexWork(
        index_id=identity,
        model_fingerprint=model,
        blocks=list(rows_of),
        rows=list(rows_of.values()),
        missing=list(missing),
        missing_rows=list(missing.values()),
        reuse=key,
        rows_to_sketch=sum(missing.values()) - sum(found.values()),
        is_described=described,
    )
