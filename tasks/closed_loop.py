"""Tasks of the closed loop."""

from __future__ import annotations

from rise_ops.closed_loop import choose_rows, compare_results, measure_base, read_result, train_arm
from rise_ops.compare_config import Arm
from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.store import Store
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress


@stage("arms", tags=[S3])
def choose_arms(store_uri: str, config: CurationConfig, version: int, valuation: str, run_id: str) -> Json:
    """The rows of every arm and seed. Not cached: it depends on the decisions of its own run."""
    store = Store(store_uri)
    corpus = read_version(store, config.corpus.name, version)
    return choose_rows(store, config, corpus, valuation=valuation, run_id=run_id)


@stage("base", tags=[GPU])
def measure_untrained(store_uri: str, config: CurationConfig, loop_id: str) -> Json:
    """The untrained model on the held-out texts. Not cached: the store has what was measured."""
    return measure_base(Store(store_uri), config, loop_id=loop_id)


@stage("train", tags=[GPU])
def train_on_arm(store_uri: str, config: CurationConfig, loop_id: str, arm: Arm, seed: int, name: str) -> Json:
    """One training on the rows of one arm, measured. Not cached: the store has what was measured."""
    return train_arm(Store(store_uri), config, loop_id=loop_id, arm=arm, seed=seed, progress=stage_progress())


@stage("compare-arms")
def compare_arms(store_uri: str, config: CurationConfig, base: str, results: list[str]) -> Json:
    """Means and intervals over seeds, from the keys of results."""
    store = Store(store_uri)
    return compare_results(config, read_result(store, base), [read_result(store, key) for key in results])
