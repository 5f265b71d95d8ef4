"""The three tasks of arXiv 2604.16197, a flow each: RISE and its alternatives on the user's files and models.

Each compares with a model that was trained on the pool (retrospective), with one that was not (prospective), or both.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, runtime

from flows.compare import compare
from flows.hooks import FLOW_OPTIONS
from rise_ops.errors import ConfigError
from rise_ops.presets import PaperTask, paper_config

Json = dict[str, Any]


def _run_name() -> str:
    return f"{runtime.flow_run.flow_name}-{runtime.flow_run.scheduled_start_time:%Y%m%dT%H%M}"


@flow(name="howdy", flow_run_name=_run_name, **FLOW_OPTIONS)
def howdy(store: str, pool: list[str], queries: str, trained: str | None = None, base: str | None = None,
          options: Json | None = None) -> Json:  # fmt: skip
    """Find the rows behind a backdoor. Returns the summaries as `run_task` does."""
    return run_task("howdy", store, pool, queries, trained, base, options)


@flow(name="finance_medical", flow_run_name=_run_name, **FLOW_OPTIONS)
def finance_medical(store: str, pool: list[str], queries: str, trained: str | None = None, base: str | None = None,
                    options: Json | None = None) -> Json:  # fmt: skip
    """Tell rows of two domains apart. Returns the summaries as `run_task` does."""
    return run_task("finance_medical", store, pool, queries, trained, base, options)


@flow(name="brain_rot", flow_run_name=_run_name, **FLOW_OPTIONS)
def brain_rot(store: str, pool: list[str], queries: str, trained: str | None = None, base: str | None = None,
              options: Json | None = None) -> Json:  # fmt: skip
    """Tell junk from control. Returns the summaries as `run_task` does."""
    return run_task("brain_rot", store, pool, queries, trained, base, options)


TASKS = {"howdy": howdy, "finance_medical": finance_medical, "brain_rot": brain_rot}
"""Flows by task."""


def run_task(task: PaperTask, store: str, pool: list[str], queries: str, trained: str | None, base: str | None,
             options: Json | None) -> Json:  # fmt: skip
    """{setting: summary of the flow `compare`} for `retrospective` and `prospective`, as far as models are given.

    Parameters
    ----------
    trained, base
        A model that was trained on the pool, and the one that it was trained from, or another that was not.
    options
        Of `rise_ops.presets.paper_config`: filler, label, dilute, seeds, sketch, limits.

    Raises
    ------
    ConfigError
        No model is given.
    """
    if trained is None and base is None:
        raise ConfigError("give a model: `trained` on the pool (retrospective), `base` (prospective), or both")
    more = options or {}
    checkpoints = [base] if base is not None else []
    found = {}
    if trained is not None:
        config = paper_config(
            task, store=store, pool=pool, queries=queries, model=trained, checkpoints=checkpoints, **more
        )
        found["retrospective"] = compare(config)
    if base is not None:
        found["prospective"] = compare(paper_config(task, store=store, pool=pool, queries=queries, model=base, **more))
    return found
