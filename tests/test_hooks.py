"""Who is told when a run fails: through a real block, a real server on loopback, and faults of both."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from prefect.blocks.abstract import NotificationBlock, NotificationError
from prefect.blocks.notifications import CustomWebhookNotificationBlock

from flows import hooks
from flows.curate import curate
from flows.index_corpus import index_corpus
from rise_ops.errors import ConfigError, SourceError
from tests.conftest import last_flow_run
from tests.curation import load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")

SECRET = "hunter2-in-the-url"


class _Inbox(ThreadingHTTPServer):
    """Keeps what is posted to it; answers with `status`."""

    status = 200

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Inbox

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.messages.append(json.loads(self.rfile.read(length)))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def inbox(monkeypatch: pytest.MonkeyPatch, prefect_harness: None) -> Iterator[_Inbox]:
    """A server on loopback, and a block that tells it."""
    with _Inbox() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        CustomWebhookNotificationBlock(
            name="team",
            url=f"http://127.0.0.1:{server.server_port}/{SECRET}",
            json_data={"subject": "{{subject}}", "text": "{{body}}"},
        ).save("team", overwrite=True)
        monkeypatch.setenv(hooks.BLOCK_VARIABLE, "custom-webhook/team")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def broken(tmp_path: Path) -> Any:
    """A configuration whose run fails: there are no sources, and the path to them has a password's value."""
    path = write_curation(tmp_path)
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    return load(path)


@pytest.mark.parametrize("flow", [curate, index_corpus], ids=lambda flow: flow.name)
def test_a_failed_run_tells_what_failed_and_where_to_look(
    flow: Any, inbox: _Inbox, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_PASSWORD", "matches nothing")
    with pytest.raises(SourceError, match="matches nothing"):
        flow(broken)
    (message,) = inbox.messages
    run = last_flow_run()
    assert message["subject"] == f"{flow.name} run {run.name} Failed"
    first, reason, link = message["text"].split("\n")
    assert first == message["subject"]
    assert reason.startswith("SourceError: source ") and "***" in reason and "matches nothing" not in reason
    assert link.endswith(f"/runs/flow-run/{run.id}")


def test_a_crashed_run_tells_too(inbox: _Inbox, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flows.index_corpus._run", die)
    with pytest.raises(KeyboardInterrupt):
        index_corpus(broken)
    (message,) = inbox.messages
    assert message["subject"].endswith(" Crashed")


def test_a_run_that_ends_well_tells_nobody(inbox: _Inbox, tmp_path: Path) -> None:
    curate(load(write_curation(tmp_path)), "ingest")
    assert inbox.messages == []


def test_without_a_block_nobody_is_told(inbox: _Inbox, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hooks.BLOCK_VARIABLE)
    with pytest.raises(SourceError, match="matches nothing"):
        index_corpus(broken)
    assert inbox.messages == []


@pytest.mark.parametrize("fault", ["refused", "no-server", "no-block", "not-a-slug", "other-block"])
def test_a_notification_that_fails_is_a_warning_and_hides_nothing(
    fault: str, inbox: _Inbox, broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slug = {"no-block": "custom-webhook/nobody", "not-a-slug": "team", "other-block": "secret/team"}.get(fault)
    if slug is not None:
        monkeypatch.setenv(hooks.BLOCK_VARIABLE, slug)
    if fault == "refused":
        inbox.status = 500
    elif fault == "no-server":
        CustomWebhookNotificationBlock(name="team", url=f"http://127.0.0.1:9/{SECRET}").save("team", overwrite=True)
    elif fault == "other-block":
        from prefect.blocks.system import Secret

        Secret(value=SECRET).save("team", overwrite=True)
    with caplog.at_level(logging.WARNING), pytest.raises(SourceError, match="matches nothing"):
        index_corpus(broken)
    (told,) = [record for record in caplog.records if record.name == "flows.hooks"]
    assert told.levelname == "WARNING" and "could not be told" in told.getMessage()
    assert SECRET not in caplog.text


class _Quiet(NotificationBlock):
    """Keeps what it is told; tells of a failure only where it is asked to."""

    _block_type_name = "Quiet"
    works: bool
    told: ClassVar[list[str]] = []

    async def notify(self, body: str, subject: str | None = None) -> None:
        """Keep it, or fail."""
        if self.works:
            self.told.append(body)
        elif self._raise_on_failure:
            raise NotificationError("not today")


@pytest.mark.parametrize("works", [True, False])
def test_any_kind_of_block_is_told_and_asked_whether_it_worked(
    works: bool, broken: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _Quiet(works=works).save("quiet", overwrite=True)
    monkeypatch.setenv(hooks.BLOCK_VARIABLE, "quiet/quiet")
    _Quiet.told.clear()
    with pytest.raises(SourceError):
        index_corpus(broken)
    assert len(_Quiet.told) == works
    assert ("could not be told (NotificationError)" in caplog.text) is not works


_HANGS = """
import logging, threading, uuid
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed
from flows import hooks
from flows.index_corpus import index_corpus

hooks._send = lambda *_: threading.Event().wait()
hooks._SECONDS = 0.1
logging.getLogger(hooks.__name__).addHandler(logging.StreamHandler())
hooks.notify(index_corpus, FlowRun(flow_id=uuid.uuid4()), Failed(data=ValueError("broken")))
"""


def test_a_notification_that_hangs_keeps_no_process_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hooks.BLOCK_VARIABLE, "custom-webhook/team")
    ended = subprocess.run([sys.executable, "-c", _HANGS], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert "custom-webhook/team could not be told (TimeoutError)" in ended.stderr


def test_runs_have_names_that_say_what_and_when(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path))
    names = []
    curate(config, "ingest")
    names.append(last_flow_run().name)
    index_corpus(config)
    names.append(last_flow_run().name)
    assert [name.rpartition("-")[0] for name in names] == ["tiny-ingest", "tiny-reindex"]
    assert all(len(name.rpartition("-")[2]) == len("20260131T0200") for name in names)
    with pytest.raises(ConfigError):
        curate(config.model_copy(update={"targets": {}, "value": {}}))
    assert last_flow_run().name.startswith("tiny-curate-")
