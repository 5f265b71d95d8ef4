"""What all tasks share: when to retry, what to cache, and how far to trust the cache.

Retries are for faults that pass (`rise_ops.errors.is_transient`), with exponential backoff and jitter.
A result is cached under (stage, stage version, estimator version, store, the call's own identity). The cache
only saves work: before a cached result is used, the store must hold what it says, or the task runs again. The
store is the truth; a cached result that is lost or wrong costs time and nothing else.

Tags are for limits that a server's owner sets (`prefect concurrency-limit create gpu 1`): tasks with the tag of a limit
then run at most so many at a time, over all runs on that server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect import Task, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff

from rise_ops.errors import is_transient
from rise_ops.hashing import fingerprint
from tasks.metering import SLIP, metered

Json = dict[str, Any]
Call = Mapping[str, Any]

RETRIES = 3

GPU = "gpu"
"""Tag of the tasks that run the model."""
S3 = "s3"
"""Tag of the tasks that move much data between sources, store and worker, on S3 or elsewhere."""


def _retry(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    error = state.data if isinstance(state.data, BaseException) else None
    if error is None:
        error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_transient(error)


def stage(
    name: str,
    *,
    version: int = 1,
    key: Callable[[Call], Any] | None = None,
    tags: Sequence[str] = (),
) -> Callable[[Callable[..., Json]], Task[..., Json]]:
    """Make a function a task of a stage.

    Parameters
    ----------
    version
        Raised when the stage computes something else from the same input: old results no longer count.
    key
        From the call's parameters, what its result depends on. Without it, or where it gives None, never cached.
    tags
        GPU, S3, or both.
    """

    def cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str | None:
        from rise_ops.signatures import ESTIMATOR_VERSION

        identity = None if key is None else key(parameters)
        if identity is None:
            return None
        return f"{name}-{fingerprint([name, version, ESTIMATOR_VERSION, parameters['store_uri'], identity])}"

    def wrap(function: Callable[..., Json]) -> Task[..., Json]:
        cached: Json = {"cache_key_fn": cache_key} if key else {"cache_policy": NO_CACHE}
        return task(
            name=name,
            task_run_name=lambda: _run_name(name),
            tags=tags,  # none where none is needed: for each, Prefect asks its server before the task begins
            retries=RETRIES,
            retry_delay_seconds=exponential_backoff(1),
            retry_jitter_factor=0.5,
            retry_condition_fn=_retry,
            persist_result=True,
            result_serializer="json",
            **cached,
        )(metered(name, function))

    return wrap


def _run_name(name: str) -> str:
    """The stage, which of its tasks this is, and how much it has of the work."""
    parameters = runtime.task_run.parameters
    slip = parameters.get(SLIP) or {"of": 1}
    if slip["of"] > 1:
        name = f"{name} {slip['position']}/{slip['of']}"
    for kind in ("objects", "blocks"):
        items = parameters.get(kind)
        if items:
            first = items[0][:12] if kind == "blocks" else str(items[0]["uri"]).rsplit("/", 1)[-1][:40]
            several = f"{len(items)} {kind} from" if len(items) > 1 else kind.removesuffix("s")
            return f"{name}: {several} {first}"
    return f"{name}: {parameters['name']}" if "name" in parameters else name
