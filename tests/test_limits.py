"""Limits on tasks that share a GPU or a bucket: tags that a server's owner can limit, over all runs."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import pytest
from prefect import Task, flow
from prefect.client.orchestration import get_client
from prefect.task_runners import ThreadPoolTaskRunner

from rise_ops.threads import ContextPool
from tasks import attribute, closed_loop, compare, index, ingest, maintain, publish, tune, value, watch
from tasks.dispatch import Dispatcher, run_all
from tasks.policy import GPU, S3, Json, stage

_lock = threading.Lock()
_running = 0
_most = 0


@stage("model", tags=[GPU])
def with_model(store_uri: str, number: int) -> Json:
    """Count how many such tasks are at work at once."""
    global _running, _most
    with _lock:
        _running += 1
        _most = max(_most, _running)
    time.sleep(0.3)
    with _lock:
        _running -= 1
    return {"number": number}


@flow
def two_at_a_time(first: int) -> list[Json]:
    """Two tasks on two threads."""
    with Dispatcher(ThreadPoolTaskRunner(max_workers=2), window=2) as runner:
        return run_all(runner, with_model, [{"number": first}, {"number": first + 1}], store_uri="-")


def _most_at_once() -> int:
    """Tasks that were at work at once, at most, in two runs at the same time."""
    global _most
    _most = 0
    with ContextPool(2) as pool:
        runs: list[Future[list[Json]]] = [pool.submit(two_at_a_time, first) for first in (0, 10)]
        assert [item["number"] for run in runs for item in run.result()] == [0, 1, 10, 11]
    return _most


@pytest.mark.usefixtures("prefect_harness")
def test_two_runs_share_a_limited_tag() -> None:
    with get_client(sync_client=True) as client:
        client.create_concurrency_limit(tag=GPU, concurrency_limit=1)
        try:
            assert _most_at_once() == 1
        finally:
            client.delete_concurrency_limit_by_tag(GPU)
    # the other way round it would not be seen: a process remembers for a while that tags have no limit
    assert _most_at_once() > 1


def test_tasks_that_load_a_shared_resource_carry_its_tag() -> None:
    modules = (attribute, closed_loop, compare, index, ingest, maintain, publish, tune, value, watch)
    tasks = {each.name: each for module in modules for each in vars(module).values() if isinstance(each, Task)}
    tagged = {tag: {name for name, each in tasks.items() if tag in each.tags} for tag in (GPU, S3)}
    assert tagged[GPU] == {
        "open-model",
        "sketch",
        "target",
        "attribute",
        "tune",
        "examples",
        "base",
        "train",
        "measure",
    }
    assert tagged[S3] == {
        "ingest",
        "sketch",
        "compress",
        "value",
        "export",
        "examples",
        "attribute",
        "verify",
        "arms",
        "facts",
        "measure",
    }
