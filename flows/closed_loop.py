"""The flow `closed_loop`: what is it worth to train on the rows that RISE selects?

Ingest, index and value as `curate` does; then every arm chooses rows, a model is trained on each choice, and the
held-out losses are compared. A run after an interruption goes on where it was, also in the middle of a training.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from flows.runners import dispatcher
from flows.stages import Runner, check, index, ingest, mending, tune, value
from rise_ops.arms import arm_key
from rise_ops.closed_loop import loop_of
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError
from rise_ops.runs import decisions_key
from tasks.closed_loop import choose_arms, compare_arms, measure_untrained, train_on_arm
from tasks.dispatch import run_all
from tasks.progress import Tracker
from tasks.recording import Recorder

Json = dict[str, Any]


@flow(name="closed_loop", flow_run_name=lambda: run_name("closed_loop"), **FLOW_OPTIONS)
def closed_loop(config: CurationConfig, run_id: str | None = None) -> Json:
    """Test what the section `closed_loop` describes. Returns the run's summary with `closed_loop`."""
    loop_of(config)
    if not config.targets:
        raise ConfigError("no targets are configured; valuation needs at least one, under `targets`")
    run = Recorder(config, name="closed_loop", run_id=run_id)
    with run, dispatcher(config) as runner:
        mending(run, lambda: _run(run, runner, config))
    return {**run.summary(), "closed_loop": run.record["closed_loop"]}


def _run(run: Recorder, runner: Runner, config: CurationConfig) -> None:
    check(run, runner, config, model=True, targets=True)
    corpus = ingest(run, runner, config)
    config = tune(run, runner, config, corpus)
    indexed = index(run, runner, config, corpus)
    valued = value(run, runner, config, corpus, indexed)
    chosen = choose(run, runner, config, corpus, valued)
    base, results = train(run, runner, config, chosen)
    with run.stage("compare"):
        call = {"config": config, "base": base, "results": results}
        (compared,) = run_all(runner, compare_arms, [call], store_uri=config.store)
    run.record["closed_loop"] |= {name: found for name, found in compared.items() if name != "cached"}


def choose(run: Recorder, runner: Runner, config: CurationConfig, corpus: Json, valued: Json) -> Json:
    """Choose the rows of all arms."""
    with run.stage("arms") as stage:
        call = {"config": config, "version": corpus["version"], "valuation": valued["valuation"], "run_id": run.run_id}
        (chosen,) = run_all(runner, choose_arms, [call], store_uri=config.store)
        stage.read(decisions_key(run.run_id), rows=run.counts["rows"])
        for arm in chosen["arms"].values():
            stage.wrote(arm_key(chosen["loop_id"], arm["arm"], arm["seed"]), rows=arm["rows"])
    run.record["closed_loop"] = {"loop_id": chosen["loop_id"]}  # what a failed run leaves is kept, too
    return chosen


def train(run: Recorder, runner: Runner, config: CurationConfig, chosen: Json) -> tuple[str, list[str]]:
    """Train on each arm's rows. Returns the keys of the untrained model's result and of all others."""
    loop_id, epochs = chosen["loop_id"], loop_of(config).epochs
    common = {"config": config, "loop_id": loop_id}
    with run.stage("train") as stage:
        (base,) = run_all(runner, measure_untrained, [common], store_uri=config.store)
        arms = list(chosen["arms"].items())
        calls = [{**common, "arm": arm["arm"], "seed": arm["seed"], "name": name} for name, arm in arms]
        tracker = Tracker("train", [epochs * arm["rows"] for _, arm in arms])
        results = run_all(runner, train_on_arm, calls, store_uri=config.store, tracker=tracker)
        for _, arm in arms:
            stage.read(arm_key(loop_id, arm["arm"], arm["seed"]), rows=arm["rows"])
        for found in (base, *results):
            stage.wrote(found["key"])
        stage.cached = base["reused"] and all(found["reused"] for found in results)
    return base["key"], [found["key"] for found in results]
