"""The flow `compare`: several methods on the same rows, queries and model, with what each costs.

Methods run one after the other, each alone on the machine, so that their times compare.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from flows.runners import dispatcher
from flows.stages import Runner, check, ingest, mending, tune
from rise_ops.comparing import plan_methods
from rise_ops.config import CurationConfig
from tasks.compare import count_rows, measure_method
from tasks.dispatch import run_all
from tasks.progress import Tracker
from tasks.recording import Recorder

Json = dict[str, Any]


@flow(name="compare", flow_run_name=lambda: run_name("compare"), **FLOW_OPTIONS)
def compare(config: CurationConfig, run_id: str | None = None) -> Json:
    """Compare the methods of the section `compare`. Returns the run's summary with `comparison`."""
    run = Recorder(config, name="compare", run_id=run_id)
    with run, dispatcher(config) as runner:
        mending(run, lambda: _run(run, runner, config))
    return {**run.summary(), "comparison": run.record["comparison"]}


def _run(run: Recorder, runner: Runner, config: CurationConfig) -> None:
    check(run, runner, config, model=False, targets=True)  # no plan of memory: methods have their own
    corpus = ingest(run, runner, config)
    config = tune(run, runner, config, corpus)
    compare_methods(run, runner, config, corpus)


def compare_methods(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json) -> None:
    """Measure all methods; one that fails or does not fit is told of, and the others go on."""
    common = {"config": config, "version": corpus["version"]}
    with run.stage("compare") as stage:
        counting = Tracker("count", [corpus["rows"]])
        (facts,) = run_all(runner, count_rows, [common], store_uri=config.store, tracker=counting)
        outcomes, plan = [], plan_methods(config)
        tracker = Tracker("compare", [corpus["rows"]] * len(plan))
        for planned in plan:
            call = {**common, "facts": facts, "run_id": run.run_id}
            call |= {name: planned[name] for name in ("method", "name", "seed")}
            (found,) = run_all(runner, measure_method, [call], store_uri=config.store, tracker=tracker)
            outcomes.append({**planned, "method": planned["method"]["method"], **found, "cached": found["reused"]})
        stage.read(corpus["outputs"][0], sha256=corpus["snapshot_id"], rows=corpus["rows"])
        for found in outcomes:
            if found["status"] == "completed":
                stage.wrote(found["key"], rows=facts["rows"])
        stage.cached = all(found["cached"] for found in outcomes)
    compared = {name: getattr(config.compare, name) for name in ("label", "k", "dilute", "targets")}
    run.record["comparison"] = {
        **compared,
        **{name: facts[name] for name in ("rows", "tokens", "positives", "queries")},
        "id": facts["comparison_id"],
        "memory": int(config.limits.memory),
        "methods": outcomes,
    }
