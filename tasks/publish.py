"""Tasks that end a run: export, evaluation and examples."""

from __future__ import annotations

from dataclasses import asdict

from rise_ops.config import CurationConfig
from rise_ops.corpus import read_version
from rise_ops.decided import take_examples
from rise_ops.evaluation import evaluate_run
from rise_ops.examples import write_examples
from rise_ops.export import export_rows
from rise_ops.parts import cut_parts
from rise_ops.session import open_signer
from rise_ops.store import Store
from tasks.assets import asset_of, materialised
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress


@stage("export", tags=[S3])
def export_kept(store_uri: str, config: CurationConfig, version: int, run_id: str, lineage: Json) -> Json:
    """Publish the kept rows; the same rows in the same format are published once."""
    store = Store(store_uri)
    published = export_rows(
        store,
        read_version(store, config.corpus.name, version),
        run_id=run_id,
        name=config.export_name,
        config=config.export,
        lineage=lineage,
        memory=int(config.limits.memory),
        progress=stage_progress(),
    )
    if not published.reused:
        about = {"version": published.version, "rows": published.rows, "bytes": published.bytes, "run_id": run_id,
                 "snapshot_id": lineage["corpus"]["snapshot_id"]}  # fmt: skip
        corpus = asset_of(store, f"corpora/{config.corpus.name}", name=f"corpus {config.corpus.name}")
        exported = asset_of(store, f"exports/{published.name}", name=f"export {published.name}")
        materialised(exported, about, made_of=corpus)
    folder = f"exports/{published.label}"
    return {**asdict(published), "label": published.label, "outputs": [f"{folder}/manifest.json"]}


@stage("evaluate")
def evaluate_targets(
    store_uri: str,
    config: CurationConfig,
    version: int,
    blocks: list[str],
    targets: dict[str, str],
    valuation: str,
) -> Json:
    """The evaluation protocol for every target whose queries carry a label that the corpus has too."""
    store = Store(store_uri)
    corpus = read_version(store, config.corpus.name, version)
    return {"evaluation": evaluate_run(store, corpus, blocks, targets, cut_parts(valuation, blocks))}


@stage("examples", tags=[GPU, S3])
def collect_examples(
    store_uri: str,
    config: CurationConfig,
    version: int,
    blocks: list[str],
    targets: dict[str, str],
    valuation: str,
    run_id: str,
    evaluation: Json | None,
) -> Json:
    """Rows to judge the selection by, and what the queries attribute to, by tokens where the model opens."""
    store = Store(store_uri)
    key = take_examples(store, run_id, evaluation=evaluation) or write_examples(
        store,
        read_version(store, config.corpus.name, version),
        blocks,
        run_id=run_id,
        targets=targets,
        parts=cut_parts(valuation, blocks),
        evaluation=evaluation,
        signer=lambda: open_signer(store, config),
    )
    return {"outputs": [key]}
