"""Dispatching tasks to a Prefect task runner: in order, with back-pressure, and to a GPU where they need one.

At most `window` tasks are with the runner at a time, so that a run of many tasks does not fill a shared scheduler
with its queue, and a run that fails submits no more. A worker that dies costs what it had not yet stored: the
scheduler gives its task to another, which finds in the store what was finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from prefect import Task
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from rise_ops.errors import WorkerError
from tasks.metering import SLIP, settled, slips
from tasks.policy import GPU, Call, Json
from tasks.progress import Tracker

Parameters = dict[str, Any]


@dataclass
class Dispatcher:
    """A task runner, and how it is used."""

    runner: TaskRunner[Any]
    window: int
    """Tasks that the runner has at a time."""
    on_gpu: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Within it, tasks are submitted to workers with a GPU."""
    lost: tuple[type[BaseException], ...] = field(default=())
    """What the runner raises where a task's worker died too often, or the runner itself is gone."""
    place: str = ""
    """What the runner connects to, for messages."""
    reach: Callable[[], None] = lambda: None
    """Called before the runner starts; raises OSError where nothing answers."""
    connect: Callable[[TaskRunner[Any]], None] = lambda _: None
    """Called once the runner has started; warns where tasks will have to wait."""

    def __enter__(self) -> Dispatcher:
        with ExitStack() as stack:
            try:
                self.reach()
                stack.enter_context(self.runner)
                self.connect(self.runner)
            except (OSError, *self.lost) as error:  # type: ignore[misc]
                raise WorkerError(f"the cluster {self.place} does not answer: {error}; check runner.address") from error
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, trace)

    def run(self, what: Task[..., Json], calls: Sequence[Parameters], done: Callable[[int, str], None]) -> list[Json]:
        """Results in the calls' order; `done(position, task run id)` is called as each is there.

        Raises
        ------
        WorkerError
            Workers died over a task.
        """
        handed = [{**call, SLIP: slip} for call, slip in zip(calls, slips(len(calls)), strict=True)]
        waiting = iter(enumerate(handed))
        futures: dict[int, PrefectFuture[Json]] = {}
        results: dict[int, Json] = {}
        ready: SimpleQueue[int] = SimpleQueue()
        while len(results) < len(calls):
            for position, call in islice(waiting, max(0, self.window - len(futures))):
                futures[position] = self._submit(what, call)
                futures[position].add_done_callback(lambda _, position=position: ready.put(position))  # type: ignore[misc]
            position = ready.get()
            future = futures.pop(position)
            try:
                results[position] = self._result(what, future)
            except Exception:
                for other in futures.values():  # whoever mends or collects now must not meet what they still write
                    other.wait()
                raise
            done(position, str(future.task_run_id))
        return [results[position] for position in range(len(calls))]

    def _submit(self, what: Task[..., Json], call: Parameters) -> PrefectFuture[Json]:
        with self.on_gpu() if GPU in what.tags else nullcontext():
            future: PrefectFuture[Json] = self.runner.submit(what, parameters=call)
            return future

    def _result(self, what: Task[..., Json], future: PrefectFuture[Json]) -> Json:
        try:
            value = future.result()
        except self.lost as error:
            raise WorkerError(
                f"workers died, or could not be reached, over a task of {what.name} ({type(error).__name__}); look at "
                "their logs (out of memory?), then give the same command again: what was finished is in the store"
            ) from error
        return settled(value, cached=future.state.name == "Cached")


def run_all(
    runner: Dispatcher,
    what: Task[..., Json],
    calls: Iterable[Call],
    *,
    store_uri: str,
    holds: Callable[[Mapping[str, Any], Json], bool] | None = None,
    tracker: Tracker | None = None,
) -> list[Json]:
    """Run one task for many calls; results in the calls' order, each with `cached`.

    Parameters
    ----------
    holds
        Of a task that may be cached: whether the store holds what a result says of a call. One that it does not
        hold is computed again.
    tracker
        Is told of each call that is done.
    """
    parameters = [{"store_uri": store_uri, **call} for call in calls]
    with tracker or nullcontext():
        results = runner.run(what, parameters, tracker.finish if tracker else lambda *_: None)
    if holds is not None:
        pairs = enumerate(zip(parameters, results, strict=True))
        wrong = [index for index, (call, found) in pairs if found["cached"] and not holds(call, found)]
        again = what.with_options(refresh_cache=True)
        renewed = runner.run(again, [parameters[index] for index in wrong], lambda *_: None)
        for index, found in zip(wrong, renewed, strict=True):
            results[index] = found
    return results
