"""The flow `index_corpus`: bring the corpus and its index up to date with the sources, and stop there."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.hooks import FLOW_OPTIONS, run_name
from flows.runners import dispatcher
from flows.stages import Runner, check, compress, index, ingest, mending, tune
from rise_ops.config import CurationConfig
from tasks.recording import Recorder


@flow(name="index_corpus", flow_run_name=lambda: run_name("reindex"), **FLOW_OPTIONS)
def index_corpus(config: CurationConfig, run_id: str | None = None, deep: bool = False) -> dict[str, Any]:
    """Ingest what changed and compute the signatures that are missing. Returns the run's summary."""
    run = Recorder(config, name="index_corpus", run_id=run_id)
    with run, dispatcher(config) as runner:
        mending(run, lambda: _run(run, runner, config, deep=deep))
    return run.summary()


def _run(run: Recorder, runner: Runner, config: CurationConfig, *, deep: bool) -> None:
    check(run, runner, config, model=True, targets=False)
    corpus = ingest(run, runner, config, deep=deep)
    config = tune(run, runner, config, corpus)
    indexed = index(run, runner, config, corpus)
    compress(run, runner, config, indexed)
