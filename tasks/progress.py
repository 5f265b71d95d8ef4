"""Progress of long stages: to whoever listens in this process, and to a Prefect artifact once a second.

A flow makes a tracker for a stage. Tasks in the flow's own process report to it as they go on; for tasks elsewhere,
which cannot, it learns of each one that is done. The command line listens to draw its bars; on a server the artifact
moves instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext

from rise_ops.progress import Progress, silent
from tasks.telling import telling

Listener = Callable[[str, int, int | None], None]

_PERIOD = 1.0
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, rows done, rows in all)` for the trackers that are made while the context lasts."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Tracker:
    """How far a stage is. As a context manager, the one that the tasks submitted meanwhile report to.

    Parameters
    ----------
    stage
        Its name.
    sizes
        Size of each call: rows, or with `rows=False` something else that only the artifact measures by.
    rows
        Whether sizes are rows, so that what a task reports while it works counts.
    """

    def __init__(self, stage: str, sizes: Sequence[int], *, rows: bool = True) -> None:
        self._stage, self._sizes, self._rows = stage, list(sizes), rows
        self._total = sum(sizes)
        self._listener = _listener.get()
        self._lock = threading.Lock()
        self._seen: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        self._shown = time.monotonic()
        self._artifact: UUID | None = None
        if self._total and FlowRunContext.get() is not None:
            text = f"{stage}: {self._total:,} {'rows' if rows else 'bytes'}"
            with telling(f"progress of {stage}"):
                artifact = create_progress_artifact(progress=0.0, key=f"progress-{stage}", description=text)
                self._artifact = cast(UUID, artifact)

    def __enter__(self) -> Tracker:
        self._token: Token[Tracker | None] = _tracker.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _tracker.reset(self._token)

    def report(self, call: str, rows: int) -> None:
        """A task of this process has done so many rows so far."""
        with self._lock:
            self._seen[call] = rows
            part = self._heard()
        self._show(part)

    def finish(self, position: int, call: str) -> None:
        """A call is done, wherever it ran."""
        with self._lock:
            self._finished[call] = self._sizes[position]
            if self._rows:
                self._seen[call] = self._sizes[position]
            part = self._heard(last=len(self._finished) == len(self._sizes))
        self._show(part)

    def _heard(self, *, last: bool = False) -> int | None:
        """Tell the listener; what the artifact should show now, or None where it was shown a moment ago."""
        done = sum(self._seen.values())
        if self._listener is not None:
            self._listener(self._stage, done, self._total if self._rows else None)
        if not last and time.monotonic() - self._shown < _PERIOD:
            return None
        self._shown = time.monotonic()
        return done if self._rows else sum(self._finished.values())

    def _show(self, part: int | None) -> None:
        """Move the artifact. Not under the lock: a slow server would hold up all tasks."""
        if self._artifact is not None and part is not None:
            with telling(f"progress of {self._stage}"):
                update_progress_artifact(self._artifact, progress=min(100.0, 100.0 * part / self._total))


_tracker: ContextVar[Tracker | None] = ContextVar("tracker", default=None)


def stage_progress() -> Progress:
    """For a task to report the rows that it has done; silent where no tracker is in this process."""
    tracker, context = _tracker.get(), TaskRunContext.get()
    if tracker is None or context is None:
        return silent
    call = str(context.task_run.id)
    return lambda done, _: tracker.report(call, done)
