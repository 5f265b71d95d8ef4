"""Progress of long stages: to whoever listens in this process, and to a Prefect artifact once a second.

The command line listens to draw its bars; on a server the artifact moves instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import TaskRunContext

from rise_ops.progress import Progress

Listener = Callable[[str, int, int | None], None]

_PERIOD = 1.0
_listeners: list[Listener] = []
_lock = threading.Lock()
_done: dict[str, int] = {}


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(stage, done, total)` while the context lasts."""
    _done.clear()
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def stage_progress(stage: str, total: int | None) -> Progress:
    """Progress of one task of a stage. Tasks of a stage add up; `total` is the whole stage's."""
    artifact = None
    if total and TaskRunContext.get() is not None:
        text = f"{stage}: {total:,} rows"
        artifact = cast(UUID, create_progress_artifact(progress=0.0, key=f"progress-{stage}", description=text))
    seen = 0
    shown = time.monotonic()

    def report(done: int, _: int | None) -> None:
        nonlocal seen, shown
        with _lock:
            _done[stage] = _done.get(stage, 0) + done - seen
            seen = done
            for listener in _listeners:
                listener(stage, _done[stage], total)
        if artifact is not None and total and time.monotonic() - shown >= _PERIOD:
            shown = time.monotonic()
            update_progress_artifact(artifact, progress=min(100.0, 100.0 * _done[stage] / total))

    return report
