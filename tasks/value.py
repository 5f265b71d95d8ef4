"""Tasks of valuation: targets' signatures, scores, decisions."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.selection import decide, decisions_key
from rise_ops.session import open_target
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.valuation import extremes_key, part_key, score_part
from tasks.policy import Json, stage
from tasks.progress import stage_progress


def _identity(call: Any) -> Any:
    return [call["index_id"], call["targets"], call["aggregate"], call["first_block"], call["blocks"]]


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


@stage("value", key=_identity)
def value_blocks(
    store_uri: str,
    index_id: str,
    targets: dict[str, str],
    aggregate: str,
    first_block: int,
    blocks: list[str],
    run_id: str,
    part: int,
    rows: int,
) -> Json:
    """Score a batch of blocks against all targets."""
    store = Store(store_uri)
    scored = score_part(
        store,
        index_id,
        blocks,
        run_id=run_id,
        part=part,
        first_block=first_block,
        targets={name: read_target(store, target) for name, target in targets.items()},
        aggregate=aggregate,  # type: ignore[arg-type]
        progress=stage_progress("value", rows),
    )
    return {"rows": scored, "outputs": [part_key(run_id, part), extremes_key(run_id, part)]}


@stage("select")
def select_rows(store_uri: str, config: CurationConfig, version: int, parts: list[list[str]], run_id: str) -> Json:
    """Rank the rows and decide which are kept."""
    store = Store(store_uri)
    selection = decide(
        store,
        read_version(store, config.corpus.name, version),
        run_id=run_id,
        parts=[(scores, extremes) for scores, extremes in parts],
        weights=config.weights,
        targets=list(config.targets),
        aggregate=config.aggregate,
        keep=config.selection.keep,
        memory=int(config.limits.memory),
    )
    return {**asdict(selection), "outputs": [decisions_key(run_id)]}
