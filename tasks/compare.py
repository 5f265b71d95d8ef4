"""Tasks of a comparison."""

from __future__ import annotations

from rise_ops.compare_config import parse_method
from rise_ops.comparing import find_facts, measure
from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.store import Store
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress


@stage("facts", tags=[S3])
def count_rows(store_uri: str, config: CurationConfig, version: int) -> Json:
    """Rows, tokens and positive rows of a comparison. Not cached: the store has what was counted."""
    store = Store(store_uri)
    corpus = read_version(store, config.corpus.name, version)
    return find_facts(store, config, corpus, progress=stage_progress())


@stage("measure", tags=[GPU, S3])
def measure_method(
    store_uri: str, config: CurationConfig, version: int, facts: Json, method: Json, name: str, seed: int, run_id: str
) -> Json:
    """One run of one method, in a process of its own. Not cached: the store has what was measured."""
    store = Store(store_uri)
    corpus = read_version(store, config.corpus.name, version)
    chosen = parse_method(method)
    return measure(
        store, config, corpus, facts=facts, method=chosen, seed=seed, run_id=run_id, progress=stage_progress()
    )
