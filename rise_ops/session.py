"""What is open for a configuration: its corpus version, its index, its model.

The model is loaded at most once per process, and only when something has to be computed with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from rise_ops.config import CurationConfig, FieldMap, ModelConfig, SketchConfig, TargetConfig, resolve_path
from rise_ops.corpus import CorpusVersion, current_version, read_snapshot, read_version, version_numbers
from rise_ops.errors import ConfigError, ModelError, SourceError
from rise_ops.index import index_id, list_indexed, read_index, tables_key
from rise_ops.memory import StageMemory, sketch_memory, stage_memory, task_limits
from rise_ops.model_files import model_fingerprint
from rise_ops.rows import CanonicalRow, RowFault, canonical_row
from rise_ops.store import Store
from rise_ops.targets import Target, read_queries, read_target, sign_queries, sign_target, target_id
from rise_ops.uncertainty import NOISE_QUERIES

if TYPE_CHECKING:
    from rise_ops.signatures import Signer

_logger = logging.getLogger(__name__)
_SIGNER_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class IndexedCorpus:
    """A corpus version whose rows are all in an index."""

    version: CorpusVersion
    index_id: str
    blocks: tuple[str, ...]
    """In the corpus' order: by source, then by row; each block once."""


def open_signer(store: Store, config: CurationConfig) -> Signer:
    """The configured model with its sketch, ready to compute signatures; loaded once per process.

    Raises
    ------
    ModelError
        The model cannot be loaded or fails its probe.
    LimitError
        `limits.memory` is too small for the model or the sketch.
    """
    with _SIGNER_LOCK:
        memory, tasks = int(task_limits(config).memory), config.runner.workers
        plan, rest = sketch_memory(memory, dim=config.sketch.dim, tasks=tasks)
        return _signer(store.uri, config.model, config.sketch, rest, plan.text)


@lru_cache(2)
def _signer(uri: str, model: ModelConfig, sketch: SketchConfig, memory: int, plan: str) -> Signer:
    from rise_ops.sign_memory import plan_ahead
    from rise_ops.signatures import Signer, load_tables
    from rise_ops.trunk import load_trunk

    ahead = plan_ahead(model, sketch, memory=memory)
    _logger.info("%s; %s", plan, ahead.text)  # before the model is loaded, and once, not for every block
    store = Store(uri)
    trunk = load_trunk(model, ahead.peak_bytes - ahead.weight_bytes)
    identity = index_id(trunk.fingerprint, sketch)
    # an index keeps its tables: PyTorch does not promise its random streams across releases
    found = store.exists(tables_key(identity))
    tables = load_tables(store, f"indexes/{identity}/tables.zarr") if found else None
    return Signer(trunk, sketch, tables=tables, memory=memory)


def plan_stages(config: CurationConfig, *, rows: int = 0) -> dict[str, StageMemory]:
    """How the stages of a run will spend `limits.memory`; reads the queries, to count them.

    Raises
    ------
    LimitError
        A stage cannot work within it.
    SourceError
        The queries cannot be read.
    """
    queries = sum(len(read_queries(target, limits=config.limits)) for target in config.targets.values())
    if config.aggregate != "rrf":
        queries += NOISE_QUERIES * len(config.targets)
    return stage_memory(config, rows=rows, queries=queries)


def open_corpus(store: Store, config: CurationConfig, *, number: int | None = None) -> CorpusVersion:
    """A version of the configured corpus; the current one where none is named.

    Raises
    ------
    SourceError
        Nothing was ingested yet.
    ConfigError
        The corpus has no such version.
    """
    if number is not None:
        there = version_numbers(store, config.corpus.name)
        if there and number not in there:
            raise ConfigError(f"corpus {config.corpus.name} has no version {number}; it has {there[0]} to {there[-1]}")
        if there:
            return read_version(store, config.corpus.name, number)
    version = current_version(store, config.corpus.name)
    if version is None:
        raise SourceError(f"{store.uri} has no corpus {config.corpus.name}; run `curate ingest` or `curate run` first")
    return version


def open_indexed(store: Store, config: CurationConfig, *, version: int | None = None) -> IndexedCorpus:
    """A version of the corpus, by default the current one, checked to be wholly in the configured index.

    Raises
    ------
    SourceError, ModelError
        Nothing was ingested, there is no such index, or it lacks blocks.
    """
    found = open_corpus(store, config, number=version)
    identity = index_id(model_fingerprint(config.model), config.sketch)
    read_index(store, identity, model=config.model)
    rows_of = block_rows(store, found)
    missing = len(rows_of) - len(list_indexed(store, identity, rows_of, dim=config.sketch.dim))
    if missing:
        raise ModelError(
            f"{missing} of {len(rows_of)} blocks of corpus {found.corpus} are not in index {identity[:12]}; "
            "run `curate index`"
        )
    return IndexedCorpus(found, identity, tuple(rows_of))


def block_rows(store: Store, version: CorpusVersion) -> dict[str, int]:
    """Rows of each block of a version, once each, in the corpus' order: by source, then by row."""
    rows = dict(read_snapshot(store, version.snapshot_id).select("block_id", "rows").iter_rows())
    return {block_id: rows[block_id] for entry in version.sources for block_id in entry.blocks}


def open_target(store: Store, config: CurationConfig, identity: str, name: str) -> Target:
    """A configured target with its signatures, computed and stored now if the store has none."""
    rows = read_queries(config.targets[name], limits=config.limits)
    found = target_id(identity, rows)
    if not store.exists(f"targets/{found}.json"):
        found = sign_target(store, identity, rows, signer=open_signer(store, config))
    return read_target(store, found)


def open_queries(store: Store, config: CurationConfig, identity: str, rows: Sequence[CanonicalRow]) -> Target:
    """Queries with their signatures, from the store if it has them; nothing is written."""
    found = target_id(identity, rows)
    if store.exists(f"targets/{found}.json"):
        return read_target(store, found)
    return sign_queries(rows, signer=open_signer(store, config), name=found)


def ad_hoc_queries(config: CurationConfig, *, queries: str | None, text: str | None, prompt: str | None,
                   ) -> list[CanonicalRow]:  # fmt: skip
    """Queries as the command line gives them: a file, or one text with or without its prompt.

    Raises
    ------
    ConfigError
        Not exactly one of `queries` and `text`, or a prompt without a text.
    """
    if (queries is None) == (text is None):
        raise ConfigError("give either --queries FILE or --text TEXT")
    if queries is not None:
        if prompt is not None:
            raise ConfigError("cannot use --prompt without --text; rows of a file carry their own prompts")
        place = resolve_path(queries, Path.cwd())
        return read_queries(TargetConfig(queries=place), limits=config.limits)
    fields = FieldMap(text="text", prompt=None if prompt is None else "prompt")
    columns = {"text": text} if prompt is None else {"text": text, "prompt": prompt}
    try:
        return [canonical_row(columns, fields=fields, row_bytes=int(config.limits.row_bytes))]
    except RowFault as fault:
        raise ConfigError(f"--text {fault.reason}") from None
