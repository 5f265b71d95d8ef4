"""Tasks of valuation: targets' signatures, scores, decisions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.memory import task_limits
from rise_ops.selection import decide, decisions_key
from rise_ops.session import open_target
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.valuation import Part, part_of, score_part
from tasks.policy import Json, stage
from tasks.progress import stage_progress


def _identity(call: Any) -> Any:
    return [call["index_id"], call["targets"], call["config"].aggregate, call["blocks"]]


@stage("target")
def sign_queries(store_uri: str, config: CurationConfig, index_id: str, name: str) -> Json:
    """Signatures of a target's queries; the store already has those of unchanged queries."""
    target = open_target(Store(store_uri), config, index_id, name)
    return {
        "name": name,
        "target_id": target.target_id,
        "queries": target.queries.height,
        "outputs": [f"targets/{target.target_id}.json"],
    }


@stage("value", key=_identity, version=2)
def value_blocks(
    store_uri: str,
    config: CurationConfig,
    index_id: str,
    targets: dict[str, str],
    blocks: list[str],
    run_id: str,
    part: int,
    rows: int,
) -> Json:
    """Score a batch of blocks against all targets."""
    store = Store(store_uri)
    place = part_of(run_id, part, 0)
    scored = score_part(
        store,
        index_id,
        blocks,
        place,
        targets={name: read_target(store, target) for name, target in targets.items()},
        aggregate=config.aggregate,
        memory=int(task_limits(config).memory),
        tasks=config.runner.workers,
        progress=stage_progress("value", rows),
    )
    return {"rows": scored, "outputs": [place.scores, place.extremes]}


@stage("select")
def select_rows(store_uri: str, config: CurationConfig, version: int, parts: list[Any], run_id: str) -> Json:
    """Rank the rows and decide which are kept."""
    store = Store(store_uri)
    selection = decide(
        store,
        read_version(store, config.corpus.name, version),
        run_id=run_id,
        parts=[Part(*part) for part in parts],
        weights=config.weights,
        targets=list(config.targets),
        aggregate=config.aggregate,
        keep=config.selection.keep,
        memory=int(config.limits.memory),
    )
    return {**asdict(selection), "outputs": [decisions_key(run_id)]}
