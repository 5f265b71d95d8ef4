"""The automations of `deployments/automations/`, made on a real server by its command, and set off."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.actions import ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation

from tests.prefect_server import PrefectServer, server, wait

FILES = sorted((Path(__file__).parents[1] / "deployments" / "automations").glob("*.yaml"))
PLACEHOLDER = "NOTIFICATION_BLOCK"
Json = dict[str, Any]


def automation(path: Path, block: str) -> Json:
    """A file with the id of a notification block in it, as the runbook makes it."""
    found: Json = yaml.safe_load(path.read_text(encoding="utf-8").replace(f"block_document_id: {PLACEHOLDER}", block))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_an_automation(path: Path) -> None:
    made = Automation.model_validate(automation(path, f"block_document_id: {uuid.uuid4()}") | {"id": uuid.uuid4()})
    assert made.name == f"curation-{path.stem}" and made.enabled and made.description
    for action in made.actions:  # a crashed run that is begun again could be at work twice
        assert isinstance(action, SendNotification) or (
            isinstance(action, ChangeFlowRunState) and path.stem == "zombies" and action.state == "CRASHED"
        )


@pytest.fixture(scope="module")
def messages() -> Iterator[tuple[str, list[Json]]]:
    """A web hook on loopback: its address, and what it was told."""
    told: list[Json] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not to stderr."""

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=hook.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{hook.server_port}/", told
    hook.shutdown()
    hook.server_close()
    thread.join()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, messages: tuple[str, list[Json]]) -> Iterator[PrefectServer]:
    """A server with all automations; the one for zombies waits for ten seconds instead of ten minutes."""
    folder = tmp_path_factory.mktemp("automations")
    with server(folder) as found:
        block = _notification_block(found, messages[0])
        for path in FILES:
            document = automation(path, f"block_document_id: {block}")
            if path.stem == "zombies":
                document["trigger"]["within"] = 10
            (folder / path.name).write_text(yaml.safe_dump(document), encoding="utf-8")
            found.prefect("automation", "create", "--from-file", str(folder / path.name))
        assert len(found.api("POST", "/automations/filter", {})) == len(FILES)
        yield found


def _notification_block(found: PrefectServer, url: str) -> str:
    kind = found.api("GET", "/block_types/slug/custom-webhook")
    schema = found.api("POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})
    values = {"name": "hook", "url": url, "json_data": {"subject": "{{subject}}", "body": "{{body}}"}}
    wanted = {"name": "curation", "data": values, "block_type_id": kind["id"], "block_schema_id": schema[0]["id"]}
    return str(found.api("POST", "/block_documents/", wanted)["id"])


def _run(found: PrefectServer, state: str, name: str, *, flow: str = "curate") -> str:
    identity = found.api("POST", "/flows/", {"name": flow})["id"]
    run = found.api("POST", "/flow_runs/", {"flow_id": identity, "name": name, "state": {"type": "RUNNING"}})
    _set(found, run["id"], state)
    return str(run["id"])


def _set(found: PrefectServer, run: str, state: str) -> None:
    kind = "SCHEDULED" if state == "Late" else state.upper()
    body = {"state": {"type": kind, "name": state, "message": f"this is {state}"}, "force": True}
    found.api("POST", f"/flow_runs/{run}/set_state", body)


def _told(told: list[Json], subject: str) -> Json:
    def look() -> Json | None:
        return next((message for message in told if subject in message["subject"]), None)

    return wait(look, f"the message '{subject}'", seconds=60)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["Failed", "Crashed"])
def test_a_run_that_ends_badly_is_told(running: PrefectServer, messages: tuple[str, list[Json]], state: str) -> None:
    _run(running, "Completed", f"good-{state}")
    _run(running, state, f"other-{state}", flow="not-ours")
    run = _run(running, state, f"support-{state}")
    message = _told(messages[1], f"support-{state}: {state}")
    assert f"this is {state}" in message["body"] and run in message["body"]
    assert not [each for each in messages[1] if "good" in each["subject"] or "other" in each["subject"]]


@pytest.mark.slow
def test_a_late_run_is_told(running: PrefectServer, messages: tuple[str, list[Json]]) -> None:
    _run(running, "Late", "support-late")
    assert "No worker" in _told(messages[1], "support-late is late")["body"]


@pytest.mark.slow
def test_a_run_without_a_sign_of_life_becomes_crashed_and_stays_so(
    running: PrefectServer, messages: tuple[str, list[Json]]
) -> None:
    other = _run(running, "Running", "other-dead", flow="not-ours")
    _emit(running, "prefect.flow-run.heartbeat", f"prefect.flow-run.{other}", flow="not-ours")
    dead, ended = _run(running, "Running", "support-dead"), _run(running, "Running", "support-ended")
    for run in (dead, ended):
        _emit(running, "prefect.flow-run.heartbeat", f"prefect.flow-run.{run}")
    _set(running, ended, "Completed")
    _told(messages[1], "support-dead: Crashed")
    states = {run: running.api("GET", f"/flow_runs/{run}")["state_name"] for run in (dead, ended, other)}
    assert states == {dead: "Crashed", ended: "Completed", other: "Running"}


@pytest.mark.slow
def test_a_pool_without_workers_is_told(running: PrefectServer, messages: tuple[str, list[Json]]) -> None:
    pool = running.api("POST", "/work_pools/", {"name": "curation-process", "type": "process"})
    _emit(running, "prefect.work-pool.not-ready", f"prefect.work-pool.{pool['id']}", name=pool["name"])
    assert _told(messages[1], "Work pool curation-process has no worker")


def _emit(found: PrefectServer, event: str, resource: str, *, name: str = "", flow: str = "curate") -> None:
    body = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource, "prefect.resource.name": name},
        "related": [
            {
                "prefect.resource.id": f"prefect.flow.{uuid.uuid4()}",
                "prefect.resource.role": "flow",
                "prefect.resource.name": flow,
            }
        ],
    }
    found.api("POST", "/events", [body])
