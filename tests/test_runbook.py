"""The runbook speaks of what is there: its links, files, commands and policies."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DEPLOYMENTS = Path(__file__).parents[1] / "deployments"
RUNBOOK = (DEPLOYMENTS / "runbook.md").read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)]+)\)", RUNBOOK)
    assert len(targets) > 20
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (DEPLOYMENTS / path).exists(), target
        text = (DEPLOYMENTS / path).read_text(encoding="utf-8") if path.endswith(".md") else RUNBOOK
        assert not anchor or anchor in headings(text), target


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"deployments/[\w./-]+\.(?:json|yaml|txt|cuda|md)|deployments/docker/Dockerfile\b", RUNBOOK))
    assert named
    assert not {name for name in named if "NAME" not in name and not (DEPLOYMENTS.parent / name).is_file()}
    named = set(re.findall(r"`([\w-]+\.(?:json|example))`", RUNBOOK)) - {"run.json"}
    assert {path.name for path in DEPLOYMENTS.rglob("*.*")} >= named


def test_commands_of_curate_exist() -> None:
    typer = pytest.importorskip("typer")
    cli = pytest.importorskip("flows.cli")
    commands = typer.main.get_command(cli.app).commands
    found = re.findall(r"(?<![\w/])curate ([a-z]+)([^`\n|]*)", "\n".join(_code()))
    assert {name for name, _ in found} >= {"config", "gc", "lineage", "plan", "status", "verify", "watch"}
    for name, rest in found:
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)) <= options, f"curate {name}{rest}"


def _code() -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```$", RUNBOOK, re.MULTILINE | re.DOTALL)
    rest = re.sub(r"^```\w*\n.*?^```$", "", RUNBOOK, flags=re.MULTILINE | re.DOTALL)
    return blocks + [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", rest)]


def test_every_policy_and_automation_is_explained() -> None:
    for path in (DEPLOYMENTS / "s3-policy").iterdir():
        assert f"s3-policy/{path.name}" in RUNBOOK
    names = re.search(r"^for name in (.*); do\n.*automations", RUNBOOK, re.MULTILINE)
    assert names and set(names[1].split()) == {path.stem for path in (DEPLOYMENTS / "automations").iterdir()}


def test_folders_of_a_back_up_are_those_of_a_store() -> None:
    from rise_ops.store import STORE_FOLDERS

    copied = re.search(r"for folder in (.*); do", RUNBOOK)
    restored = re.search(r"order `([a-z ]+)`", " ".join(RUNBOOK.split()))
    assert copied and restored
    wanted = sorted(STORE_FOLDERS - {"alive", "damage"})
    assert sorted(copied[1].split()) == sorted(restored[1].split()) == wanted


def test_a_corpus_that_cannot_be_published_has_a_remedy() -> None:
    import yaml

    chapter = RUNBOOK.partition("### The corpus changed, and re-indexing fails")[2].partition("\n### ")[0]
    paused = re.findall(r"^prefect deployment schedule pause (\S+)/(\S+) SCHEDULE_ID$", chapter, re.MULTILINE)
    document = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text(encoding="utf-8"))
    deployed = {each["name"]: each for each in document["deployments"]}
    ((flow, name),) = paused
    assert deployed[name]["entrypoint"].endswith(f".{flow}")
    (schedule,) = deployed[name]["schedules"]
    assert f"({schedule['interval'] // 60} minutes)" in chapter
