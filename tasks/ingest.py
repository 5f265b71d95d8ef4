"""Tasks of ingestion: look at the sources, read what changed, publish the corpus version."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from rise_ops.config import CorpusConfig, LimitsConfig
from rise_ops.corpus import CorpusVersion, list_incomplete, look_at_sources, read_version
from rise_ops.diff import CorpusDiff, diff_versions
from rise_ops.errors import IntegrityError
from rise_ops.ingest import IngestedObject, ingest_object, is_held, publish
from rise_ops.memory import ingest_memory
from rise_ops.openlineage_datasets import source_columns
from rise_ops.rows import ingest_fingerprint
from rise_ops.sources import SourceObject
from rise_ops.store import Store
from tasks.assets import asset_of, materialised
from tasks.policy import S3, Call, Json, stage
from tasks.progress import stage_progress
from tasks.telling import telling

_logger = logging.getLogger(__name__)


def _identity(call: Any) -> Any:
    if call["fresh"] or any(item["etag"] is None and item["mtime"] is None for item in call["objects"]):
        return None  # to be read again, or nothing tells one state of such an object from another
    return [call["objects"], ingest_fingerprint(call["corpus"].fields, call["limits"])]


def are_held(call: Call, result: Json) -> bool:
    """Whether the store holds what a remembered result says of these objects."""
    store = Store(call["store_uri"])
    try:
        made = [IngestedObject.from_json(each) for each in result["objects"]]
        pairs = zip([SourceObject(**each) for each in call["objects"]], made, strict=True)
        return all(is_held(store, source, one, corpus=call["corpus"], limits=call["limits"]) for source, one in pairs)
    except (KeyError, TypeError, ValueError, AttributeError):  # it was made by another program
        return False


@stage("survey")
def survey(store_uri: str, corpus: CorpusConfig, limits: LimitsConfig, deep: bool, healed: bool) -> Json:
    """List the sources and compare them with the corpus' current version.

    Where the store was healed, objects of which something is missing now count as changed.
    """
    _logger.info("%s", ingest_memory(int(limits.memory)).text)
    store = Store(store_uri)
    version, diff = look_at_sources(store, corpus, limits)
    if version is not None and (healed or deep):
        diff = diff.reopened(list_incomplete(store, version))
    return {
        "parent": version.version if version else None,
        "read": [asdict(source) for source in diff.to_read(deep=deep)],
        "unchanged": [] if deep else [entry.uri for entry in diff.unchanged],
        "removed": [entry.uri for entry in diff.removed],
    }


@stage("ingest", key=_identity, tags=[S3])
def ingest_objects(
    store_uri: str, objects: list[Json], corpus: CorpusConfig, limits: LimitsConfig, deep: bool, fresh: bool
) -> Json:
    """Read source objects into canonical blocks; fresh: whatever Prefect remembers of them."""
    store = Store(store_uri)
    progress = stage_progress()
    done = 0
    results = []
    for each in objects:
        found = ingest_object(
            store,
            SourceObject(**each),
            corpus=corpus,
            limits=limits,
            deep=deep,
            progress=lambda rows, total, base=done: progress(base + rows, total),  # type: ignore[misc]
        )
        done += found.rows + found.rejected
        results.append(found.to_json())
    return {"objects": results}


def _compared(store: Store, previous: int | None, published: CorpusVersion, *, memory: int) -> CorpusDiff | None:
    """What the published version changed; None where the previous one is damaged, which must not fail a run."""
    try:
        old = None if previous is None else read_version(store, published.corpus, previous)
        return diff_versions(store, old, published, memory=memory)
    except IntegrityError as error:
        _logger.warning("the changes since version %s are not known: %s", previous, error)
        return None


def _tell(store: Store, published: CorpusVersion) -> None:
    about = {"version": published.version, "snapshot_id": published.snapshot_id, "rows": published.rows}
    materialised(asset_of(store, f"corpora/{published.corpus}", name=f"corpus {published.corpus}"), about)


def _columns(store: Store, objects: list[Json]) -> Json:
    """Columns of the sources, for lineage events only."""
    columns: Json = {}
    with telling("columns of the sources"):
        columns |= source_columns(store, objects)
    return columns


@stage("publish")
def publish_corpus(
    store_uri: str,
    objects: list[Json],
    parent: int | None,
    previous: int | None,
    unchanged: list[str],
    run_id: str,
    corpus: CorpusConfig,
    limits: LimitsConfig,
) -> Json:
    """Pack small objects, check the limit on bad rows, and publish the corpus version.

    `previous`: the version that the published one is compared with in the run's record.
    """
    store = Store(store_uri)
    version = None if parent is None else read_version(store, corpus.name, parent)
    same = set(unchanged)
    entries = [entry for entry in version.sources if entry.uri in same] if version else []
    published = publish(
        store,
        corpus=corpus,
        objects=[IngestedObject.from_json(each) for each in objects],
        unchanged=entries,
        run_id=run_id,
        limits=limits,
        compared_with=parent or 0,
    )
    diff = _compared(store, previous, published, memory=int(limits.memory))
    if published.run_id == run_id and published.version != parent:
        _tell(store, published)
    return {
        "diff": diff.to_json() if diff else None,
        "rows_new": diff.rows_new if diff else None,
        "version": published.version,
        "snapshot_id": published.snapshot_id,
        "rows": published.rows,
        "rejected": published.rejected,
        "sources": len(published.sources),
        "fields": dict(published.fields),
        "columns": _columns(store, objects),
        "outputs": [f"corpora/{corpus.name}/versions/{published.version:012d}.json"],
    }
