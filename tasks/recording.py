"""The record of a run as it grows: stages with what they read and wrote, counts, and how it ended.

Used by flows as a context manager. Whatever way the run ends, its record is written once to the store; while it
lasts, the run gives signs of life (`rise_ops.alive`), so that no collector removes what it works with.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from rise_ops.alive import alive, wait_for_collectors
from rise_ops.config import CurationConfig
from rise_ops.damage import Damage, damage_of, note_damage, settle
from rise_ops.errors import ConfigError, CurationError, DamagedError
from rise_ops.examples import examples_key
from rise_ops.logs import log_fields
from rise_ops.metrics import RunUsage, amounts, publish_metrics, write_metrics
from rise_ops.openlineage import RunEvents, openlineage_run_id
from rise_ops.quarantine import quarantine_key
from rise_ops.redaction import error_text
from rise_ops.report import write_report
from rise_ops.runs import code_identity, decided_key, decisions_key, new_run_id, now, reference, stage_record, write_run
from rise_ops.store import Store
from tasks.metering import gathering
from tasks.run_logs import arrange_logs
from tasks.telling import telling

Json = dict[str, Any]

_logger = logging.getLogger(__name__)


class Stage:
    """Inputs and outputs of the stage that is running."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.inputs: list[Json] = []
        self.outputs: list[Json] = []
        self.cached = False
        self.columns: dict[str, dict[str, str]] = {}
        """Columns of sources and their types, by URI."""

    def read(self, key: str, *, sha256: str | None = None, rows: int | None = None) -> None:
        """Note an input in the store."""
        self.inputs.append(reference(self._store.url(key), sha256=sha256, rows=rows))

    def read_source(
        self, uri: str, *, sha256: str | None = None, rows: int | None = None, size: int | None = None
    ) -> None:
        """Note an input outside the store."""
        self.inputs.append(reference(uri, sha256=sha256, rows=rows, size=size))

    def wrote(self, key: str, *, sha256: str | None = None, rows: int | None = None, size: int | None = None) -> None:
        """Note an output."""
        self.outputs.append(reference(self._store.url(key), sha256=sha256, rows=rows, size=size))


class Recorder:
    """The record of one run."""

    def __init__(self, config: CurationConfig, *, name: str, run_id: str | None) -> None:
        self.store = Store(config.store)
        self.run_id = run_id or new_run_id(config.corpus.name)
        if run_id is not None and self.store.children(f"runs/{run_id}"):
            raise ConfigError(f"run {run_id} is in {config.store} already; give another run_id, or none")
        self.counts: Json = {}
        self.rows_sketched = 0
        """Over all attempts."""
        self._mended: set[str] = set()
        self._usage = RunUsage()
        self.report: str | None = None
        self._clock = time.perf_counter()
        self.record: Json = {
            "run_id": self.run_id,
            "name": name,
            "status": "completed",
            "error": None,
            "started": now(),
            "config": config.model_dump(mode="json"),
            "config_fingerprint": config.fingerprint,
            "code": code_identity(),
            "model": {"name": config.model.name},
            "corpus": {"name": config.corpus.name},
            "index_id": None,
            "counts": self.counts,
            "selection": None,
            "export": None,
            "stages": [],
        }
        self._events = RunEvents(self.store, config, name=name, record=self.record)
        self.record["openlineage_run_id"] = str(openlineage_run_id(self.store, self.run_id))

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Time a stage and keep its record; a stage that fails leaves none."""
        started, clock, stage = now(), time.perf_counter(), Stage(self.store)
        self.record["failed_stage"] = name
        with log_fields(stage=name), self._events.stage(name) as complete:
            _logger.info("stage begins")
            try:
                yield stage
            finally:
                self._account(name, time.perf_counter() - clock)
            self.record["failed_stage"] = None
            done = stage_record(
                name,
                started=started,
                seconds=time.perf_counter() - clock,
                cached=stage.cached,
                inputs=stage.inputs,
                outputs=stage.outputs,
            )
            self.record["stages"].append(done)
            with telling("lineage events"):
                complete(done, stage.columns)

    def _account(self, name: str, seconds: float) -> None:
        """A stage has ended: what it cost."""
        usage = self._usage.stage(name)
        usage.seconds += seconds
        told = amounts(usage.figures(), usage.seconds)
        _logger.info("stage ends after %.1f s, %d tasks: %s", seconds, usage.tasks, told)

    def mend(self, error: DamagedError) -> bool:
        """Note a broken object and forget what the stages have done so far, so that they can run again.

        False: it cannot be noted, or was made again once already.
        """
        # what this attempt decided is not for the next one, which may find the sources changed
        own = [key(self.run_id) for key in (decided_key, decisions_key, examples_key, quarantine_key)]
        try:
            damage = self._note(error)
            if damage is None or damage.key in self._mended:
                return False
            self.store.delete(own)
        except CurationError:  # a store that refuses would hide the error behind its own
            return False
        self._mended.add(damage.key)
        self.record["stages"] = []
        return True

    def _note(self, error: DamagedError) -> Damage | None:
        damage = damage_of(self.store, error)
        note_damage(self.store, [] if damage is None else [damage])
        return damage

    def __enter__(self) -> Recorder:
        with ExitStack() as stack:
            arrange_logs()
            stack.enter_context(log_fields(run_id=self.run_id))
            stack.enter_context(gathering(self._usage.add))
            _logger.info("run %s of flow %s begins", self.run_id, self.record["name"])
            try:
                stack.enter_context(alive(self.store, self.run_id))
                wait_for_collectors(self.store, self.run_id)
            except CurationError as error:  # there is nothing yet that a record could tell of, or no store for it
                self._end(error)
                self._tell_metrics()
                raise
            stack.enter_context(self._events)
            self._alive = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._alive:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        if isinstance(error, DamagedError):
            with suppress(CurationError):
                self._note(error)
        self._end(error)
        try:
            self._conclude(error)
        except BaseException as late:
            self._end(late)
            self._tell(late)
            raise
        self._tell(error)

    def _end(self, error: BaseException | None) -> None:
        """How the run ended, into its record and its log."""
        if error is not None:
            self.record |= {"status": "failed", "error": error_text(error)}
        self.record |= {"finished": now(), "seconds": round(time.perf_counter() - self._clock, 3)}
        self.record["metrics"] = self._usage.figures()
        how = "completed" if error is None else f"failed: {error_text(error).partition(chr(10))[0]}"
        _logger.info("run %s ends after %.1f s, %s", self.run_id, self.record["seconds"], how)

    def _conclude(self, error: BaseException | None) -> None:
        """The record and the report, without which a run is none."""
        if error is None:
            settle(self.store)
            write_run(self.store, self.record)
            self.report = write_report(self.store, self.run_id)
        else:
            with suppress(CurationError):  # a store that refuses would hide the error behind its own
                write_run(self.store, self.record)

    def _tell(self, error: BaseException | None) -> None:
        """What others want to know of the run."""
        with telling("lineage events"):
            self._events.finish(error)
        with telling("metrics in the store"):
            write_metrics(self.store, self.record)
        self._tell_metrics()
        if error is None:
            with telling("artifacts"):
                self._publish_artifacts()

    def _tell_metrics(self) -> None:
        with telling("metrics in the collector's folder"):
            publish_metrics(self.record)

    def summary(self) -> Json:
        """The run as `curate run --json` prints it."""
        names = ("rows", "rows_new", "rows_reused", "rows_sketched", "rows_rejected", "tokens", "rows_kept")
        return {
            "run_id": self.run_id,
            "snapshot_id": self.record["corpus"].get("snapshot_id"),
            "index_id": self.record["index_id"],
            **{name: self.counts.get(name) for name in names},
            "diff": self.record.get("diff"),
            "selection": self.record["selection"],
            "export": self.record["export"],
            "report": self.report,
            "seconds": self.record["seconds"],
            "stages": {
                stage["name"]: {"seconds": stage["seconds"], "cached": stage["cached"]}
                for stage in self.record["stages"]
            },
            "evaluation": self.record.get("evaluation"),
        }

    def _publish_artifacts(self) -> None:
        rows = [{"figure": name, "value": value} for name, value in self.counts.items()]
        create_table_artifact(rows, key="curation-summary", description=f"Run {self.run_id}")
        metrics = [{"stage": name, **figures} for name, figures in self.record["metrics"].items()]
        create_table_artifact(metrics, key="curation-metrics", description=f"What the stages of {self.run_id} cost")
        stages = "\n".join(
            f"| {stage['name']} | {stage['seconds']:.1f} | {'yes' if stage['cached'] else 'no'} |"
            for stage in self.record["stages"]
        )
        create_markdown_artifact(
            f"# Run {self.run_id}\n\nReport: `{self.report}`\n\nExport: `{self.record['export']}`\n\n"
            f"| stage | seconds | nothing to do |\n|---|---|---|\n{stages}\n",
            key="curation-run",
        )
        if self.report:
            link = self.report if "://" in self.report else Path(self.report).as_uri()
            create_link_artifact(link, key="curation-report", link_text=f"Report of run {self.run_id}")
