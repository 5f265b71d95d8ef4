"""The task that chooses temperature and widths."""

from __future__ import annotations

from rise_ops.choosing import choose
from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.store import Store
from rise_ops.tuning import tuning_key
from tasks.policy import GPU, Json, stage
from tasks.progress import stage_progress


@stage("tune", tags=[GPU])
def choose_sketch(store_uri: str, config: CurationConfig, version: int, run_id: str) -> Json:
    """Choose, or read what was chosen before. Not cached: the store has the choice."""
    store = Store(store_uri)
    corpus = read_version(store, config.corpus.name, version)
    found = choose(store, config, corpus, run_id=run_id, progress=stage_progress())
    return {
        **{name: found[name] for name in ("tuning_id", "chosen", "why", "rows")},
        "new": found["run_id"] == run_id,
        "outputs": [tuning_key(found["tuning_id"])],
    }
