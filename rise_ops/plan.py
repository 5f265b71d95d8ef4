"""What a run would do and cost, before it is paid for. Writes nothing.

Objects that are not in the current corpus version are read and cut into blocks as a run would, without
writing them, so rows and blocks are exact. Tokens are exact for what is indexed and estimated for the rest,
from a sample of rows or from what is indexed. The time to sketch comes from the rate at which this index's
blocks were computed before; where there are none, the sample is sketched, unless the model is on a hub
(planning downloads nothing) or larger than `limits.memory`. What the selection would do is told where its scores are
in the store (`rise_ops.selection_plan`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, look_at_sources, read_snapshot
from rise_ops.diff import diff_states, published_state
from rise_ops.errors import LimitError
from rise_ops.index import BlockRecord, index_id, list_indexed, read_records
from rise_ops.index_plan import find_missing
from rise_ops.memory import as_json
from rise_ops.model_files import model_fingerprint, resolve_model, stored_bytes
from rise_ops.objects import BlockCount
from rise_ops.preview import preview_corpus
from rise_ops.readers import open_rows
from rise_ops.rows import RowFault, canonical_row
from rise_ops.selection_plan import preview_selection
from rise_ops.session import open_signer, plan_stages
from rise_ops.sources import SourceObject
from rise_ops.store import Store
from rise_ops.tuning import planned

SAMPLE_ROWS = 128
BASE_BYTES = 700 * 2**20
"""Resident memory of the libraries alone (PyTorch, transformers, Polars, Prefect); measured on Linux x86-64."""
_CHARACTERS_PER_TOKEN = 4.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cost:
    """Estimates of what sketching takes."""

    tokens: int
    sketch_seconds: float | None
    sketch_seconds_unknown: str
    """Why there is no estimate; empty where there is one."""
    peak_memory_bytes: int


def plan_run(config: CurationConfig, *, deep: bool = False) -> Json:
    """The plan, as `curate plan --json` prints it.

    Parameters
    ----------
    deep
        Read every object, not only those that the listing shows as changed.

    Raises
    ------
    SourceError, ModelError, StoreError, SelectionError
        What a run would also stumble over.
    """
    store = Store(config.store)
    config, sketch = planned(store, config)
    version, listed = look_at_sources(store, config.corpus, config.limits)
    identity = index_id(model_fingerprint(config.model), config.sketch)
    memory = int(config.limits.memory)
    with preview_corpus(store, config, listed, deep=deep) as seen:
        diff = diff_states(published_state(store, version) if version else None, seen.state, memory=memory)
        rows_of = seen.state.rows_of
        missing, matches = find_missing(store, config, identity, rows_of, earlier=version, doc_ids=seen.state.doc_ids)
        to_sketch = sum(missing.values()) - sum(match.height for match in matches)
    sources = [*listed.added, *listed.changed, *(entry.listed for entry in listed.unchanged)]
    done = list(read_records(store, identity, rows_of.keys() - missing.keys()).values())
    earlier = _earlier(store, config, identity, version) if missing else []
    share = to_sketch / max(1, sum(missing.values()))
    model = _weights(config) if to_sketch else None
    cost = estimate(store, config, sources, list(seen.blocks.values()), done, earlier=earlier, share=share,
                    weight_bytes=model["weight_bytes"] if model else 0)  # fmt: skip
    stages = plan_stages(config, rows=seen.rows)
    changed = bool(diff.objects.added or diff.objects.changed or diff.objects.removed)
    resting = BASE_BYTES + max(plan.bytes for name, plan in stages.items() if name != "sketch")
    return {
        "corpus": config.corpus.name,
        "index_id": identity,
        "sketch": sketch,
        **diff.to_json(),
        "blocks_to_write": len(missing),
        "rows_total": seen.rows,
        "rows_rejected": seen.rejected,
        "rows_to_sketch": to_sketch,
        "rows_reused": sum(seen.state.rows_of.values()) - to_sketch,
        "tokens": cost.tokens,
        "index_bytes": sum(seen.state.rows_of.values()) * config.sketch.dim * 2,
        "index_bytes_new": sum(missing.values()) * config.sketch.dim * 2,
        "peak_memory_bytes": max(resting, cost.peak_memory_bytes) if to_sketch else resting,
        "memory": as_json(stages),
        "model": model,
        "sketch_seconds": cost.sketch_seconds,
        "sketch_seconds_unknown": cost.sketch_seconds_unknown,
        **preview_selection(store, config, version, identity, changed=changed, missing=len(missing)),
    }


def estimate(
    store: Store,
    config: CurationConfig,
    sources: Sequence[SourceObject],
    blocks: Sequence[BlockCount],
    done: Sequence[BlockRecord],
    *,
    earlier: Sequence[tuple[BlockRecord, int]],
    share: float,
    weight_bytes: int,
) -> Cost:
    """Tokens of the corpus, and time and memory of sketching a share of what is not in `done`.

    Parameters
    ----------
    done
        Blocks of the corpus that are in the index.
    earlier
        Blocks of the version before that are in it, and their characters: they tell the rate, too.
    weight_bytes
        Of the model.
    """
    finished = {record.block_id for record in done}
    characters = sum(block.characters for block in blocks if block.block_id not in finished)
    known = sum(record.tokens for record in done)
    rate, unknown = _rate([*done, *(record for record, _ in earlier)]), ""
    memory = BASE_BYTES + weight_bytes + int(config.limits.memory)
    measured = sum(block.characters for block in blocks if block.block_id in finished) + sum(
        count for _, count in earlier
    )
    per_character = (known + sum(record.tokens for record, _ in earlier)) / max(1, measured)
    if characters and share and rate is None:
        sample = list(islice(_texts(config, sources), SAMPLE_ROWS))
        unknown = _cannot_measure(config, sample)
        if not unknown:
            rate, per_character, memory = _measure(store, config, sample)
    if per_character == 0:
        per_character = 1 / _CHARACTERS_PER_TOKEN
    tokens = round(characters * per_character)
    seconds = 0.0 if characters * share == 0 else round(tokens * share / rate, 1) if rate else None
    return Cost(known + tokens, seconds, "" if seconds is not None else unknown, memory)


def _earlier(
    store: Store, config: CurationConfig, identity: str, version: CorpusVersion | None
) -> list[tuple[BlockRecord, int]]:
    """The indexed blocks of a version and their characters."""
    if version is None:
        return []
    snapshot = read_snapshot(store, version.snapshot_id).unique("block_id")
    characters = dict(snapshot.select("block_id", "characters").iter_rows())
    rows_of = dict(snapshot.select("block_id", "rows").iter_rows())
    indexed = list_indexed(store, identity, rows_of, dim=config.sketch.dim)
    return [(record, characters[block]) for block, record in read_records(store, identity, indexed).items()]


def _rate(done: Sequence[BlockRecord]) -> float | None:
    """Tokens a second over recorded blocks; those that were mostly copied tell little."""
    computed = [record for record in done if 2 * record.rows_sketched >= record.rows]
    seconds = sum(record.seconds for record in computed)
    return sum(record.tokens_sketched for record in computed) / seconds if seconds else None


def _texts(config: CurationConfig, sources: Sequence[SourceObject]) -> Iterator[str]:
    limit = int(config.limits.row_bytes)
    for source in sources:
        with open_rows(source, row_bytes=limit) as reader:
            for row in reader:
                if isinstance(row.value, RowFault):
                    continue  # counted by the preview
                try:
                    yield canonical_row(row.value, fields=config.corpus.fields, row_bytes=limit).text
                except RowFault:
                    continue  # counted by the preview


def _cannot_measure(config: CurationConfig, sample: Sequence[str]) -> str:
    """Why the rate cannot be measured; empty if it can."""
    if not sample:
        return "unknown: no rows to measure with"
    if not config.model.in_one_process:
        return "unknown: no processes are started for a plan; the first blocks will tell"
    stored = stored_bytes(resolve_model(config.model))
    if stored is None:
        return "unknown: a hub model is not loaded for a plan; its first blocks will tell"
    if stored > config.limits.memory:
        return f"unknown: the model has {stored / 2**30:.1f} GiB, more than limits.memory; its first blocks will tell"
    return ""


def _measure(store: Store, config: CurationConfig, sample: Sequence[str]) -> tuple[float, float, int]:
    """Tokens a second, tokens a character and peak memory, from sketching the sample."""
    signer = open_signer(store, config)
    signer.rows(sample[:4])  # the first call pays for warming up
    started = time.perf_counter()
    tokens = int(signer.rows(sample).tokens.sum())
    seconds = time.perf_counter() - started
    peak = BASE_BYTES + signer.plan.peak_bytes + 4_096 * config.sketch.dim * 2
    return tokens / seconds, tokens / max(1, sum(map(len, sample))), peak


def _weights(config: CurationConfig) -> Json:
    """Where the weights will go, on a machine like this one, and what is wrong with it."""
    from rise_ops.placement import plan_weights

    plan, problem = plan_weights(config.model, working=int(config.limits.memory)), ""
    try:
        plan.refuse_if_too_large()
    except LimitError as error:
        problem = str(error)
    return {"text": plan.text, "weight_bytes": plan.weight_bytes, "places": dict(plan.places), "problem": problem}
