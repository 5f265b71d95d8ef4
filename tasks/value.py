"""Tasks of valuation: targets' signatures, scores, decisions."""

from __future__ import annotations

from dataclasses import asdict

from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.decided import decide_once
from rise_ops.memory import task_limits
from rise_ops.parts import cut_parts, missing_parts, valuation_id
from rise_ops.runs import decisions_key
from rise_ops.selection import Scored
from rise_ops.session import open_target
from rise_ops.stability import measure_stability
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.valuation import score_parts
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress


@stage("target", tags=[GPU])
def sign_queries(store_uri: str, config: CurationConfig, index_id: str, name: str) -> Json:
    """Signatures of a target's queries; the store already has those of unchanged queries."""
    target = open_target(Store(store_uri), config, index_id, name)
    return {
        "name": name,
        "target_id": target.target_id,
        "queries": target.queries.height,
        "outputs": [f"targets/{target.target_id}.json"],
    }


@stage("plan-value")
def plan_value(
    store_uri: str, config: CurationConfig, index_id: str, targets: dict[str, str], blocks: list[str]
) -> Json:
    """Which parts the store lacks: the positions of their first blocks, and how many blocks each has."""
    valuation = valuation_id(index_id, targets, config.aggregate)
    parts = cut_parts(valuation, blocks)
    missing = {part.first_block for part in missing_parts(Store(store_uri), parts)}
    return {
        "valuation": valuation,
        "parts": [[part.first_block, len(part.blocks), part.scores] for part in parts],
        "missing": sorted(missing),
    }


@stage("value", tags=[S3])
def value_blocks(
    store_uri: str,
    config: CurationConfig,
    index_id: str,
    targets: dict[str, str],
    valuation: str,
    blocks: list[str],
) -> Json:
    """Score whole parts of blocks against all targets. Not cached: the store has what was scored."""
    store = Store(store_uri)
    scored = score_parts(
        store,
        index_id,
        cut_parts(valuation, blocks),
        targets={name: read_target(store, target) for name, target in targets.items()},
        aggregate=config.aggregate,
        sketch=config.sketch,
        memory=int(task_limits(config).memory),
        tasks=config.runner.workers,
        progress=stage_progress(),
    )
    return {"rows": scored}


@stage("select")
def select_rows(
    store_uri: str,
    config: CurationConfig,
    version: int,
    index_id: str,
    valuation: str,
    blocks: list[str],
    run_id: str,
) -> Json:
    """Rank the rows and decide which are kept; what an earlier run decided in the same way is taken over."""
    store = Store(store_uri)
    corpus, parts, names = (
        read_version(store, config.corpus.name, version),
        cut_parts(valuation, blocks),
        config.targets,
    )
    scored = Scored(corpus, parts, list(names), config.weights, config.aggregate, index_id, config.corpus.sources)
    found = decide_once(
        store,
        scored,
        run_id=run_id,
        selection=config.selection,
        memory=int(config.limits.memory),
        progress=stage_progress(),
    )
    return {**asdict(found.selection), "reused": found.reused, "outputs": [decisions_key(run_id)]}


@stage("stability")
def stability(store_uri: str, config: CurationConfig, run_id: str, rows: int) -> Json:
    """Would an independent sketch keep the same rows?"""
    return {"stability": measure_stability(Store(store_uri), run_id, rows=rows, sketch=config.sketch)}
