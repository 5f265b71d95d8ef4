"""OpenLineage events: what they say, that they fit their schemas, and that sending them never harms a run."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import polars as pl
import pytest
from openlineage.client.transport.http_common import DEFAULT_RETRY_CONFIG

from flows.curate import curate
from rise_ops import openlineage_sender
from rise_ops.config import CurationConfig, FieldMap
from rise_ops.corpus import read_version
from rise_ops.garbage import collect_garbage
from rise_ops.openlineage import RunEvents, openlineage_run_id
from rise_ops.openlineage_datasets import MAX_DATASETS, MAX_EDGES, split_uri, text_columns
from rise_ops.runs import code_identity, lineage_key, list_runs, read_run, reference, stage_record
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.curation import ROWS, load, write_curation
from tests.openlineage_schemas import check_event, facets_of

Json = dict[str, Any]

RUN = "20260131T235959-tiny-1a2b3c"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-aws",
    "AWS_SESSION_TOKEN": "planted-session-token",
    "OPENLINEAGE_API_KEY": "planted-key-of-lineage",
}


def read_events(store: Store, run_id: str) -> list[Json]:
    return [json.loads(line) for line in store.get(lineage_key(run_id)).splitlines()]


@pytest.fixture(scope="module")
def completed(prefect_harness: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Json, list[Json]]:
    """A store with one whole run, its record and its events."""
    config = load(write_curation(tmp_path_factory.mktemp("completed")))
    summary = curate(config)
    store = Store(config.store)
    return store, read_run(store, summary["run_id"]), read_events(store, summary["run_id"])


@pytest.fixture
def config(tmp_path: Path) -> CurationConfig:
    return load(write_curation(tmp_path))


@pytest.fixture(autouse=True)
def _in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is, what is sent arrives; what fails is not tried for long."""
    monkeypatch.setattr(openlineage_sender, "PATIENCE", 20.0)
    monkeypatch.setitem(DEFAULT_RETRY_CONFIG, "backoff_factor", 0.001)


def new_events(config: CurationConfig, run_id: str = RUN) -> RunEvents:
    """Of a run that nobody executes."""
    record = {
        "run_id": run_id,
        "config_fingerprint": config.fingerprint,
        "code": code_identity(),
        "model": {"name": config.model.name},
        "corpus": {"name": config.corpus.name},
        "index_id": None,
    }
    return RunEvents(Store(config.store), config, name="curate", record=record)


def done(config: CurationConfig, name: str, *, inputs: list[Json] | None = None) -> Json:
    output = reference(Store(config.store).url("corpora/tiny/versions/000000000001.json"), sha256="f" * 64, rows=3)
    return stage_record(name, started="", seconds=1.0, cached=False, inputs=inputs or [], outputs=[output])


def tell(config: CurationConfig) -> list[Json]:
    """A short run told in events; those that the store has then."""
    with new_events(config) as events:
        with events.stage("ingest") as complete:
            complete(done(config, "ingest"), {})
        events.finish(None)
    return read_events(Store(config.store), RUN)


# -- what events say


def test_each_job_starts_and_ends_in_order(completed: tuple[Store, Json, list[Json]]) -> None:
    _, record, events = completed
    stages = [f"curate.{stage['name']}" for stage in record["stages"]]
    expected = [("START", "curate"), *((state, name) for name in stages for state in ("START", "COMPLETE"))]
    assert [(event["eventType"], event["job"]["name"]) for event in events] == [*expected, ("COMPLETE", "curate")]
    times = [event["eventTime"] for event in events]
    assert times == sorted(times)
    assert {event["job"]["namespace"] for event in events} == {"rise-ops"}


def test_every_event_and_facet_fits_its_schema(completed: tuple[Store, Json, list[Json]]) -> None:
    _, _, events = completed
    for event in events:
        check_event(event)
    found = {name for event in events for name, _ in facets_of(event)}
    assert found >= {"parent", "processing_engine", "jobType", "documentation", "riseOps_curation", "schema", "version",
                     "dataSource", "storage", "columnLineage", "inputStatistics", "outputStatistics"}  # fmt: skip


def test_stages_name_their_parent_and_ids_can_be_computed(completed: tuple[Store, Json, list[Json]]) -> None:
    store, record, events = completed
    run_id = str(openlineage_run_id(store, record["run_id"]))
    assert record["openlineage_run_id"] == run_id
    assert UUID(run_id).version == 5
    ids = {event["job"]["name"]: event["run"]["runId"] for event in events}
    assert ids["curate"] == run_id
    assert len(set(ids.values())) == len(ids) == 1 + len(record["stages"])
    for event in events:
        assert event["run"]["runId"] == ids[event["job"]["name"]]
        parent = event["run"]["facets"].get("parent")
        if event["job"]["name"] == "curate":
            assert parent is None
        else:
            assert parent["run"] == {"runId": run_id, "facets": {}}
            assert (parent["job"]["namespace"], parent["job"]["name"]) == ("rise-ops", "curate")


def completed_stage(events: list[Json], name: str) -> Json:
    (event,) = [each for each in events if each["job"]["name"] == f"curate.{name}" and each["eventType"] == "COMPLETE"]
    return event


def test_a_run_says_what_it_was_made_with(completed: tuple[Store, Json, list[Json]]) -> None:
    store, record, events = completed
    said = events[-1]["run"]["facets"]["riseOps_curation"]
    assert said["runId"] == record["run_id"]
    assert said["record"] == store.url(f"runs/{record['run_id']}/run.json")
    assert said["configFingerprint"] == record["config_fingerprint"]
    assert said["code"]["fingerprint"] == record["code"]["fingerprint"]
    assert said["model"]["fingerprint"] == record["model"]["fingerprint"]
    assert said["indexId"] == record["index_id"]
    assert said["corpus"]["snapshot_id"] == record["corpus"]["snapshot_id"]


def fields_of(dataset: Json) -> list[str]:
    return [field["name"] for field in dataset["facets"]["schema"]["fields"]]


def test_the_schemas_are_those_of_the_files(completed: tuple[Store, Json, list[Json]]) -> None:
    store, record, events = completed
    (decisions,) = completed_stage(events, "select")["outputs"]
    assert decisions["namespace"] == "file"
    assert fields_of(decisions) == pl.scan_parquet(decisions["name"]).collect_schema().names()
    (export,) = completed_stage(events, "export")["outputs"]
    assert export["name"] == store.url("exports/tiny")
    assert export["facets"]["version"]["datasetVersion"] == "0001"
    data = pl.scan_parquet(f"{export['name']}/0001/data/*.parquet").collect_schema().names()
    assert sorted(fields_of(export)) == sorted(data)
    (scores,) = completed_stage(events, "value")["outputs"]
    (part,) = [file for file in Path(scores["name"]).glob("*.parquet") if "extremes" not in file.name]
    assert fields_of(scores) == pl.scan_parquet(part).collect_schema().names()
    (corpus,) = completed_stage(events, "ingest")["outputs"]
    assert corpus["facets"]["version"]["datasetVersion"] == record["corpus"]["snapshot_id"]
    block = next(Path(store.uri, "blocks").glob("*.parquet"))
    assert set(pl.scan_parquet(block).collect_schema().names()) < set(fields_of(corpus))


def test_counts_sizes_and_versions(completed: tuple[Store, Json, list[Json]]) -> None:
    store, record, events = completed
    ingest = completed_stage(events, "ingest")
    version = read_version(store, "tiny", 1)
    for entry, dataset in zip(version.sources, ingest["inputs"], strict=True):
        assert (dataset["namespace"], dataset["name"]) == ("file", entry.uri)
        assert dataset["facets"]["version"]["datasetVersion"] == entry.object_sha
        assert dataset["facets"]["storage"]["fileFormat"] == "json"
        statistics = dataset["inputFacets"]["inputStatistics"]
        assert (statistics["rowCount"], statistics["size"]) == (entry.rows, entry.size)
    (export,) = completed_stage(events, "export")["outputs"]
    statistics = export["outputFacets"]["outputStatistics"]
    size = sum(file.stat().st_size for file in Path(export["name"], "0001", "data").iterdir())
    assert (statistics["rowCount"], statistics["size"]) == (record["counts"]["rows_kept"], size)
    (decisions,) = completed_stage(events, "select")["outputs"]
    assert decisions["outputFacets"]["outputStatistics"]["rowCount"] == ROWS


def test_columns_come_from_columns_of_the_inputs(completed: tuple[Store, Json, list[Json]]) -> None:
    """Followed from the export to the sources and the queries; nothing leads to where it is not known."""
    _, _, events = completed
    edges: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for event in events:
        inputs = {dataset["name"]: dataset for dataset in event["inputs"]}
        for output in event["outputs"]:
            for column, found in output["facets"].get("columnLineage", {"fields": {}})["fields"].items():
                assert column.partition(".")[0] in fields_of(output)
                for edge in found["inputFields"]:
                    assert edge["field"].partition(".")[0] in fields_of(inputs[edge["name"]])
                    edges.setdefault((output["name"], column), set()).add((edge["name"], edge["field"]))
    export = completed_stage(events, "export")["outputs"][0]
    sources = {dataset["name"] for dataset in completed_stage(events, "ingest")["inputs"]}

    def origins(place: tuple[str, str]) -> set[tuple[str, str]]:
        return set().union(*(origins(each) for each in edges[place])) if place in edges else {place}

    assert origins((export["name"], "label")) == {(source, "label") for source in sources}
    assert origins((export["name"], "doc_id")) == {
        (source, name) for source in sources for name in ("instruction", "input", "output")
    }
    signed = {Path(name).parent.name for name, field in origins((export["name"], "value")) if field == "signature"}
    assert signed == {"targets"}
    assert {(source, "output") for source in sources} < origins((export["name"], "value"))
    assert export["facets"]["columnLineage"]["dataset"][0]["field"] == "kept"


def test_the_file_is_part_of_the_run(completed: tuple[Store, Json, list[Json]]) -> None:
    store, record, _ = completed
    assert not verify_store(store, deep=True)["broken"]
    keys = collect_garbage(store, dry_run=True)["keys"]
    assert lineage_key(record["run_id"]) not in keys


def test_a_failed_run_says_where_and_why_and_no_secret(
    prefect_harness: None, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"refused {' '.join(SECRETS.values())} at https://me:planted-password@host/a")

    monkeypatch.setattr("tasks.value.decide_once", fail)
    with pytest.raises(RuntimeError):
        curate(config)
    store = Store(config.store)
    (run_id,) = list_runs(store)
    events = read_events(store, run_id)
    for event in events:
        check_event(event)
    told = [(event["eventType"], event["job"]["name"]) for event in events]
    assert told[-3:] == [("START", "curate.select"), ("FAIL", "curate.select"), ("FAIL", "curate")]
    assert ("COMPLETE", "curate.value") in told
    for event in events[-2:]:
        error = event["run"]["facets"]["errorMessage"]
        assert error["message"] == "RuntimeError: refused *** *** *** at https://***@host/a"
    written = [store.get(key) for key, _ in store.list(f"runs/{run_id}")]
    assert len(written) >= 2
    for data in written:
        assert b"planted" not in data


def test_an_interrupted_run_is_aborted(config: CurationConfig) -> None:
    events = new_events(config)
    with pytest.raises(KeyboardInterrupt), events, events.stage("ingest"):
        raise KeyboardInterrupt
    assert [json.loads(line)["eventType"] for line in events._lines] == ["START", "START", "ABORT", "ABORT"]


def test_a_stage_that_runs_again_is_another_run(config: CurationConfig) -> None:
    with new_events(config) as events:
        with pytest.raises(ValueError, match="once"), events.stage("ingest"):
            raise ValueError("once")
        with events.stage("ingest") as complete:
            complete(done(config, "ingest"), {})
        events.finish(None)
    found = read_events(Store(config.store), RUN)
    assert [event["eventType"] for event in found] == ["START", "START", "FAIL", "START", "COMPLETE", "COMPLETE"]
    first, second = found[2]["run"]["runId"], found[4]["run"]["runId"]
    assert first == found[1]["run"]["runId"] != second == found[3]["run"]["runId"]


def test_ids_are_stable_and_differ_from_run_to_run(config: CurationConfig, tmp_path: Path) -> None:
    store = Store(config.store)
    assert openlineage_run_id(store, RUN) == openlineage_run_id(Store(f"file://{config.store}"), RUN)
    others = {openlineage_run_id(store, "x"), openlineage_run_id(Store(str(tmp_path)), RUN)}
    assert openlineage_run_id(store, RUN) not in others


def test_an_event_lists_so_many_datasets(config: CurationConfig) -> None:
    uris = [f"s3://raw/part-{number:04d}.jsonl" for number in range(250)]
    columns = {uri: {f"c{number}": "string" for number in range(60)} for uri in uris}
    with new_events(config) as events:
        with events.stage("ingest") as complete:
            complete(done(config, "ingest", inputs=[reference(uri) for uri in uris]), columns)
        events.finish(None)
    event = read_events(Store(config.store), RUN)[2]
    check_event(event)
    assert [dataset["name"] for dataset in event["inputs"]] == [uri.removeprefix("s3://raw/") for uri in uris[:100]]
    omitted = event["run"]["facets"]["riseOps_omitted"]
    assert (omitted["inputs"], omitted["outputs"]) == (250 - MAX_DATASETS, 0)
    fields = event["outputs"][0]["facets"]["columnLineage"]["fields"].values()
    assert MAX_EDGES // 2 < sum(len(field["inputFields"]) for field in fields) <= MAX_EDGES


@pytest.mark.parametrize(
    ("uri", "namespace", "name"),
    [
        ("s3://raw/a/b.jsonl", "s3://raw", "a/b.jsonl"),
        ("s3a://raw/a?b#c", "s3://raw", "a?b#c"),
        ("/mnt/a b.csv", "file", "/mnt/a b.csv"),
        ("file:///mnt/a.csv", "file", "/mnt/a.csv"),
        ("gs://bucket/a/b", "gs://bucket", "a/b"),
        ("https://me:secret@host:8443/a.jsonl?X-Amz-Signature=secret", "https://host:8443", "/a.jsonl"),
        ("memory://a/b", "memory://a", "/b"),
    ],
)
def test_names(uri: str, namespace: str, name: str) -> None:
    assert split_uri(uri) == (namespace, name)


@pytest.mark.parametrize(
    ("fields", "columns", "texts", "prompts"),
    [
        (FieldMap(text="body"), ["body", "text"], ["body"], []),
        (FieldMap(text="body", prompt="head"), ["body", "head"], ["head", "body"], ["head"]),
        (FieldMap(), ["text", "x"], ["text"], []),
        (FieldMap(), ["text", "prompt_text"], ["text"], ["prompt_text"]),
        (FieldMap(), ["prompt", "generation"], ["prompt", "generation"], ["prompt"]),
        (FieldMap(), ["instruction", "output"], ["instruction", "output"], []),
        (FieldMap(), ["x"], [], []),
    ],
)
def test_columns_of_the_text(fields: FieldMap, columns: list[str], texts: list[str], prompts: list[str]) -> None:
    assert text_columns(fields, columns) == (texts, prompts)


# -- how they are sent


class Backend:
    """A lineage server on loopback: keeps what it gets, and answers as told."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[Json] = queue.SimpleQueue()
        self.keys: set[str | None] = set()
        self.status = 201
        self.hanging: threading.Event | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if outer.hanging is not None:
                    outer.hanging.wait(60)
                outer.keys.add(self.headers["Authorization"])
                outer.events.put(json.loads(body))
                self.send_response(outer.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Backend]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def received(self) -> list[Json]:
        found = []
        while not self.events.empty():
            found.append(self.events.get())
        return found


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    with Backend().running() as server:
        monkeypatch.setenv("OPENLINEAGE_URL", server.url)
        yield server
    for thread in threading.enumerate():  # nothing of this test goes on in the next
        if thread.name == "openlineage":
            thread.join(60)


def without_tags(event: Json) -> Json:
    """An event without what the client adds: its own version."""
    event["run"]["facets"].pop("tags", None)
    return event


def test_a_server_gets_the_events_as_they_happen(
    config: CurationConfig, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with new_events(config) as events:
        seen = [backend.events.get(timeout=60)]
        with events.stage("ingest") as complete:
            seen.append(backend.events.get(timeout=60))  # while the stage goes on
            complete(done(config, "ingest"), {})
        events.finish(None)
    seen += backend.received()
    assert backend.keys == {f"Bearer {SECRETS['OPENLINEAGE_API_KEY']}"}
    assert [without_tags(event) for event in seen] == read_events(Store(config.store), RUN)
    assert "planted" not in json.dumps(seen)


def test_a_file_gets_the_events(config: CurationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "events.jsonl"
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", "file")
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__LOG_FILE_PATH", str(file))
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__APPEND", "true")
    kept = tell(config)
    assert [without_tags(json.loads(line)) for line in file.read_text().splitlines()] == kept


def test_a_configuration_file_counts(config: CurationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "openlineage.yml").write_text(
        f"transport:\n  type: file\n  log_file_path: {tmp_path}/told.jsonl\n  append: true\n"
    )
    monkeypatch.chdir(tmp_path)
    assert len(tell(config)) == len((tmp_path / "told.jsonl").read_text().splitlines()) == 4


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [entry.getMessage() for entry in caplog.records if entry.name.startswith("rise_ops")]


def test_without_a_transport_nothing_is_sent_or_printed(
    config: CurationConfig, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        assert len(tell(config)) == 4
    assert "openlineage" not in {thread.name for thread in threading.enumerate()}
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert "eventType" not in caplog.text
    assert capfd.readouterr() == ("", "")


def test_it_can_be_disabled(config: CurationConfig, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    assert len(tell(config)) == 4
    assert backend.received() == []


@pytest.mark.parametrize("kind", ["http", "no.such.Transport", "file"])
def test_a_wrong_configuration_is_a_warning(
    config: CurationConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT__TYPE", kind)
    assert len(tell(config)) == 4
    (warning,) = warnings_of(caplog)
    assert "configuration is wrong" in warning


def _refuses(backend: Backend) -> None:
    backend.status = 400


def _breaks(backend: Backend) -> None:
    backend.status = 500


def _hangs(backend: Backend) -> None:
    backend.hanging = threading.Event()


@pytest.mark.parametrize("fault", [_refuses, _breaks, _hangs])
def test_a_server_that_fails_costs_one_warning(
    config: CurationConfig,
    backend: Backend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Backend], None],
) -> None:
    monkeypatch.setattr(openlineage_sender, "PATIENCE", 20.0 if fault is _refuses else 0.1)
    fault(backend)
    assert len(tell(config)) == 4  # a server that hangs does so still
    (warning,) = warnings_of(caplog)
    assert warning.startswith("4 of 4 OpenLineage events were not sent")
    assert Store(config.store).url(lineage_key(RUN)) in warning
    if fault is _refuses:
        assert "status 400" in warning
    if backend.hanging is not None:
        backend.hanging.set()


def test_a_server_that_is_not_there(
    config: CurationConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(openlineage_sender, "PATIENCE", 0.1)
    assert len(tell(config)) == 4
    (warning,) = warnings_of(caplog)
    assert "4 of 4 OpenLineage events were not sent" in warning


def test_the_key_is_not_written_to_the_environment_again(
    config: CurationConfig, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("OPENLINEAGE_API_KEY", SECRETS["OPENLINEAGE_API_KEY"])
    before = dict(os.environ)
    tell(config)
    assert dict(os.environ) == before
    assert len(backend.received()) == 4


def test_the_namespace_can_be_chosen(config: CurationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "team-curation")
    assert {event["job"]["namespace"] for event in tell(config)} == {"team-curation"}
