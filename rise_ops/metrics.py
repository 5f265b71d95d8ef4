"""Figures of a run for those who operate it: what each stage did, how fast, and what it cost.

    runs/<run_id>/metrics.prom    the figures in Prometheus' text format

Where the variable `CURATE_PROMETHEUS_DIR` names the folder of node_exporter's textfile collector, the same text
is written there as `<flow>_<corpus>_<store>.prom`, the store as a short hash, whichever way the run ended. All figures
are gauges: each file tells of the last run alone, and a counter that begins anew with every run would make `rate()`
take equal runs for none. Names have base units; labels are the store, the corpus, the flow and the stage, whose numbers
are small. Run ids are no label: every run would leave series behind. The time of the last success is carried over from
the file that a failed run replaces.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from rise_ops.counters import NAMES
from rise_ops.errors import StoreError
from rise_ops.redaction import redacted
from rise_ops.store import Store

Json = Mapping[str, Any]

FOLDER_VARIABLE = "CURATE_PROMETHEUS_DIR"

_LAST_SUCCESS = "curate_run_last_success_timestamp_seconds"
_COUNTS = {
    "rows": ("curate_corpus_rows", "Rows of the corpus."),
    "rows_rejected": ("curate_corpus_rejected_rows", "Rows of the corpus' sources that are in quarantine."),
    "rows_kept": ("curate_corpus_kept_rows", "Rows that the selection keeps."),
    "tokens": ("curate_corpus_tokens", "Tokens of the corpus."),
}
_STAGE = {
    "seconds": ("curate_stage_duration_seconds", "Wall time of the stage."),
    "busy_seconds": ("curate_stage_task_seconds", "Time of the stage's tasks together."),
    "waited_seconds": ("curate_stage_task_wait_seconds", "Time that the stage's tasks waited for a worker, together."),
    "queue": ("curate_stage_queue_tasks", "Tasks that waited for a worker, on the average over the stage."),
    "tasks": ("curate_stage_tasks", "Tasks that ran."),
    "task_retries": ("curate_stage_task_retries", "Attempts at tasks after the first."),
    "workers": ("curate_stage_workers", "Processes that ran tasks."),
    "rows": ("curate_stage_rows", "Rows taken in, computed, scored, ranked or exported."),
    "rows_per_second": ("curate_stage_rows_per_second", "Rows per second of wall time."),
    "tokens": ("curate_stage_tokens", "Tokens of computed rows."),
    "tokens_per_second": ("curate_stage_tokens_per_second", "Tokens per second of wall time."),
    "rejected": ("curate_stage_rejected_rows", "Rows that were rejected while sources were read."),
    "requests": ("curate_stage_store_requests", "Requests to the store."),
    "retries": ("curate_stage_request_retries", "Requests to store and sources that were tried again."),
    "store_read_bytes": ("curate_stage_store_read_bytes", "Bytes read from the store."),
    "store_written_bytes": ("curate_stage_store_written_bytes", "Bytes written to the store."),
    "source_read_bytes": ("curate_stage_source_read_bytes", "Bytes read from sources."),
}


@dataclass(slots=True)
class StageUsage:
    """What a stage's tasks cost together."""

    seconds: float = 0.0
    """Wall time; all else is of the tasks."""
    busy_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Between the moment when a task could have run and its start; of all tasks."""
    tasks: int = 0
    """That ran; a cached result needs none."""
    task_retries: int = 0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    """What `rise_ops.counters` counts."""
    workers: set[str] = field(default_factory=set)

    def add(self, usage: Json) -> None:
        """Add a task's usage."""
        self.tasks += 1
        self.busy_seconds += usage["seconds"]
        self.waited_seconds += usage["waited"]
        self.task_retries += usage["task_retries"]
        self.workers.add(usage["worker"])
        for name in NAMES:
            self.counted[name] += usage[name]

    def figures(self) -> dict[str, float]:
        """All figures, rates too; `queue` is the average number of waiting tasks (Little's law)."""
        wall = self.seconds or self.busy_seconds  # the check before the first stage is its task and nothing else
        rows, tokens = self.counted["rows"], self.counted["tokens"]
        rates = {"rows_per_second": rows, "tokens_per_second": tokens, "queue": self.waited_seconds}
        found = {
            "seconds": wall,
            "busy_seconds": self.busy_seconds,
            "waited_seconds": self.waited_seconds,
            "tasks": self.tasks,
            "task_retries": self.task_retries,
            **self.counted,
            "workers": len(self.workers),
            **{name: value / wall if wall else 0.0 for name, value in rates.items()},
        }
        return {name: round(value, 3) for name, value in found.items()}


class RunUsage:
    """What the stages of a run cost; a stage that ran twice is counted twice."""

    def __init__(self) -> None:
        self._stages: dict[str, StageUsage] = {}

    def add(self, usage: Json) -> None:
        """Add a task's usage."""
        self.stage(usage["stage"] or "check").add(usage)

    def stage(self, name: str) -> StageUsage:
        """That of a stage."""
        return self._stages.setdefault(name, StageUsage())

    def figures(self) -> dict[str, dict[str, float]]:
        """Figures by stage."""
        return {name: usage.figures() for name, usage in self._stages.items()}


def amounts(counted: Mapping[Any, float], seconds: float) -> str:
    """Counters as a line for a person; what is zero is left out."""
    wall = max(seconds, 1e-9)
    texts = {
        **{name: f"{counted[name]:,} {name} ({counted[name] / wall:,.0f}/s)" for name in ("rows", "tokens")},
        "rejected": f"{counted['rejected']:,} rejected",
        "retries": f"{counted['retries']:,} requests tried again",
        "source_read_bytes": f"{ByteSize(counted['source_read_bytes']).human_readable()} read from sources",
        "store_read_bytes": f"{ByteSize(counted['store_read_bytes']).human_readable()} read",
        "store_written_bytes": f"{ByteSize(counted['store_written_bytes']).human_readable()} written",
    }
    return ", ".join(text for name, text in texts.items() if counted[name]) or "nothing to count"


def metrics_key(run_id: str) -> str:
    """Where a run's figures are in the store."""
    return f"runs/{run_id}/metrics.prom"


def exposition(record: Json, *, last_success: float | None = None) -> bytes:
    """The figures of a run's record, which has ended, in Prometheus' text format.

    Parameters
    ----------
    last_success
        When a run of this flow on this corpus last succeeded, in seconds since 1970, if this one did not.
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()
    run = {"store": _store_label(record), "corpus": record["corpus"]["name"], "flow": record["name"]}

    def gauge(name: str, text: str, values: Iterable[tuple[dict[str, str], float | None]]) -> None:
        known = [(labels, value) for labels, value in values if value is not None]
        if known:
            made = Gauge(name, text, list(known[0][0]), registry=registry)
            for labels, value in known:
                made.labels(**labels).set(value)

    finished = datetime.fromisoformat(record["finished"]).timestamp()
    succeeded = record["status"] == "completed"
    gauge("curate_run_success", "Whether the last run succeeded (1) or failed (0).", [(run, float(succeeded))])
    gauge("curate_run_finished_timestamp_seconds", "When the last run ended.", [(run, finished)])
    gauge(_LAST_SUCCESS, "When a run last succeeded.", [(run, finished if succeeded else last_success)])
    gauge("curate_run_duration_seconds", "Wall time of the last run.", [(run, record["seconds"])])
    for count, (name, text) in _COUNTS.items():
        gauge(name, text, [(run, record["counts"].get(count))])
    stages = record.get("metrics") or {}
    for figure, (name, text) in _STAGE.items():
        gauge(name, text, [({**run, "stage": stage}, found[figure]) for stage, found in stages.items()])
    return generate_latest(registry)


def write_metrics(store: Store, record: Json) -> None:
    """Store the figures of a run that has ended."""
    store.create(metrics_key(record["run_id"]), exposition(record))


def _store_label(record: Json) -> str:
    return redacted(record["config"]["store"].rstrip("/"))


def textfile_name(record: Json) -> str:
    """Name of a run's file in the collector's folder: the same for all runs of a flow on a corpus of a store."""
    store = hashlib.sha256(_store_label(record).encode()).hexdigest()[:8]
    return f"{record['name']}_{record['corpus']['name']}_{store}.prom"


def publish_metrics(record: Json) -> None:
    """Write the figures for the textfile collector, if there is one. The file is whole at every moment.

    Raises
    ------
    StoreError
        The folder cannot be written.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "").strip()
    if not folder:
        return
    path = Path(folder) / textfile_name(record)
    before = path.with_name(f".{path.name}.{os.getpid()}")  # the collector reads *.prom
    try:
        before.write_bytes(exposition(record, last_success=_last_success(path)))
        before.chmod(0o644)  # the collector is another user
        before.replace(path)
    except OSError as error:
        with suppress(OSError):
            before.unlink()
        raise StoreError(f"{FOLDER_VARIABLE}={folder} takes no metrics: {error.strerror}; check the folder") from error


def _last_success(path: Path) -> float | None:
    """What the file of an earlier run says; None where it says nothing that can be read."""
    from prometheus_client.parser import text_string_to_metric_families

    try:
        families = text_string_to_metric_families(path.read_text(encoding="utf-8"))
        return next((sample.value for family in families for sample in family.samples if sample.name == _LAST_SUCCESS),
                    None)  # fmt: skip
    except (OSError, ValueError):
        return None
