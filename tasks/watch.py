"""Watching a corpus: one look at the sources, and an event where they differ from what is published.

A look knows nothing of the looks before it: whatever differs from the corpus' current version is announced again
until a run has published it, so an event that was lost is made good by the next look. It is not announced while a
run of the corpus waits to start, because that run will list the sources by itself; so at most one re-indexing waits,
however often and however much the sources change. A run that works already may have listed them before the change
and holds nothing back. Neither does a curation that no worker has taken for ten minutes: it may wait for a pool that
nobody serves. A re-indexing that waits as long still does, or one more would wait after every look.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event

from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError, TransientError
from rise_ops.redaction import redacted
from rise_ops.watching import KINDS, look
from tasks.policy import Json, stage

EVENT = "curation.corpus.changed"
SHOWN = 100
"""Objects of a kind that an event or a record names; the server takes events of up to 1.5 MB."""

_REINDEX = "index_corpus"
_LISTING = (_REINDEX, "curate")
"""Flows that list the sources when they start."""
_SOON = timedelta(minutes=1)
_STUCK = timedelta(minutes=10)
"""A run that a worker took this long ago and that has not begun is not waited for, nor a curation that none took."""
_IN_LINE = "AwaitingConcurrencySlot"
"""State of a run that waits for another one and starts after it, however long that takes."""
_PAGE = 200


@stage("look")
def look_at_corpus(store_uri: str, config: CurationConfig) -> Json:
    """Compare a listing of the sources with the current version, and show what differs as an artifact."""
    found = bounded(look(config.model_copy(update={"store": store_uri})))
    if found["is_changed"]:
        table = [{"change": kind, "object": uri} for kind in KINDS for uri in found[kind]]
        counted = ", ".join(f"{found['counts'][kind]:,} {kind}" for kind in KINDS)
        since = "nothing published yet" if found["version"] is None else f"version {found['version']}"
        left = f"; {found['left_out']:,} are not shown" if found["left_out"] else ""
        create_table_artifact(
            table, key="corpus-changes", description=f"Corpus {found['corpus']} since {since}: {counted}{left}"
        )
    return found


@stage("announce")
def announce_change(store_uri: str, config: CurationConfig, found: Json) -> Json:
    """Emit the event, unless a run waits that will see the change anyway."""
    return announce(config.model_copy(update={"store": store_uri}), found)


def bounded(found: Json) -> Json:
    """A look that may be recorded: at most `SHOWN` objects of each kind, without signed parts of their URLs.

    With the number of all of them, and how many were left out.
    """
    counts = {kind: len(found[kind]) for kind in KINDS}
    shown = {kind: [redacted(uri) for uri in found[kind][:SHOWN]] for kind in KINDS}
    return {**found, **shown, "counts": counts, "left_out": sum(max(0, count - SHOWN) for count in counts.values())}


def announce(config: CurationConfig, found: Json) -> Json:
    """Emit the event `curation.corpus.changed`, unless a run of the corpus waits to start.

    Returns
    -------
    dict
        {announced: whether it was emitted, waiting: name of the run that waits, or None}

    Raises
    ------
    TransientError
        The server does not answer, or answers that it cannot, so the event would be lost without an error.
    ConfigError
        The server refuses.
    """
    run = waiting_run(config)
    if run is not None:
        return {"announced": False, "waiting": run}
    resource = {
        "prefect.resource.id": f"curation.corpus.{config.corpus.name}",
        "prefect.resource.name": config.corpus.name,
        "curation.store": found["store"],
    }
    emit_event(EVENT, resource=resource, payload=bounded(found) if "counts" not in found else found)
    return {"announced": True, "waiting": None}


def waiting_run(config: CurationConfig) -> str | None:
    """Name of a run that will list the sources of this corpus for this store as soon as it starts; else None.

    Raises
    ------
    TransientError, ConfigError
    """
    mine = _identity(config.model_dump(include={"store": True, "corpus": {"name"}}))
    for flow, run in _about_to_start():
        if _identity(run.parameters.get("config")) == mine and not _is_stuck(flow, run):
            return run.name
    return None


def _about_to_start() -> Iterator[tuple[str, FlowRun]]:
    """Runs that have not begun and are due: not those of a schedule's days to come, not those that begin again.

    Each with the name of its flow.
    """
    due = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC) + _SOON),
    )
    with get_client(sync_client=True) as client:
        problem = client.api_healthcheck()
        if problem is not None:
            raise _unheard(problem) from problem
        try:
            for flow in _LISTING:
                named, offset = FlowFilter(name=FlowFilterName(any_=[flow])), 0
                while page := client.read_flow_runs(flow_filter=named, flow_run_filter=due, limit=_PAGE, offset=offset):
                    yield from ((flow, run) for run in page if run.run_count == 0)
                    offset += len(page)
        except httpx.HTTPError as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None
            if status is None or status >= 500:
                raise _unheard(error) from error
            raise ConfigError(
                f"the Prefect server refuses to list runs (status {status}); check the PREFECT_API_* variables"
            ) from error


def _unheard(problem: Exception) -> TransientError:
    return TransientError(
        f"the Prefect server does not answer ({type(problem).__name__}), so nobody was told of the change; "
        "check PREFECT_API_URL. The next look tells it again"
    )


def _identity(config: Any) -> tuple[str, str] | None:
    """Store and corpus of a configuration as a run's parameters have it."""
    try:
        return str(config["store"]).rstrip("/"), str(config["corpus"]["name"])
    except (KeyError, TypeError):  # parameters that are no configuration: the run will fail
        return None


def _is_stuck(flow: str, run: FlowRun) -> bool:
    state, now = run.state, datetime.now(UTC)
    if state is None:
        return False
    if state.is_pending():
        return now - state.timestamp > _STUCK
    due = run.expected_start_time
    is_late = state.name != _IN_LINE and due is not None and now - due > _STUCK
    return is_late and flow != _REINDEX
