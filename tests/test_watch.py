"""Watching a corpus: what a look finds, when it is announced, and what holds an announcement back."""

from __future__ import annotations

import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingConcurrencySlot, AwaitingRetry, Late, Pending, Running, Scheduled

from flows.attribute import attribute
from flows.cli import main
from flows.curate import curate
from flows.index_corpus import index_corpus
from flows.watch_corpus import watch_corpus
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError, TransientError
from rise_ops.watching import look
from tasks import watch
from tests.curation import load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")
Json = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> CurationConfig:
    return load(write_curation(tmp_path, corpus={"name": f"c{uuid.uuid4().hex[:8]}", "sources": ["raw/*.jsonl"]}))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Json]:
    """Events that were emitted."""
    events: list[Json] = []
    monkeypatch.setattr(watch, "emit_event", lambda event, **rest: events.append({"event": event, **rest}))
    return events


def make_run(flow: Flow[..., Any], config: CurationConfig, *states: State[Any]) -> FlowRun:
    """A run on the server that went through states."""
    first, *rest = states
    parameters = {"config": config.model_dump(mode="json", exclude_defaults=True)}
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(flow, parameters=parameters, state=first)
        for state in rest:
            client.set_flow_run_state(run.id, state, force=True)
    return run


def test_a_look_is_announced_until_it_is_published(config: CurationConfig, sent: list[Json]) -> None:
    first = watch_corpus(config)
    assert (first["version"], first["counts"]) == (None, {"added": 2, "changed": 0, "removed": 0})
    assert (first["announced"], first["waiting"]) == (True, None)
    assert watch_corpus(config)["announced"]  # the first event may have been lost
    (event, again) = sent
    assert event == again
    assert event["event"] == "curation.corpus.changed"
    assert event["resource"] == {
        "prefect.resource.id": f"curation.corpus.{config.corpus.name}",
        "prefect.resource.name": config.corpus.name,
        "curation.store": config.store,
    }
    assert len(event["payload"]["added"]) == 2

    index_corpus(config)
    published = watch_corpus(config)
    assert (published["is_changed"], published["announced"], published["unchanged"]) == (False, False, 2)
    Path(config.corpus.sources[0]).parent.joinpath("part-0.jsonl").unlink()
    later = watch_corpus(config)
    assert (later["counts"], later["announced"]) == ({"added": 0, "changed": 0, "removed": 1}, True)
    assert len(sent) == 3


def in_(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda c: make_run(index_corpus, c, Scheduled()), id="due"),
        pytest.param(lambda c: make_run(index_corpus, c, Scheduled(scheduled_time=in_(15))), id="of-a-trigger"),
        pytest.param(lambda c: make_run(index_corpus, c, Scheduled(), Pending()), id="taken-by-a-worker"),
        pytest.param(lambda c: make_run(curate, c, Scheduled(scheduled_time=in_(-60))), id="late-curation"),
        pytest.param(
            lambda c: make_run(curate, c, AwaitingConcurrencySlot(scheduled_time=in_(-3_600))), id="in-line-curation"
        ),
        pytest.param(lambda c: make_run(index_corpus, c, Late(scheduled_time=in_(-3_600))), id="late-reindex"),
        pytest.param(
            lambda c: make_run(index_corpus, c.model_copy(update={"store": f"{c.store}/"}), Scheduled()), id="slash"
        ),
    ],
)
def test_a_run_that_waits_holds_the_event_back(config: CurationConfig, sent: list[Json], make: Any) -> None:
    run = make(config)
    found = watch_corpus(config)
    assert (found["is_changed"], found["announced"], found["waiting"]) == (True, False, run.name)
    assert sent == []


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda c: make_run(index_corpus, c, Scheduled(scheduled_time=in_(86_400))), id="tomorrow"),
        pytest.param(lambda c: make_run(index_corpus, c, Pending(), Running()), id="at-work"),
        pytest.param(lambda c: make_run(index_corpus, c, Running(), AwaitingRetry()), id="begins-again"),
        pytest.param(lambda c: make_run(attribute, c, Scheduled()), id="lists-nothing"),
        pytest.param(lambda c: make_run(curate, c, Late(scheduled_time=in_(-3_600))), id="nobody-takes-it"),
        pytest.param(
            lambda c: make_run(index_corpus, c.model_copy(update={"store": f"{c.store}-2"}), Scheduled()),
            id="other-store",
        ),
        pytest.param(
            lambda c: make_run(
                index_corpus,
                c.model_copy(update={"corpus": c.corpus.model_copy(update={"name": "another"})}),
                Scheduled(),
            ),
            id="other-corpus",
        ),
    ],
)
def test_other_runs_hold_nothing_back(config: CurationConfig, sent: list[Json], make: Any) -> None:
    make(config)
    assert watch_corpus(config)["announced"]
    assert len(sent) == 1


def test_a_run_that_is_stuck_holds_nothing_back(
    config: CurationConfig, sent: list[Json], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker took it and died before it began."""
    make_run(index_corpus, config, Scheduled(), Pending())
    assert watch.waiting_run(config) is not None
    monkeypatch.setattr(watch, "_STUCK", timedelta(0))
    assert watch.waiting_run(config) is None


def test_a_waiting_run_is_found_behind_others(config: CurationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_PAGE", 2)
    others = [config.model_copy(update={"store": f"{config.store}-{number}"}) for number in range(5)]
    for other in others:
        make_run(index_corpus, other, Scheduled())
    run = make_run(index_corpus, config, Scheduled())
    assert watch.waiting_run(config) == run.name
    assert watch.waiting_run(others[0]) is not None


def test_events_and_records_are_bounded_and_hold_no_signature() -> None:
    signed = "https://files.example/x.jsonl?X-Amz-Signature=planted-9c1d"
    found: Json = {"added": [f"s3://raw/{number}" for number in range(1_000)], "changed": [signed], "removed": []}
    shown = watch.bounded(found)
    assert "planted" not in shown["changed"][0] and "x.jsonl" in shown["changed"][0]
    assert shown["counts"] == {"added": 1_000, "changed": 1, "removed": 0}
    assert shown["added"] == found["added"][: watch.SHOWN]
    assert shown["left_out"] == 1_000 - watch.SHOWN


def _answer(status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("POST", "http://server/api/flow_runs/filter"))
    return PrefectHTTPStatusError("answered", request=response.request, response=response)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (httpx.ReadTimeout("slow"), TransientError, "does not answer .ReadTimeout"),
        (httpx.RemoteProtocolError("cut"), TransientError, "does not answer"),
        (_answer(500), TransientError, "does not answer"),
        (_answer(503), TransientError, "does not answer"),
        (_answer(401), ConfigError, "refuses .* .status 401"),
    ],
    ids=["timeout", "cut", "500", "503", "401"],
)
def test_a_server_that_fails_while_it_lists_runs_is_named(
    fault: Exception, kind: type[Exception], text: str, config: CurationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(SyncPrefectClient, "read_flow_runs", fail)
    with pytest.raises(kind, match=text):
        watch.waiting_run(config)


def test_a_server_that_does_not_answer_is_no_silence(
    config: CurationConfig, sent: list[Json], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = look(config)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        with pytest.raises(TransientError, match="does not answer"):
            watch.announce(config, found)
        path = Path(config.store).parent / "curate.yaml"
        monkeypatch.setattr(sys, "argv", ["curate", "watch", str(path)])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 1
    assert "PREFECT_API_URL" in capsys.readouterr().err
    assert sent == []
