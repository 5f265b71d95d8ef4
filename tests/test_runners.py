"""Where tasks run changes nothing but time: threads, Dask and Ray, a worker that is killed, and GPUs."""

from __future__ import annotations

import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import runners, stages
from flows.curate import curate
from flows.index_corpus import index_corpus
from rise_ops import errors
from rise_ops.demo.corpus import pool_rows
from rise_ops.errors import ConfigError, CurationError, LimitError, WorkerError
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tasks.dispatch import Dispatcher, run_all
from tasks.policy import Json, stage
from tests import watched
from tests.curation import load, write_curation, write_lines
from tests.watched import notes

CLUSTERS = ("dask", "ray")
COPIES = 3
"""Of the demonstration's corpus, the beginnings of its texts: rows must be many, not long."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configuration of a corpus of some blocks."""
    folder = tmp_path_factory.mktemp("corpus")
    path = write_curation(folder)
    for copy in range(COPIES):
        rows = [{"text": f"{row.example.output[:40]} ({copy}, {number})", "label": row.label}
                for number, row in enumerate(pool_rows())]  # fmt: skip
        write_lines(folder / "raw" / f"more-{copy}.jsonl", rows)
    return path


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `tests.watched`; a task for every block or two."""
    folder = tmp_path / "watched"
    folder.mkdir()
    monkeypatch.setenv(watched.VARIABLE, str(folder))
    for name in ("open_model", "sketch", "sign_queries"):
        monkeypatch.setattr(stages, name, getattr(watched, f"watched_{name}"))
    monkeypatch.setattr(stages, "_SKETCH_ROWS", 700)
    return folder


def _decisions(store: str, run_id: str) -> pl.DataFrame:
    rows = Store(store).scan_parquet([f"runs/{run_id}/decisions.parquet"])
    return rows.select("doc_id", "value", "rank", "kept").sort("doc_id", "rank").collect()


@pytest.fixture(scope="module")
def threads_run(prefect_harness: None, corpus: Path) -> tuple[str, Json]:
    """Store and summary of a run on threads."""
    config = load(corpus)
    return config.store, curate(config, "value")


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_killed_worker_costs_its_blocks_and_changes_no_result(
    kind: str, corpus: Path, watch: Path, tmp_path: Path, threads_run: tuple[str, Json], record_property: Any
) -> None:
    store, expected = threads_run
    (watch / "die").touch()
    config = load(corpus, f"store={tmp_path / 'store'}", f"runner={{kind: {kind}, workers: 2}}")
    found = curate(config, "value")
    assert (watch / "died").exists()

    same = ("snapshot_id", "index_id", "rows", "rows_sketched", "tokens", "rows_kept")
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    before, after = _decisions(store, expected["run_id"]), _decisions(config.store, found["run_id"])
    assert after["doc_id"].to_list() == before["doc_id"].to_list()
    assert after["value"].to_numpy() == pytest.approx(before["value"].to_numpy(), abs=1e-4)
    assert verify_store(Store(config.store), deep=True)["broken"] == []

    loads, tasks = notes(watch, "loads"), notes(watch, "tasks")
    workers = {process for process, _ in loads}
    assert len(loads) == len(workers)  # the model was loaded once in each process
    assert len({process for process, _ in tasks}) >= 2
    computed = sum(int(rows) for _, rows in notes(watch, "rows"))
    record_property("processes", len(workers))
    record_property("rows computed", computed)
    # no row is computed twice: the task of the killed worker found the block that it had stored
    assert computed == expected["rows_sketched"]


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("kind", ["dask", pytest.param("ray", marks=pytest.mark.thorough)])
def test_a_task_that_kills_every_worker_fails_the_run_by_name(
    kind: str, corpus: Path, watch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "1")  # three by default
    monkeypatch.setenv("RAY_TASK_MAX_RETRIES", "1")
    (watch / "die-always").touch()
    config = load(corpus, f"store={tmp_path / 'store'}", f"runner={{kind: {kind}, workers: 1}}")
    with pytest.raises(WorkerError, match="over a task of sketch"):
        index_corpus(config)
    deaths = len(notes(watch, "tasks"))
    (watch / "die-always").unlink()
    found = index_corpus(config)  # on from where it was
    assert found["rows_reused"] > 0
    assert found["rows_sketched"] + found["rows_reused"] == found["rows"]
    assert deaths >= 2


@contextmanager
def _processes(*commands: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for command in commands:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
def test_a_running_dask_cluster_gets_tasks_with_the_model_where_a_gpu_is(
    corpus: Path, watch: Path, tmp_path: Path
) -> None:
    port = _free_port()
    address = f"tcp://127.0.0.1:{port}"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    scheduler = [*command, "--host", "127.0.0.1", "--port", str(port)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    plain, gpu = [*worker, "--name", "plain"], [*worker, "--name", "gpu", "--resources", "GPU=1"]
    with _processes(scheduler, plain, gpu):
        config = load(
            corpus, f"store={tmp_path / 'store'}", f"runner={{kind: dask, workers: 2, address: '{address}', gpus: 1}}"
        )
        found = index_corpus(config)
    assert found["rows_sketched"] == found["rows"]
    assert len({process for process, _ in notes(watch, "tasks")}) == 1
    assert len(notes(watch, "tasks")) >= 3
    assert len(notes(watch, "loads")) == 1


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.usefixtures("prefect_harness")
def test_a_running_ray_cluster_gives_tasks_with_the_model_a_gpu(corpus: Path, watch: Path, tmp_path: Path) -> None:
    port, folder = _free_port(), tempfile.mkdtemp(prefix="ray-")  # a socket's path may have at most 107 characters
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=1"]
    quiet = ["--include-dashboard=false", f"--temp-dir={folder}", "--disable-usage-stats"]
    where = [f"--port={port}", "--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    with _processes([*ray, *quiet, *where]):
        _wait_for(port)
        config = load(
            corpus,
            f"store={tmp_path / 'store'}",
            f"runner={{kind: ray, workers: 2, address: '127.0.0.1:{port}', gpus: 1}}",
        )
        found = index_corpus(config)
    shutil.rmtree(folder, ignore_errors=True)
    assert found["rows_sketched"] == found["rows"]
    tasks = notes(watch, "tasks")
    assert len(tasks) >= 3
    assert {devices for _, devices in tasks} == {"0"}  # each had the one GPU
    assert len(notes(watch, "loads")) == len({process for process, _ in notes(watch, "loads")})


def _wait_for(port: int) -> None:
    for _ in range(300):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise RuntimeError(f"nothing listens on port {port}")


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize(("kind", "address"), [("dask", "tcp://127.0.0.1:9"), ("ray", "127.0.0.1:9")])
def test_a_cluster_that_does_not_answer_is_named(
    kind: str, address: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    config = load(corpus, f"store={tmp_path / 'store'}", f"runner={{kind: {kind}, address: '{address}'}}")
    with pytest.raises(WorkerError, match=rf"{address}.*check runner\.address"):
        index_corpus(config)


@pytest.mark.parametrize("kind", CLUSTERS)
def test_a_machine_with_too_few_gpus_is_said(kind: str, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "visible_devices", lambda: ["0", "1"])
    with pytest.raises(LimitError, match="3 workers with 1 GPUs each, this machine has 2"):
        runners.dispatcher(load(corpus, f"runner={{kind: {kind}, workers: 3, gpus: 1}}"))


def test_each_worker_of_this_machine_has_devices_of_its_own(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "visible_devices", lambda: ["4", "5", "6", "7"])
    made: Any = runners.dispatcher(load(corpus, "runner={kind: dask, workers: 2, gpus: 2}")).runner
    options = [worker["options"] for worker in made.cluster_kwargs["workers"].values()]
    assert [each["env"]["CUDA_VISIBLE_DEVICES"] for each in options] == ["4,5", "6,7"]
    assert [each["resources"] for each in options] == [{"GPU": 2}, {"GPU": 2}]


def test_a_kind_that_is_not_installed_is_said(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect_ray", None)
    with pytest.raises(ConfigError, match=r"install rise-ops\[ray\]"):
        runners.dispatcher(load(corpus, "runner.kind=ray"))


@pytest.mark.parametrize("change", ["{address: 'tcp://host:8786'}", "{gpus: 1}"])
def test_threads_have_no_cluster(change: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match="set kind to dask or ray"):
        load(corpus, f"runner={change}")


@stage("thirteenth")
def thirteenth(store_uri: str, number: int) -> Json:
    """Fail where the number is 13."""
    if number == 13:
        raise ConfigError("number 13")
    return {"number": number}


class _Counting(ThreadPoolTaskRunner[Any]):
    """Counts what was submitted and has not ended."""

    def __init__(self) -> None:
        super().__init__(max_workers=2)
        self.held = self.most = self.submitted = 0

    def submit(self, *arguments: Any, **options: Any) -> Any:
        self.held += 1
        self.submitted += 1
        self.most = max(self.most, self.held)
        future = super().submit(*arguments, **options)
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Any) -> None:
        self.held -= 1


@pytest.mark.usefixtures("prefect_harness")
def test_a_runner_never_has_more_than_its_window_and_gets_no_more_after_a_failure() -> None:
    counting = _Counting()

    @flow
    def many(first: int, calls: int) -> list[Json]:
        with Dispatcher(counting, window=3) as runner:
            numbers = range(first, first + calls)
            return run_all(runner, thirteenth, [{"number": number} for number in numbers], store_uri="-")

    assert [found["number"] for found in many(100, 20)] == list(range(100, 120))
    assert 2 <= counting.most <= 3 and counting.submitted == 20

    counting = _Counting()
    with pytest.raises(ConfigError, match="number 13"):
        many(10, 30)
    assert counting.submitted < 10


_ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CurationError)]


@pytest.mark.parametrize("kind", _ERRORS, ids=lambda kind: kind.__name__)
def test_errors_come_back_whole_from_another_process(kind: type[CurationError]) -> None:
    error = kind("what", "where") if kind is errors.DamagedError else kind("what")
    back = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(back) is kind
    assert str(back) == "what"
    assert vars(back) == vars(error)
