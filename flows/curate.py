"""The flow `curate`: ingest → index → value → select → export → evaluate → report.

A run after a failure, or with nothing changed, pays only for what the store lacks.
"""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow, runtime

from flows.hooks import FLOW_OPTIONS, run_name
from flows.runners import dispatcher
from flows.stages import Runner, check, compress, explain, export, index, ingest, mending, tune, value
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError
from tasks.recording import Recorder

Json = dict[str, Any]
Until = Literal["ingest", "index", "value", "export", "evaluate"]

_ORDER: tuple[Until, ...] = ("ingest", "index", "value", "export", "evaluate")


def _run_name() -> str:
    until = runtime.flow_run.parameters["until"]
    return run_name("curate" if until == _ORDER[-1] else until)


@flow(name="curate", flow_run_name=_run_name, **FLOW_OPTIONS)
def curate(config: CurationConfig, until: Until = "evaluate", run_id: str | None = None, deep: bool = False) -> Json:
    """Curate a corpus up to and including a stage. Returns the run's summary.

    Parameters
    ----------
    deep
        Look at the bytes of every source object, not only of those that their listing shows as changed.
    """
    if until not in ("ingest", "index") and not config.targets:
        raise ConfigError("no targets are configured; valuation needs at least one, under `targets`")
    wanted = _ORDER[: _ORDER.index(until) + 1]
    run = Recorder(config, name="curate", run_id=run_id)
    with run, dispatcher(config) as runner:
        mending(run, lambda: _run(run, runner, config, wanted, deep=deep))
    return run.summary()


def _run(run: Recorder, runner: Runner, config: CurationConfig, wanted: tuple[Until, ...], *, deep: bool) -> None:
    check(run, runner, config, model="index" in wanted, targets="value" in wanted)
    corpus = ingest(run, runner, config, deep=deep)
    if "index" in wanted:
        config = tune(run, runner, config, corpus)
        indexed = index(run, runner, config, corpus)
        compress(run, runner, config, indexed)
    if "value" in wanted:
        valued = value(run, runner, config, corpus, indexed)
    if "export" in wanted:
        export(run, runner, config, corpus, indexed)
    if "value" in wanted:
        explain(run, runner, config, corpus, valued, evaluation="evaluate" in wanted)
