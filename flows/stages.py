"""The stages that flows are composed of: each asks the store what is there and schedules tasks for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rise_ops.batches import split
from rise_ops.config import CurationConfig
from rise_ops.errors import DamagedError
from rise_ops.memory import task_limits
from rise_ops.parts import valuation_folder
from rise_ops.tuning import is_tuned, with_choice
from tasks.dispatch import Dispatcher, run_all
from tasks.index import compress as compress_blocks
from tasks.index import count_tokens, open_model, plan_codes, plan_index, sketch
from tasks.ingest import are_held, ingest_objects, publish_corpus, survey
from tasks.preflight import preflight
from tasks.progress import Tracker
from tasks.publish import collect_examples, evaluate_targets, export_kept
from tasks.recording import Recorder
from tasks.tune import choose_sketch
from tasks.value import plan_value, select_rows, sign_queries, stability, value_blocks

Json = dict[str, Any]
Runner = Dispatcher

_INGEST_BYTES = 256 * 2**20
_SKETCH_ROWS = 4 * 2_048
_VALUE_ROWS = 4 * 2_048


def mending(run: Recorder, stages: Callable[[], None]) -> None:
    """Run stages. Where one meets a broken object that can be made again, they run once more: `check` makes room."""
    while True:
        try:
            return stages()
        except DamagedError as error:
            if not run.mend(error):  # each object once, so this ends
                raise


def check(run: Recorder, runner: Runner, config: CurationConfig, *, model: bool, targets: bool) -> None:
    """Fail before anything is paid for, and make room for what was found broken in the store."""
    call = {"config": config, "model": model, "targets": targets}
    (checked,) = run_all(runner, preflight, [call], store_uri=config.store)
    run.record["healed"] = [*run.record.get("healed", []), *checked["healed"]]


def ingest(run: Recorder, runner: Runner, config: CurationConfig, *, deep: bool = False) -> Json:
    """Bring the corpus' current version up to date with its sources; deep: whatever their listing says."""
    common = {"corpus": config.corpus, "limits": task_limits(config)}
    healed = bool(run.record["healed"])
    looking = {**common, "deep": deep, "fresh": deep or healed}
    with run.stage("ingest") as stage:
        (seen,) = run_all(runner, survey, [{**common, "deep": deep, "healed": healed}], store_uri=config.store)
        batches = list(split(seen["read"], [max(0, item["size"]) for item in seen["read"]], target=_INGEST_BYTES))
        calls = [{"objects": batch, **looking} for batch in batches]
        tracker = Tracker("ingest", [sum(max(0, item["size"]) for item in batch) for batch in batches], rows=False)
        done = run_all(runner, ingest_objects, calls, store_uri=config.store, holds=are_held, tracker=tracker)
        objects = [item for batch in done for item in batch["objects"]]
        call = {
            "objects": objects,
            "parent": seen["parent"],
            "previous": run.record["corpus"].setdefault("previous", seen["parent"]),
            "unchanged": seen["unchanged"],
            "run_id": run.run_id,
        }
        (published,) = run_all(runner, publish_corpus, [{**call, **common}], store_uri=config.store)
        for item in objects:
            stage.read_source(item["uri"], sha256=item["object_sha"], rows=item["rows"], size=item["size"])
        stage.columns = published["columns"]
        stage.wrote(published["outputs"][0], sha256=published["snapshot_id"], rows=published["rows"])
        stage.cached = published["version"] == seen["parent"] and all(item["reused"] for item in objects)
        run.record["corpus"] |= {name: published[name] for name in ("version", "snapshot_id", "fields")}
    run.record["diff"] = published["diff"]
    run.counts |= {
        "rows": published["rows"],
        "rows_rejected": published["rejected"],
        "rows_new": published["rows_new"],
        "objects": published["sources"],
        "objects_read": sum(not item["reused"] for item in objects),
        "objects_removed": len(seen["removed"]),
    }
    return published


def tune(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json) -> CurationConfig:
    """Choose what of the sketch is `auto`. Returns the configuration with the choice."""
    if not is_tuned(config):
        return config
    call = {"config": config, "version": corpus["version"], "run_id": run.run_id}
    with run.stage("tune") as stage:
        (found,) = run_all(runner, choose_sketch, [call], store_uri=config.store)
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        stage.wrote(found["outputs"][0], rows=found["rows"])
        stage.cached = not found["new"]
    run.record["tuning"] = {name: found[name] for name in ("tuning_id", "chosen", "why")}
    return with_choice(config, found["chosen"])


def index(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json) -> Json:
    """Fill the index: copy the signatures that it holds in other blocks, compute the rest."""
    call = {"config": config, "version": corpus["version"], "run_id": run.run_id}
    with run.stage("index") as stage:
        (plan,) = run_all(runner, plan_index, [call], store_uri=config.store)
        if plan["rows_to_sketch"] or not plan["is_described"]:
            (model,) = run_all(runner, open_model, [{"config": config}], store_uri=config.store)
            run.record["model"] |= {name: model[name] for name in ("parameters", "dtype", "device")}
        common = {"config": config, "index_id": plan["index_id"]}
        rows_of = dict(zip(plan["missing"], plan["missing_rows"], strict=True))
        batches = list(split(plan["missing"], plan["missing_rows"], target=_SKETCH_ROWS))
        calls = [
            {
                **common,
                "blocks": batch,
                "reuse": sorted({plan["reuse"][block] for block in batch if block in plan["reuse"]}),
            }
            for batch in batches
        ]
        tracker = Tracker("sketch", [sum(rows_of[block] for block in batch) for batch in batches])
        filled = run_all(runner, sketch, calls, store_uri=config.store, tracker=tracker)
        counting = {"index_id": plan["index_id"], "blocks": plan["blocks"]}
        (counted,) = run_all(runner, count_tokens, [counting], store_uri=config.store)
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        stage.wrote(f"indexes/{plan['index_id']}/index.json", sha256=plan["index_id"], rows=corpus["rows"])
        stage.cached = not plan["missing"]
        run.record["index_id"] = plan["index_id"]
        run.record["model"]["fingerprint"] = plan["model_fingerprint"]
    run.rows_sketched += sum(batch["rows_sketched"] for batch in filled)
    run.counts |= {
        "rows_sketched": run.rows_sketched,
        "rows_reused": max(0, sum(plan["rows"]) - run.rows_sketched),
        "blocks_written": len(plan["missing"]),
        "tokens": counted["tokens"],
    }
    return plan


def compress(run: Recorder, runner: Runner, config: CurationConfig, indexed: Json) -> None:
    """Write the codes that the index lacks, where the configuration asks for codes."""
    if config.simhash is None:
        return
    common = {"config": config, "index_id": indexed["index_id"]}
    with run.stage("compress") as stage:
        looking = {**common, "blocks": indexed["blocks"], "rows": indexed["rows"]}
        (plan,) = run_all(runner, plan_codes, [looking], store_uri=config.store)
        batches = list(split(plan["missing"], plan["rows"], target=_SKETCH_ROWS))
        calls = [{**common, "blocks": batch} for batch in batches]
        sizes = dict(zip(plan["missing"], plan["rows"], strict=True))
        tracker = Tracker("compress", [sum(sizes[block] for block in batch) for batch in batches])
        run_all(runner, compress_blocks, calls, store_uri=config.store, tracker=tracker)
        stage.read(f"indexes/{indexed['index_id']}/index.json", sha256=indexed["index_id"], rows=sum(indexed["rows"]))
        stage.wrote(f"{plan['folder']}/simhash.npz", rows=sum(indexed["rows"]))
        stage.cached = not plan["missing"]


def value(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json, indexed: Json) -> Json:
    """Score every row on every target, rank, and decide."""
    with run.stage("value") as stage:
        calls = [{"config": config, "index_id": indexed["index_id"], "name": name} for name in config.targets]
        signed = run_all(runner, sign_queries, calls, store_uri=config.store)
        targets = {item["name"]: item["target_id"] for item in signed}
        valued = _score(runner, config, indexed, targets)
        run.record["targets"] = targets
        for item in signed:
            stage.read_source(config.targets[item["name"]].queries, rows=item["queries"])
            stage.read(item["outputs"][0], sha256=item["target_id"], rows=item["queries"])
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        stage.read(f"indexes/{indexed['index_id']}/index.json", sha256=indexed["index_id"], rows=corpus["rows"])
        for first, count, key in valued["parts"]:
            stage.wrote(key, rows=sum(indexed["rows"][first : first + count]))
        stage.cached = not valued["missing"]
    scores = {"valuation": valued["valuation"], "blocks": indexed["blocks"]}
    with run.stage("select") as stage:
        call = {"config": config, "version": corpus["version"], "index_id": indexed["index_id"], **scores}
        call["run_id"] = run.run_id
        (selection,) = run_all(runner, select_rows, [call], store_uri=config.store)
        stage.read(valuation_folder(valued["valuation"]), rows=corpus["rows"])
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        stage.wrote(selection["outputs"][0], rows=selection["rows"])
        measuring = {"config": config, "run_id": run.run_id, "rows": selection["rows"]}
        stage.cached = selection["reused"]
        (measured,) = run_all(runner, stability, [measuring], store_uri=config.store)
    run.record["selection"] = {
        "keep": config.selection.keep.model_dump(exclude_none=True),
        "reasons": selection["reasons"],
        "steps": selection["steps"],
        "stability": measured["stability"],
    }
    run.counts |= {"rows_kept": selection["kept"], "tokens_kept": selection["tokens_kept"]}
    return {"targets": targets, **scores}


def _score(runner: Runner, config: CurationConfig, indexed: Json, targets: dict[str, str]) -> Json:
    """Score the parts that the store lacks. Returns the plan: valuation, all parts, and which were missing."""
    common = {"config": config, "index_id": indexed["index_id"], "targets": targets}
    looking = {**common, "blocks": indexed["blocks"]}
    (plan,) = run_all(runner, plan_value, [looking], store_uri=config.store)
    blocks, rows = indexed["blocks"], indexed["rows"]
    wanted = set(plan["missing"])
    missing = [slice(first, first + count) for first, count, _ in plan["parts"] if first in wanted]
    batches = list(split(missing, [sum(rows[part]) for part in missing], target=_VALUE_ROWS))
    calls = [
        {**common, "valuation": plan["valuation"], "blocks": [block for part in batch for block in blocks[part]]}
        for batch in batches
    ]
    tracker = Tracker("value", [sum(sum(rows[part]) for part in batch) for batch in batches])
    run_all(runner, value_blocks, calls, store_uri=config.store, tracker=tracker)
    return plan


def export(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json, indexed: Json) -> None:
    """Publish the kept rows."""
    selection = config.selection.model_dump(mode="json", exclude_none=True)
    lineage = {
        "identity": [corpus["snapshot_id"], indexed["index_id"], config.weights, config.aggregate, selection],
        "corpus": run.record["corpus"],
        "model": run.record["model"],
        "index_id": indexed["index_id"],
        "weights": config.weights,
        "aggregate": config.aggregate,
        "keep": config.selection.keep.model_dump(exclude_none=True),
        "selection": selection,
        "stability": run.record["selection"].get("stability"),
        "sketch": config.sketch.model_dump(mode="json"),
        "tuning": run.record.get("tuning"),
        "code": run.record["code"],
    }
    call = {"config": config, "version": corpus["version"], "run_id": run.run_id, "lineage": lineage}
    with run.stage("export") as stage:
        tracker = Tracker("export", [run.counts["rows_kept"]])
        (exported,) = run_all(runner, export_kept, [call], store_uri=config.store, tracker=tracker)
        stage.read(f"runs/{run.run_id}/decisions.parquet", rows=run.counts["rows"])
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        stage.wrote(exported["outputs"][0], rows=exported["rows"], size=exported["bytes"])
        stage.cached = exported["reused"]
    run.record["export"] = exported["label"]


def explain(
    run: Recorder, runner: Runner, config: CurationConfig, corpus: Json, valued: Json, *, evaluation: bool
) -> None:
    """Evaluate where rows carry labels, and collect examples for the report."""
    call = {"config": config, "version": corpus["version"], **valued}
    figures = None
    with run.stage("evaluate" if evaluation else "examples") as stage:
        if evaluation:
            (evaluated,) = run_all(runner, evaluate_targets, [call], store_uri=config.store)
            figures = evaluated["evaluation"]
        examples = {**call, "run_id": run.run_id, "evaluation": figures}
        (collected,) = run_all(runner, collect_examples, [examples], store_uri=config.store)
        stage.read(valuation_folder(valued["valuation"]), rows=run.counts["rows"])
        stage.wrote(collected["outputs"][0])
    run.record["evaluation"] = figures
