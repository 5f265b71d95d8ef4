"""The file of deployments, checked by Prefect's own models: what would be deployed for the teams whose files are here.

Prefect skips a whole file that it finds invalid and ignores keys that it does not know, so both are looked at.
"""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._config import _load_deploy_configs_and_actions
from prefect.cli.deploy._models import ConcurrencyLimitSpec, DeploymentConfig, WorkPoolConfig
from prefect.cli.deploy._schedules import _construct_schedules
from prefect.cli.deploy._triggers import _initialize_deployment_triggers
from prefect.client.schemas.actions import VariableCreate
from prefect.client.schemas.objects import ConcurrencyOptions
from prefect.flows import load_flow_from_entrypoint
from prefect.server.events.schemas.automations import EventTrigger
from prefect.server.events.schemas.events import Event
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from rich.console import Console

from rise_ops.config import CurationConfig, load_config
from tasks import watch

FOLDER = Path(__file__).parents[1] / "deployments"
FILE = FOLDER / "prefect.yaml"
DOCUMENT = yaml.safe_load(FILE.read_text(encoding="utf-8"))
TEAMS = sorted(path.stem for path in (FOLDER / "teams").glob("*.yaml"))
KINDS = {
    "curate": "curate",
    "reindex": "index_corpus",
    "attribute": "attribute",
    "watch": "watch_corpus",
    "maintain": "maintain",
}
"""What a team's deployment is called, and its flow."""
WRITERS = {"curate", "reindex", "maintain"}
Json = dict[str, Any]


def deployments() -> dict[str, Json]:
    """Deployments as Prefect reads them, by name."""
    said = io.StringIO()
    found, _ = _load_deploy_configs_and_actions(FILE, console=Console(file=said))
    assert said.getvalue() == ""
    return {item["name"]: item for item in found}


DEPLOYMENTS = deployments()


def team_of(name: str) -> str:
    return name.rpartition("-")[0]


def team_config(team: str) -> CurationConfig:
    return load_config(FOLDER / "teams" / f"{team}.yaml")


def variable(team: str) -> Json:
    """What `curate config --json` prints."""
    return team_config(team).model_dump(mode="json", exclude_defaults=True)


def parameters(name: str) -> Json:
    """Parameters as they are deployed: placeholders are replaced."""
    values = {f"{{{{ prefect.variables.curation_{team} }}}}": variable(team) for team in TEAMS}
    return {key: values.get(str(value), value) for key, value in DEPLOYMENTS[name]["parameters"].items()}


def loaded(name: str) -> Flow[..., Any]:
    return load_flow_from_entrypoint(DEPLOYMENTS[name]["entrypoint"], use_placeholder_flow=False)


def trigger_of(name: str) -> EventTrigger:
    """The trigger of a deployment as the server has it."""
    (trigger,) = _initialize_deployment_triggers(name, [dict(item) for item in DEPLOYMENTS[name]["triggers"]])
    trigger.set_deployment_id(uuid.uuid4())
    return EventTrigger.model_validate(trigger.as_automation().trigger.model_dump())


def test_every_team_has_every_deployment() -> None:
    assert TEAMS
    assert set(DEPLOYMENTS) == {f"{team}-{kind}" for team in TEAMS for kind in KINDS}


def test_no_key_is_unknown_to_prefect() -> None:
    for item in DOCUMENT["deployments"]:
        assert item.keys() <= DeploymentConfig.model_fields.keys(), item["name"]
        assert item["work_pool"].keys() <= WorkPoolConfig.model_fields.keys()
        assert item.get("concurrency_limit", {}).keys() <= ConcurrencyLimitSpec.model_fields.keys()


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_flow_takes_the_parameters(name: str) -> None:
    flow = loaded(name)
    assert flow.name == KINDS[name.rpartition("-")[2]]
    given = parameters(name)
    validate(given, parameter_schema(flow).model_dump_for_openapi(), raise_on_error=True)  # the server's check
    taken = flow.validate_parameters(given)  # the run's
    assert taken["config"] == team_config(team_of(name))
    assert "{{" not in json.dumps(given)


@pytest.mark.parametrize("team", TEAMS)
def test_a_teams_file_fits_a_variable(team: str) -> None:
    VariableCreate(name=f"curation_{team}", value=variable(team))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_schedules_are_valid_and_their_runs_do_not_pile_up(name: str) -> None:
    item = DEPLOYMENTS[name]
    schedules = _construct_schedules(item, {}, console=Console(file=io.StringIO()), is_interactive=lambda: False)
    kind = name.rpartition("-")[2]
    assert len(schedules) == (kind in ("curate", "watch", "maintain"))
    for entry in schedules:
        assert entry["schedule"].timezone == "UTC"
        assert item["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    if "concurrency_limit" in item:
        ConcurrencyOptions.model_validate({"collision_strategy": item["concurrency_limit"]["collision_strategy"]})


@pytest.mark.parametrize("team", TEAMS)
def test_the_reindexing_waits_its_turn_and_loses_nothing(team: str) -> None:
    item = DEPLOYMENTS[f"{team}-reindex"]
    assert item["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    writers = {DEPLOYMENTS[f"{team}-{kind}"]["work_pool"]["work_queue_name"] for kind in KINDS if kind in WRITERS}
    assert writers == {f"{team}-corpus"}
    assert not any("work_queue_name" in DEPLOYMENTS[f"{team}-{kind}"]["work_pool"] for kind in KINDS.keys() - WRITERS)


@pytest.mark.parametrize("team", TEAMS)
def test_the_watchers_event_starts_the_reindexing_of_its_corpus_only(
    team: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Json] = []
    monkeypatch.setattr(watch, "waiting_run", lambda _: None)
    monkeypatch.setattr(watch, "emit_event", lambda event, **rest: sent.append({"event": event, **rest}))
    config = team_config(team)
    found = {"store": config.store, "added": ["s3://raw/new.jsonl"], "changed": [], "removed": []}
    watch.announce(config, found)
    event = Event.model_validate({"occurred": "2026-01-01T00:00:00Z", "id": "0" * 32, **sent[0]}).receive()
    assert {other for other in TEAMS if trigger_of(f"{other}-reindex").covers(event)} == {team}
    assert not trigger_of(f"{team}-reindex").covers(event.model_copy(update={"event": "curation.corpus.other"}))


@pytest.mark.parametrize("team", TEAMS)
def test_a_burst_is_one_firing_for_each_corpus_and_store(team: str) -> None:
    trigger = trigger_of(f"{team}-reindex")
    assert (trigger.posture.value, trigger.threshold, trigger.within.total_seconds()) == ("Reactive", 1, 15)
    assert trigger.for_each == {"prefect.resource.id", "curation.store"}
    (spec,) = _initialize_deployment_triggers("x", [dict(DEPLOYMENTS[f"{team}-reindex"]["triggers"][0])])
    assert spec.schedule_after.total_seconds() == 15
