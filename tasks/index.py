"""Tasks of the index: what is missing, and computing it."""

from __future__ import annotations

from rise_ops.codes import codes_folder, missing_codes, write_codes
from rise_ops.config import CurationConfig, SimHashConfig
from rise_ops.corpus import read_version
from rise_ops.index import prepare_index, read_records
from rise_ops.index_plan import plan_work
from rise_ops.indexing import sketch_blocks
from rise_ops.memory import blocks_at_once, task_limits
from rise_ops.reuse import read_reuse
from rise_ops.session import open_signer
from rise_ops.store import Store
from tasks.policy import GPU, S3, Json, stage
from tasks.progress import stage_progress


@stage("plan-index")
def plan_index(store_uri: str, config: CurationConfig, version: int, run_id: str) -> Json:
    """Which blocks of a corpus version the index lacks, and which of their rows it has in other blocks.

    The model is only fingerprinted, not loaded.
    """
    store = Store(store_uri)
    return plan_work(store, config, read_version(store, config.corpus.name, version), run_id=run_id).to_json()


@stage("open-model", tags=[GPU])
def open_model(store_uri: str, config: CurationConfig) -> Json:
    """Load and probe the model, and create the index or check that it fits."""
    store = Store(store_uri)
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    trunk = signer.trunk
    return {
        "index_id": identity,
        "parameters": trunk.parameters,
        "dtype": str(trunk.dtype).removeprefix("torch."),
        "device": str(trunk.device),
        "outputs": [f"indexes/{identity}/index.json"],
    }


@stage("sketch", tags=[GPU, S3])
def sketch(store_uri: str, config: CurationConfig, index_id: str, blocks: list[str], reuse: list[str]) -> Json:
    """Fill blocks that the index lacks. Not cached: the index itself is the cache."""
    store = Store(store_uri)
    records = sketch_blocks(
        store,
        index_id,
        blocks,
        dim=config.sketch.dim,
        signer=lambda: open_signer(store, config),
        reuse=read_reuse(store, reuse, blocks),
        at_once=blocks_at_once(int(task_limits(config).memory), dim=config.sketch.dim),
        progress=stage_progress(),
    )
    return {
        "rows": sum(record.rows for record in records),
        "rows_sketched": sum(record.rows_sketched for record in records),
        "tokens": sum(record.tokens for record in records),
        "outputs": [f"indexes/{index_id}/blocks/{record.block_id}.json" for record in records],
    }


@stage("count-tokens")
def count_tokens(store_uri: str, index_id: str, blocks: list[str]) -> Json:
    """Tokens of indexed blocks, from their records."""
    records = read_records(Store(store_uri), index_id, blocks)
    return {"tokens": sum(record.tokens for record in records.values())}


@stage("compress", tags=[S3])
def compress(store_uri: str, config: CurationConfig, index_id: str, blocks: list[str]) -> Json:
    """Codes of blocks. Not cached: the store has what was compressed."""
    codes = config.simhash or SimHashConfig()
    store, dim = Store(store_uri), config.sketch.dim
    rows = write_codes(store, index_id, blocks, codes, dim=dim, device=config.model.device, progress=stage_progress())
    return {"rows": rows}


@stage("plan-codes")
def plan_codes(store_uri: str, config: CurationConfig, index_id: str, blocks: list[str], rows: list[int]) -> Json:
    """Which indexed blocks have no codes."""
    codes = config.simhash or SimHashConfig()
    rows_of = dict(zip(blocks, rows, strict=True))
    missing = missing_codes(Store(store_uri), index_id, rows_of, codes)
    return {"folder": codes_folder(index_id, codes), "missing": missing, "rows": [rows_of[block] for block in missing]}
