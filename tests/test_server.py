"""The deployments at work: a Prefect server, a worker, a bucket, and what is deployed from `deployments/prefect.yaml`.

One server serves all tests here but the one of PostgreSQL. Schedules are paused, so that what happens is what a test
wants to happen.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from rise_ops.corpus import CorpusVersion, current_version
from rise_ops.store import Store
from tests import prefect_server
from tests.conftest import s3_filesystem, use_server
from tests.curation import ROWS
from tests.prefect_server import POOL, TEAMS, PrefectServer, deploy, tiny_curations, wait
from tests.servers import S3Server

pytestmark = pytest.mark.slow

EVENT = "curation.corpus.changed"
WATCH, REINDEX, CURATE = "watch_corpus/support-watch", "index_corpus/support-reindex", "curate/support-curate"
Record = Callable[[str, object], None]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scene:
    """A deployed curation of a bucket."""

    server: PrefectServer
    bucket: str

    @property
    def store(self) -> Store:
        return Store(f"s3://{self.bucket}/support/store")

    def put(self, name: str, *texts: str) -> str:
        """Add an object of rows to the bucket; its URI."""
        key = f"{self.bucket}/support/raw/{name}.jsonl"
        s3_filesystem().pipe_file(key, b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts))
        return f"s3://{key}"

    def published(self) -> CorpusVersion:
        """The current version of the corpus, which is made if there is none."""
        version = current_version(self.store, "support")
        if version is None:
            self.server.result(self.server.start(CURATE))
            version = current_version(self.store, "support")
        assert version is not None
        return version

    def look(self) -> Json:
        """One look by the watcher's deployment."""
        found: Json = self.server.result(self.server.start(WATCH))
        return found

    def new_run(self, known: list[Json]) -> Json:
        """The first run of the re-indexing that is not known."""
        ids = {run["id"] for run in known}
        return wait(
            lambda: next((run for run in self.server.runs(REINDEX) if run["id"] not in ids), None),
            "a run of the re-indexing",
            log=self.server.folder / "server.log",
        )


@pytest.fixture(scope="module")
def scene(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("prefect-server")
    bucket = f"tests/{uuid.uuid4().hex[:12]}"
    with pytest.MonkeyPatch.context() as environment, ExitStack() as stack:
        use_server(environment, s3_server)
        configurations = tiny_curations(folder, bucket=bucket)
        for team in TEAMS:
            s3_filesystem().put(str(folder / team), f"{bucket}/{team}", recursive=True)
        server = stack.enter_context(prefect_server.server(folder))
        deploy(server, configurations)
        server.prefect("deployment", "schedule", "pause", "--all")
        stack.enter_context(prefect_server.worker(server))
        yield Scene(server, bucket)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def record_timeline(record: Record, name: str, moments: dict[str, datetime]) -> None:
    """Seconds since the first moment, for the report of the tests."""
    first = min(moments.values())
    record(name, {what: round((when - first).total_seconds(), 1) for what, when in moments.items()})


@pytest.mark.s3
def test_a_schedule_fires_and_publishes(scene: Scene, record_property: Record) -> None:
    server = scene.server
    due = datetime.now(UTC) + timedelta(seconds=10)
    once_a_day = {"interval": 86_400, "anchor_date": due.isoformat()}
    identity = server.deployment(CURATE)["id"]
    server.api("POST", f"/deployments/{identity}/schedules", [{"schedule": once_a_day, "active": True}])
    run = server.ended(wait(lambda: next(iter(server.runs(CURATE)), None), "the scheduler"))
    server.prefect("deployment", "schedule", "clear", CURATE, "--accept-yes")
    assert run["auto_scheduled"] and run["created_by"]["type"] == "SCHEDULE"
    summary = server.result(run)
    assert (summary["rows"], summary["rows_sketched"], summary["rows_kept"]) == (ROWS, ROWS, int(0.9 * ROWS))
    version = scene.published()
    assert (version.version, version.snapshot_id) == (1, summary["snapshot_id"])
    moments = {"due": due, "started": moment(run["start_time"]), "published": moment(version.created)}
    record_timeline(record_property, "schedule", moments)
    assert moments["started"] >= due - timedelta(seconds=5)


@pytest.mark.s3
def test_an_object_in_the_bucket_becomes_signatures(scene: Scene, record_property: Record) -> None:
    server, before = scene.server, scene.published()
    known, events = server.runs(REINDEX), server.events(EVENT)
    put = datetime.now(UTC)
    uri = scene.put("later", "a first later row", "a second later row", "a third later row")
    watch = server.start(WATCH)
    found = server.result(watch)
    assert (found["added"], found["announced"], found["waiting"]) == ([uri], True, None)
    assert [item["key"] for item in server.artifacts(watch)] == ["corpus-changes"]
    run = scene.new_run(known)
    summary = server.result(run)
    assert (summary["rows_sketched"], summary["rows_reused"], summary["rows_new"]) == (3, before.rows, 3)
    version = scene.published()
    assert (version.version, version.snapshot_id) == (before.version + 1, summary["snapshot_id"])
    assert {entry.uri for entry in version.sources} - {entry.uri for entry in before.sources} == {uri}

    (event,) = server.events(EVENT)[len(events) :]
    assert event["resource"]["curation.store"] == scene.store.uri
    assert event["payload"]["added"] == [uri] and event["payload"]["counts"]["added"] == 1
    assert run["created_by"]["type"] == "AUTOMATION"
    assert not server.runs("index_corpus/search-reindex")
    ended = server.ended(run)
    moments = {
        "object put": put,
        "look started": moment(server.ended(watch)["start_time"]),
        "event": moment(event["occurred"]),
        "run created": moment(run["created"]),
        "run started": moment(ended["start_time"]),
        "published": moment(version.created),
        "run ended": moment(ended["end_time"]),
    }
    record_timeline(record_property, "trigger", moments)
    in_order = [when.replace(microsecond=0) for when in moments.values()]  # versions are dated in whole seconds
    assert in_order == sorted(in_order)


@pytest.mark.s3
def test_a_look_at_what_is_published_announces_nothing(scene: Scene) -> None:
    scene.published()
    known, events = scene.server.runs(REINDEX), scene.server.events(EVENT)
    found = scene.look()
    assert (found["is_changed"], found["announced"]) == (False, False)
    assert scene.server.events(EVENT) == events
    assert scene.server.runs(REINDEX) == known


@pytest.mark.s3
def test_a_lost_event_is_made_good_and_a_burst_gives_one_run(scene: Scene) -> None:
    server, before = scene.server, scene.published()
    known, events = server.runs(REINDEX), server.events(EVENT)
    (automation,) = server.api("GET", f"/automations/related-to/prefect.deployment.{server.deployment(REINDEX)['id']}")
    server.api("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    scene.put("burst-0", "row one of a burst")
    scene.put("burst-1", "row two of a burst")
    assert scene.look()["announced"]
    (event,) = wait(lambda: server.events(EVENT)[len(events) :] or None, "the event")
    server.api("PATCH", f"/automations/{automation['id']}", {"enabled": True})
    assert server.runs(REINDEX) == known  # nobody heard it

    queue = f"/work_pools/{POOL}/queues/support-corpus"
    server.api("PATCH", queue, {"is_paused": True})
    occurred = datetime.now(UTC).isoformat()
    again = {name: event[name] for name in ("event", "resource", "payload")}
    server.api("POST", "/events", [{**again, "id": str(uuid.uuid4()), "occurred": occurred} for _ in range(4)])
    run = scene.new_run(known)
    scene.put("burst-2", "row three of a burst")
    found = scene.look()
    assert (found["counts"]["added"], found["announced"], found["waiting"]) == (3, False, run["name"])
    told = json.loads(server.curate("watch", str(server.folder / "support" / "curate.yaml"), "--json").splitlines()[-1])
    assert (told["announced"], told["waiting"]) == (False, run["name"])
    server.api("PATCH", queue, {"is_paused": False})
    assert server.result(run)["rows_sketched"] == 3
    assert scene.published().version == before.version + 1
    assert len(server.runs(REINDEX)) == len(known) + 1


@pytest.mark.s3
def test_attribution_and_maintenance_on_demand(scene: Scene) -> None:
    server, version = scene.server, scene.published()
    attribute = server.start("attribute/support-attribute", text="Arr, ye be welcome aboard, matey!", k=3)
    found = server.result(attribute)
    assert len(scene.store.get_json(found["outputs"][0])["queries"][0]["hits"]) == 3
    assert "attribution" in {item["key"] for item in server.artifacts(attribute)}
    maintain = server.start("maintain/support-maintain", deep=True)
    index = server.start(REINDEX)
    kept = server.result(maintain)
    assert kept["deep"] and kept["faults"] == 0 and kept["checked"] > 5
    assert kept["collected"]["refused"] is None  # as the deployment has it: garbage is collected
    assert kept["collected"]["kept"] == {"support": list(range(1, version.version + 1))}
    assert server.result(index)["rows_sketched"] == 0
    # the queue's limit: they took turns
    first, second = sorted((server.ended(run) for run in (maintain, index)), key=lambda run: str(run["start_time"]))
    assert moment(first["end_time"]) <= moment(second["start_time"])


@pytest.mark.skipif(prefect_server.postgresql_programs() is None, reason="PostgreSQL is not installed")
def test_a_server_on_postgresql(tmp_path: Path, record_property: Record) -> None:
    with ExitStack() as stack:
        database = stack.enter_context(prefect_server.postgresql())
        server = stack.enter_context(prefect_server.server(tmp_path, database=database))
        deploy(server, {"support": tiny_curations(tmp_path)["support"]})
        stack.enter_context(prefect_server.worker(server))
        run = server.start(CURATE)
        summary = server.result(run)
        assert summary["rows_sketched"] == ROWS
        assert (tmp_path / "support" / "store" / "corpora" / "support" / "versions").is_dir()
        assert {item["key"] for item in server.artifacts(run)} >= {"curation-summary", "curation-report"}
        assert not list((tmp_path / "prefect").glob("*.db"))
        record_property("postgresql", {"run": server.ended(run)["total_run_time"]})
