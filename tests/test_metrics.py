"""What stages cost: counted once, wherever tasks run, and written so that Prometheus reads it."""

from __future__ import annotations

import json
import multiprocessing
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.task_runners import ThreadPoolTaskRunner
from prometheus_client.parser import text_string_to_metric_families

from flows.curate import curate
from flows.index_corpus import index_corpus
from rise_ops.counters import Counters, count, counting
from rise_ops.errors import CurationError, SourceError, TransientError
from rise_ops.garbage import collect_garbage
from rise_ops.logs import log_fields
from rise_ops.metrics import (
    FOLDER_VARIABLE,
    StageUsage,
    exposition,
    metrics_key,
    publish_metrics,
    textfile_name,
)
from rise_ops.retry import retried
from rise_ops.runs import read_run
from rise_ops.store import Store
from rise_ops.threads import ContextPool
from rise_ops.verify import verify_store
from tasks.dispatch import Dispatcher, run_all
from tasks.index import sketch
from tasks.metering import USAGE, gathering, settled, slips
from tasks.policy import Json, stage
from tests.curation import ROWS, load, write_curation

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def _samples(text: str) -> Samples:
    """What Prometheus reads: value by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def test_what_a_task_does_in_threads_counts_for_it_and_for_no_other(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    meeting = threading.Barrier(2)

    def work(size: int) -> Counters:
        counters = Counters()
        with counting(counters), ContextPool(3) as pool:
            meeting.wait()
            list(pool.map(lambda number: store.create(f"blocks/{size}-{number}", bytes(size)), range(50)))
            list(pool.map(lambda number: store.get(f"blocks/{size}-{number}"), range(50)))
        return counters

    with ContextPool(2) as both:
        small, large = (counters.values() for counters in both.map(work, [10, 1_000]))
    assert (small["store_written_bytes"], small["store_read_bytes"], small["requests"]) == (500, 500, 100)
    assert (large["store_written_bytes"], large["store_read_bytes"], large["requests"]) == (50_000, 50_000, 100)


def test_outside_of_a_task_nothing_is_counted() -> None:
    before = Counters()
    with counting(before):
        pass
    count("rows", 5)
    assert set(before.values().values()) == {0}


@pytest.mark.parametrize("backend", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_arrays_are_counted_in_zarrs_own_thread(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    import numpy as np
    import zarr

    where = str(tmp_path) if backend == "local" else f"s3://{request.getfixturevalue('s3_bucket')}"
    counters = Counters()
    with counting(counters):
        array = zarr.create_array(
            Store(where).zarr("indexes/x"), shape=(4, 1_000), chunks=(1, 1_000), dtype="f4", compressors=None
        )
        array[:] = np.ones((4, 1_000), np.float32)
    written = counters.values()["store_written_bytes"]
    assert 16_000 < written < 20_000
    with counting(counters):
        read: Any = zarr.open_array(Store(where).zarr("indexes/x", read_only=True), mode="r")[:]
        assert read.sum() == 4_000
    assert 16_000 < counters.values()["store_read_bytes"] < 20_000
    assert counters.values()["store_written_bytes"] == written


def test_a_request_that_is_tried_again_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rise_ops.retry.time.sleep", lambda _: None)
    faults = iter([TransientError("slow down"), TransientError("slow down"), None])

    def ask() -> str:
        fault = next(faults)
        if fault is not None:
            raise fault
        return "there"

    counters = Counters()
    with counting(counters):
        assert retried(lambda: retried(ask)) == "there"
    assert counters.values()["retries"] == 2


_meeting = threading.Barrier(2)
_failed: set[int] = set()


@stage("counted")
def counted(store_uri: str, number: int) -> Json:
    """Count so many rows, at the same time as another task; the first attempt at 7 fails after its rows."""
    count("rows", number)
    if number == 7 and number not in _failed:
        _failed.add(number)
        raise TransientError("at first")
    _meeting.wait(30)
    return {"number": number}


@stage("remembered", key=lambda call: call["number"])
def remembered(store_uri: str, number: int) -> Json:
    """Cached by Prefect."""
    count("rows", number)
    return {"number": number}


@flow
def two(what: Any, numbers: list[int]) -> tuple[list[Json], list[Json]]:
    """Results, and what was gathered of their cost."""
    gathered: list[Json] = []
    runner = Dispatcher(ThreadPoolTaskRunner(max_workers=2), window=2)
    with gathering(gathered.append), log_fields(run_id="one", stage="index"), runner:
        results = run_all(runner, what, [{"number": number} for number in numbers], store_uri="-")
    return results, gathered


@pytest.mark.usefixtures("prefect_harness")
def test_two_tasks_at_once_in_one_process_are_counted_once_each() -> None:
    results, gathered = two(counted, [100, 7])
    assert results == [{"number": 100, "cached": False}, {"number": 7, "cached": False}]  # nothing of the cost is left
    assert sorted((usage["rows"], usage["task_retries"]) for usage in gathered) == [(14, 1), (100, 0)]
    assert {usage["stage"] for usage in gathered} == {"index"}
    assert len({usage["worker"] for usage in gathered}) == 1


@pytest.mark.usefixtures("prefect_harness")
def test_what_prefect_remembers_is_not_paid_again() -> None:
    _, first = two(remembered, [31, 32])
    again, second = two(remembered, [31, 32])
    assert sorted(usage["rows"] for usage in first) == [31, 32]
    assert second == []
    assert all(result["cached"] for result in again)


def _elsewhere(task: bytes, slip: Json) -> Json:
    from distributed.protocol.pickle import loads

    found: Json = loads(task).fn("-", number=40, slip=slip)
    return found


@stage("there")
def there(store_uri: str, number: int) -> Json:
    """Count so many rows."""
    count("rows", number)
    return {"number": number}


def test_a_task_in_another_process_brings_its_cost_along() -> None:
    from distributed.protocol.pickle import dumps

    with log_fields(run_id="one", stage="index"):
        (slip,) = slips(1)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(_elsewhere, (dumps(there), slip))
    gathered: list[Json] = []
    with gathering(gathered.append):
        assert settled(result, cached=False) == {"number": 40, "cached": False}
    (usage,) = gathered
    assert (usage["rows"], usage["stage"]) == (40, "index")
    assert usage["worker"] != f"{usage['worker'].rpartition(':')[0]}:{multiprocessing.current_process().pid}"
    assert 0 <= usage["waited"] < 300


def test_called_directly_a_task_returns_what_its_function_does() -> None:
    assert there.fn("-", 3) == {"number": 3}
    assert USAGE in there.fn("-", 3, slip=slips(1)[0])
    assert sketch.fn.__name__ == "sketch"  # what Prefect names tasks by


@pytest.mark.usefixtures("prefect_harness")
def test_a_run_tells_what_its_stages_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    textfiles = tmp_path / "textfiles"
    textfiles.mkdir()
    monkeypatch.setenv(FOLDER_VARIABLE, str(textfiles))
    path = write_curation(tmp_path)
    with (tmp_path / "raw" / "part-0.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    config = load(path, "limits.bad_rows=5", "runner.workers=2")
    summary = curate(config)
    store = Store(config.store)

    record = read_run(store, summary["run_id"])
    found = record["metrics"]
    assert {name: found[name]["rows"] for name in ("ingest", "index", "value", "select", "export")} == {
        "ingest": ROWS, "index": ROWS, "value": ROWS, "select": ROWS, "export": summary["rows_kept"],
    }  # fmt: skip
    assert found["index"]["tokens"] == summary["tokens"]
    assert (found["ingest"]["rejected"], found["ingest"]["task_retries"], found["ingest"]["workers"]) == (1, 0, 1)
    assert found["ingest"]["source_read_bytes"] >= sum(file.stat().st_size for file in (tmp_path / "raw").iterdir())
    assert found["index"]["store_written_bytes"] > ROWS * config.sketch.dim * 2
    assert all(found[stage["name"]]["seconds"] > 0 for stage in record["stages"])
    assert json.loads(json.dumps(found)) == found

    text = store.get(metrics_key(summary["run_id"])).decode()
    samples = _samples(text)
    labels = {"store": config.store, "corpus": "tiny", "flow": "curate"}
    assert _value(samples, "curate_run_success", **labels) == 1
    assert _value(samples, "curate_stage_rows", **labels, stage="index") == ROWS
    assert _value(samples, "curate_corpus_rejected_rows", **labels) == 1
    assert summary["run_id"] not in text  # ids would be new series with every run
    (published,) = textfiles.iterdir()
    assert published.name == textfile_name(record)
    assert re.fullmatch(r"curate_tiny_[0-9a-f]{8}\.prom", published.name)
    assert _samples(published.read_text()) == samples

    with get_client(sync_client=True) as client:
        keyed = ArtifactFilter(key=ArtifactFilterKey(any_=["curation-metrics"]))
        artifact = max(client.read_artifacts(artifact_filter=keyed), key=lambda each: str(each.created))
    table = {row["stage"]: row for row in json.loads(str(artifact.data))}
    assert table["index"]["rows"] == ROWS and table["check"]["tasks"] == 1

    assert verify_store(store, deep=True)["broken"] == []
    assert metrics_key(summary["run_id"]) not in collect_garbage(store, dry_run=True)["keys"]

    second = curate(config)  # nothing to do costs next to nothing
    idle = read_run(store, second["run_id"])["metrics"]
    assert {idle[name]["rows"] for name in ("ingest", "index", "value", "export")} == {0}


@pytest.mark.usefixtures("prefect_harness")
def test_a_failed_run_says_so_and_keeps_the_time_of_the_last_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    config = load(write_curation(tmp_path))
    index_corpus(config)
    (file,) = tmp_path.glob("index_corpus_tiny_*.prom")
    labels = {"store": config.store, "corpus": "tiny", "flow": "index_corpus"}
    succeeded = _value(_samples(file.read_text()), "curate_run_finished_timestamp_seconds", **labels)
    for part in (tmp_path / "raw").iterdir():
        part.unlink()
    for _ in range(2):
        with pytest.raises(SourceError):
            index_corpus(config, run_id=None)
        after = _samples(file.read_text())
        assert _value(after, "curate_run_success", **labels) == 0
        assert _value(after, "curate_run_finished_timestamp_seconds", **labels) > succeeded
        assert _value(after, "curate_run_last_success_timestamp_seconds", **labels) == succeeded
        assert _value(after, "curate_stage_tasks", stage="check", **labels) == 1
    failed = [name for name in Store(config.store).children("runs") if "failed" in _status(config.store, name)]
    assert len(failed) == 2
    assert all(Store(config.store).exists(metrics_key(name)) for name in failed)


def _status(store: str, run_id: str) -> str:
    return str(read_run(Store(store), run_id)["status"])


@pytest.mark.usefixtures("prefect_harness")
def test_metrics_that_cannot_be_written_fail_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "nowhere"))
    config = load(write_curation(tmp_path))
    summary = curate(config, "ingest")
    assert "takes no metrics" in caplog.text
    assert Store(config.store).exists(metrics_key(summary["run_id"]))


def _record(**changes: Any) -> Json:
    ended = {"finished": "2026-01-31T00:00:00.000+00:00", "seconds": 1.5, "status": "completed"}
    what = {"run_id": "one", "name": "curate", "config": {"store": "s3://b/one"}, "corpus": {"name": "c"}}
    return {**what, "counts": {}, "metrics": {}, **ended, **changes}


def test_labels_are_escaped() -> None:
    name = 'a"b\\c\nd{}'
    samples = _samples(exposition(_record(corpus={"name": name})).decode())
    assert _value(samples, "curate_run_success", store="s3://b/one", corpus=name, flow="curate") == 1


def test_corpora_of_one_name_in_two_stores_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    publish_metrics(_record())
    publish_metrics(_record(config={"store": "s3://b/two"}, status="failed"))
    publish_metrics(_record(config={"store": "s3://b/one/"}))
    samples = {name: value for file in tmp_path.iterdir() for name, value in _samples(file.read_text()).items()}
    assert len(list(tmp_path.iterdir())) == 2
    assert _value(samples, "curate_run_success", store="s3://b/one", corpus="c", flow="curate") == 1
    assert _value(samples, "curate_run_success", store="s3://b/two", corpus="c", flow="curate") == 0


def test_the_label_of_a_store_holds_no_secret() -> None:
    record = _record(config={"store": "s3://me:planted@b/one"}, metrics={"index": StageUsage().figures()})
    assert b"planted" not in exposition(record) and b"s3://***@b/one" in exposition(record)


def test_a_file_that_cannot_be_read_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    file = tmp_path / textfile_name(_record())
    for content in (b"curate_run_last_success_timestamp_seconds{ not this\n", b"\xff\xfe", b""):
        file.write_bytes(content)
        publish_metrics(_record(status="failed"))
        samples = _samples(file.read_text())
        assert _value(samples, "curate_run_success", store="s3://b/one", corpus="c", flow="curate") == 0
        assert not [name for name, _ in samples if "last_success" in name]
        assert [each.name for each in tmp_path.iterdir()] == [file.name]
    monkeypatch.setenv(FOLDER_VARIABLE, str(file))
    with pytest.raises(CurationError, match="check the folder"):
        publish_metrics(_record())


def test_every_metric_is_described() -> None:
    counts = dict.fromkeys(("rows", "rows_rejected", "rows_kept", "tokens"), 1)
    record = _record(counts=counts, metrics={"index": StageUsage().figures()})
    names = {name for name, _ in _samples(exposition(record).decode())}
    assert len(names) > 20
    described = (Path(__file__).parents[1] / "deployments" / "operating.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", described))
    short = {name: re.sub("curate_(corpus|stage)", "", name) for name in names}
    assert {name for name in names if told.isdisjoint((name, short[name]))} == set()
