"""A run as OpenLineage run events: what other lineage tools can read.

    runs/<run_id>/openlineage.jsonl     every event of the run, one JSON object a line, written when the run ends

One run is one OpenLineage run of the job `<flow>`, and each of its stages a child run of the job `<flow>.<stage>`,
in the namespace that the variable `OPENLINEAGE_NAMESPACE` names (`rise-ops` without it). Each begins with START and
ends with COMPLETE, FAIL or, where it was interrupted, ABORT. Run ids are UUIDs made from the store's URI, our run id
and the stage. Datasets are in `rise_ops.openlineage_datasets`; events are also sent while the run goes on, where a
transport is configured (`rise_ops.openlineage_sender`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast
from uuid import NAMESPACE_URL, UUID, uuid5

from openlineage.client.event_v2 import Job, Run, RunEvent, RunState
from openlineage.client.facet_v2 import (
    JobFacet,
    RunFacet,
    documentation_job,
    error_message_run,
    job_type_job,
    parent_run,
    processing_engine_run,
)
from openlineage.client.serde import Serde

from rise_ops import __version__
from rise_ops.config import CurationConfig
from rise_ops.openlineage_datasets import MAX_DATASETS, PRODUCER, Known, input_dataset, items_of, output_dataset
from rise_ops.openlineage_sender import Sender, open_sender
from rise_ops.redaction import error_text
from rise_ops.runs import lineage_key, now
from rise_ops.store import Store

Json = Mapping[str, Any]

_NAMESPACE = uuid5(NAMESPACE_URL, "urn:rise-ops:run")
_STAGES = {
    "ingest": "Reads what changed in the sources and publishes the corpus version.",
    "index": "Computes the signatures that the index lacks.",
    "compress": "Makes SimHash codes of the signatures that have none.",
    "value": "Scores every row on every target.",
    "select": "Ranks the rows and decides which are kept.",
    "export": "Publishes the kept rows.",
    "evaluate": "Measures the ranking against a label, and collects examples.",
    "examples": "Collects examples.",
}


def openlineage_run_id(store: Store, run_id: str) -> UUID:
    """The run's id in OpenLineage; the same whenever it is asked for."""
    return uuid5(_NAMESPACE, f"{store.uri}\n{run_id}")


class RunEvents:
    """The events of one run, as it goes on.

    Parameters
    ----------
    name
        Of the flow.
    record
        The run's record, which its owner fills; what it says at the time of an event goes into the event.
    """

    def __init__(self, store: Store, config: CurationConfig, *, name: str, record: Json) -> None:
        self._store = store
        self._config = config
        self._name = name
        self._record = record
        self._job_namespace = os.environ.get("OPENLINEAGE_NAMESPACE", "").strip() or "rise-ops"
        self._run_id = openlineage_run_id(store, record["run_id"])
        self._attempts: dict[str, int] = {}
        self._lines: list[str] = []
        self._last: RunEvent | None = None
        self._sender: Sender | None = None

    def __enter__(self) -> RunEvents:
        self._sender = open_sender()
        self._put(self._event(RunState.START))
        self._send()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Send the last event, now that the record is there, and wait a moment for what is under way."""
        if error is not None:
            self._put(self._event(_end_of(error), error=error))
        self._send()
        if self._sender is not None:
            self._sender.close(kept=self._store.url(lineage_key(self._record["run_id"])))

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[..., None]]:
        """A stage begins, for the first time or again. When it is complete, call what is given with its record
        and the columns of the sources that it read."""
        self._attempts[name] = self._attempts.get(name, 0) + 1
        self._put(self._event(RunState.START, name))
        self._send()
        try:
            yield self._complete
        except BaseException as error:
            self._put(self._event(_end_of(error), name, error=error))
            self._send()
            raise

    def _complete(self, stage: Json, sources: Mapping[str, Mapping[str, str]]) -> None:
        known = Known(
            self._store,
            self._config,
            self._record["corpus"].get("fields") or {},
            sources,
            self._record.get("targets") or {},
        )
        inputs, outputs = (items_of(self._store, stage[side]) for side in ("inputs", "outputs"))
        event = self._event(RunState.COMPLETE, stage["name"], cached=stage["cached"])
        event.inputs = [input_dataset(item, known) for item in inputs[:MAX_DATASETS]]
        event.outputs = [output_dataset(item, known, inputs[:MAX_DATASETS]) for item in outputs[:MAX_DATASETS]]
        omitted = [max(0, len(items) - MAX_DATASETS) for items in (inputs, outputs)]
        if any(omitted) and event.run.facets is not None:
            event.run.facets["riseOps_omitted"] = _own_facet(inputs=omitted[0], outputs=omitted[1])
        self._put(event)
        self._send()

    def finish(self, error: BaseException | None) -> None:
        """The run ends so: store its events. The last one is sent when the context is left."""
        self._put(self._event(_end_of(error), error=error))
        self._store.create(lineage_key(self._record["run_id"]), "".join(self._lines).encode())

    def _put(self, event: RunEvent) -> None:
        self._lines.append(Serde.to_json(event) + "\n")
        self._last = event

    def _send(self) -> None:
        if self._sender is not None and self._last is not None:
            self._sender.send(self._last)
        self._last = None

    def _event(
        self, state: RunState, stage: str | None = None, *, error: BaseException | None = None,
        cached: bool | None = None,
    ) -> RunEvent:  # fmt: skip
        run_id, job = self._run_id, self._name
        if stage is not None:
            run_id, job = uuid5(self._run_id, f"{stage}/{self._attempts[stage]}"), f"{self._name}.{stage}"
        return RunEvent(
            eventType=state,
            eventTime=now(),
            run=Run(str(run_id), self._run_facets(stage, error, cached)),
            job=Job(self._job_namespace, job, _job_facets(stage)),
            producer=PRODUCER,
        )

    def _run_facets(self, stage: str | None, error: BaseException | None, cached: bool | None) -> dict[str, RunFacet]:
        record, model = self._record, self._record["model"]
        facets: dict[str, RunFacet] = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
                __version__, "rise-ops", producer=PRODUCER
            ),
            "riseOps_curation": _own_facet(
                runId=record["run_id"],
                record=self._store.url(f"runs/{record['run_id']}/run.json"),
                configFingerprint=record["config_fingerprint"],
                code=dict(record["code"]),
                corpus={name: record["corpus"].get(name) for name in ("name", "version", "snapshot_id")},
                model={"name": model["name"], "revision": self._config.model.revision,
                       "fingerprint": model.get("fingerprint")},
                indexId=record["index_id"],
                cached=cached,
            ),
        }  # fmt: skip
        if stage is not None:
            parent = parent_run.Run(str(self._run_id)), parent_run.Job(self._job_namespace, self._name)
            facets["parent"] = parent_run.ParentRunFacet(*parent, producer=PRODUCER)
        if error is not None:
            facets["errorMessage"] = error_message_run.ErrorMessageRunFacet(
                error_text(error), "PYTHON", producer=PRODUCER
            )
        return facets


def _own_facet(**properties: Any) -> RunFacet:
    """A run facet that OpenLineage does not define; its name begins with `riseOps_`."""
    return cast(RunFacet, RunFacet(producer=PRODUCER).with_additional_properties(**properties))


def _job_facets(stage: str | None) -> dict[str, JobFacet]:
    kind = "FLOW" if stage is None else "STAGE"
    facets: dict[str, JobFacet] = {
        "jobType": job_type_job.JobTypeJobFacet("BATCH", "RISE_OPS", kind, producer=PRODUCER)
    }
    if stage in _STAGES:
        text = _STAGES[stage]
        facets["documentation"] = documentation_job.DocumentationJobFacet(text, producer=PRODUCER)
    return facets


def _end_of(error: BaseException | None) -> RunState:
    """How a run or a stage ended."""
    if error is None:
        return RunState.COMPLETE
    return RunState.FAIL if isinstance(error, Exception) else RunState.ABORT
