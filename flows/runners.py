"""Where the tasks of a run go: threads of the flow's process, or the worker processes of a Dask or Ray cluster.

`runner.address` names a running cluster; without it, one of `runner.workers` processes is made on this machine and
ends with the run. A worker process loads the model once and keeps it. With `runner.gpus`, tasks that run the model
go only to workers that have as many: Dask workers declare the resource `GPU`, Ray counts GPUs by itself. On one
machine each worker gets devices of its own.

Workers need the same release of this package, and the store and the sources under the same URLs. They read their
own `AWS_*` variables: credentials do not travel with tasks.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from rise_ops.config import CurationConfig, RunnerConfig
from rise_ops.devices import visible_devices
from rise_ops.errors import ConfigError, LimitError
from tasks.dispatch import Dispatcher

_logger = logging.getLogger(__name__)

_QUEUED = 2
"""Tasks for each worker of a cluster of our own: one that runs, one that waits for it to end."""
_CONNECT_SECONDS = 10.0
_STORE_BYTES = 128 * 2**20
"""Ray's shared memory; tasks exchange kilobytes."""


def dispatcher(config: CurationConfig) -> Dispatcher:
    """The configured runner.

    Raises
    ------
    ConfigError
        The package for this kind of runner is not installed.
    LimitError
        This machine has too few GPUs for its own workers.
    """
    runner = config.runner
    makers = {"threads": _threads, "dask": _dask, "ray": _ray}
    try:
        return makers[runner.kind](runner)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"runner.kind is {runner.kind}, and {error.name} is not installed; install rise-ops[{runner.kind}]"
        ) from error


def _threads(runner: RunnerConfig) -> Dispatcher:
    return Dispatcher(ThreadPoolTaskRunner(max_workers=runner.workers), window=runner.workers)


def _window(runner: RunnerConfig) -> int:
    """Another's cluster may run all it is given at once; one of our own keeps to its workers."""
    return runner.workers * (1 if runner.address else _QUEUED)


def _cores(runner: RunnerConfig) -> dict[str, str]:
    """Variables that give each worker on this machine its part of the cores; both schedulers would give it one."""
    cores = str(max(1, len(os.sched_getaffinity(0)) // runner.workers))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), cores)


def _place(runner: RunnerConfig) -> str:
    return "made for the run" if runner.address is None else f"at {runner.address}"


def _devices(runner: RunnerConfig) -> list[str]:
    """For each worker on this machine, its GPUs as CUDA_VISIBLE_DEVICES; empty where none are asked for."""
    if not runner.gpus:
        return []
    there = visible_devices()
    if len(there) < runner.workers * runner.gpus:
        raise LimitError(
            f"runner asks for {runner.workers} workers with {runner.gpus} GPUs each, this machine has {len(there)}; "
            "lower runner.workers, or name a cluster with runner.address"
        )
    return [",".join(there[first * runner.gpus :][: runner.gpus]) for first in range(runner.workers)]


def _dask(runner: RunnerConfig) -> Dispatcher:
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")  # read when it is imported, here and in the workers
    import dask
    import distributed
    from distributed.comm.core import CommClosedError
    from prefect_dask import DaskTaskRunner

    def on_gpu() -> AbstractContextManager[Any]:
        options: AbstractContextManager[Any] = dask.annotate(resources={"GPU": runner.gpus} if runner.gpus else {})
        return options

    def connect(started: TaskRunner[Any]) -> None:
        workers = started.client.scheduler_info(n_workers=-1)["workers"].values()  # type: ignore[attr-defined]
        _warn(runner, max((worker["resources"].get("GPU", 0) for worker in workers), default=0), len(workers))

    where: dict[str, Any] = {"address": runner.address}
    if runner.address is None:
        where = {"cluster_class": distributed.SpecCluster, "cluster_kwargs": _dask_cluster(runner)}
    lost = (distributed.KilledWorker, distributed.CancelledError, CommClosedError)
    return Dispatcher(DaskTaskRunner(**where), _window(runner), on_gpu, lost, _place(runner), connect=connect)


def _dask_cluster(runner: RunnerConfig) -> dict[str, Any]:
    """Arguments of a SpecCluster: like LocalCluster, with GPUs of its own for each worker."""
    import distributed

    devices, threads = _devices(runner), _cores(runner)
    options = {"nthreads": 1, "memory_limit": 0, "dashboard": False, "host": "127.0.0.1"}
    if devices:
        options["resources"] = {"GPU": runner.gpus}
    workers = {
        number: {
            "cls": distributed.Nanny,
            "options": {**options, "env": threads | ({"CUDA_VISIBLE_DEVICES": devices[number]} if devices else {})},
        }
        for number in range(runner.workers)
    }
    scheduler = {"cls": distributed.Scheduler, "options": {"dashboard": False, "host": "127.0.0.1", "port": 0}}
    return {"scheduler": scheduler, "workers": workers, "name": "curate", "silence_logs": logging.ERROR}


def _ray(runner: RunnerConfig) -> Dispatcher:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    def on_gpu() -> AbstractContextManager[Any]:
        # without max_calls Ray ends a worker, and with it the loaded model, after each task that has a GPU
        options: AbstractContextManager[Any] = remote_options(num_gpus=runner.gpus, max_calls=0)
        return options if runner.gpus else nullcontext()

    def connect(_: TaskRunner[Any]) -> None:
        resources = ray.cluster_resources()
        _warn(runner, int(resources.get("GPU", 0)), int(resources.get("CPU", 0)))

    init: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if runner.address is None:
        devices = _devices(runner)
        own = {"num_cpus": runner.workers, "num_gpus": len(devices) * runner.gpus}
        init["runtime_env"] = {"env_vars": _cores(runner)}
        init |= own | {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
    started = RayTaskRunner(address=runner.address, init_kwargs=init)
    lost = (ray.exceptions.RayError,)
    return Dispatcher(
        started, _window(runner), on_gpu, lost, _place(runner), reach=partial(_reach, runner.address), connect=connect
    )


def _reach(address: str | None) -> None:
    """Fail at once where nothing listens: Ray itself asks for minutes."""
    host, _, port = (address or "").rpartition("://")[2].partition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()


def _warn(runner: RunnerConfig, gpus: int, workers: int) -> None:
    """Say why tasks may have to wait: a cluster may grow, so it is no error."""
    if runner.address is None:
        return
    if not workers:
        _logger.warning("the cluster at %s has no workers yet; tasks wait for some", runner.address)
    elif gpus < runner.gpus:
        _logger.warning(
            "no worker of the cluster at %s offers %d GPU yet; tasks that run the model wait for one",
            runner.address, runner.gpus,
        )  # fmt: skip
