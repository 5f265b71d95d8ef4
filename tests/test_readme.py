"""The README says what is true: its commands, its configuration, its tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ByteSize, TypeAdapter

from rise_ops.config import CurationConfig, parse_config
from rise_ops.store import Store

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    start = README.index(f"\n## {title}\n")
    end = README.find("\n## ", start + 1)
    return README[start:end]


def table(text: str) -> list[list[str]]:
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and default of every leaf; ... where a value is required."""
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        default = ... if field.is_required() else field.get_default(call_default_factory=True)
        if get_origin(annotation) is UnionType:
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        if get_origin(annotation) is dict:
            inner = get_args(annotation)[1]
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from fields(inner, f"{prefix}{name}.NAME.")
            else:
                yield f"{prefix}{name}.NAME", 1.0
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", default


FIELDS = dict(fields(CurationConfig))


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.YAMLError("a key stands twice")
        return super().construct_mapping(node, deep)


def test_every_key_is_in_the_reference_and_no_other() -> None:
    assert sorted(key.strip("`") for key, *_ in table(section("Configuration"))) == sorted(FIELDS)


@pytest.mark.parametrize(("key", "default"), [(row[0].strip("`"), row[1]) for row in table(section("Configuration"))])
def test_the_reference_has_the_defaults(key: str, default: str) -> None:
    expected = FIELDS[key]
    if expected is ...:
        assert default == "required"
    elif isinstance(expected, ByteSize):
        assert TypeAdapter(ByteSize).validate_python(default) == expected
    else:
        wanted = list(expected) if isinstance(expected, tuple) else expected
        assert yaml.safe_load(default) == wanted


def test_the_example_is_a_configuration() -> None:
    example, *sections = blocks("yaml")
    for block in sections:  # of sections that take their place: all together, or each line instead of the one above
        try:
            variants = [yaml.load(block, Loader=_StrictLoader)]
        except yaml.YAMLError:
            variants = [yaml.safe_load(line) for line in block.splitlines()]
        for variant in variants:
            parse_config({**yaml.safe_load(example), **variant}, base=ROOT)
    config = parse_config(yaml.safe_load(example), base=ROOT)
    assert config.weights == {"quality": 1.0, "junk": -1.0}
    assert Store(config.store).uri == "s3://team-curation/prod"


def test_every_command_is_in_the_table_and_no_other() -> None:
    typer = pytest.importorskip("typer")
    cli = pytest.importorskip("flows.cli")
    known = set(typer.main.get_command(cli.app).commands)
    listed = {row[0].strip("`").split()[1] for row in table(section("Commands"))}
    assert listed == known


def test_the_commands_shown_exist() -> None:
    typer = pytest.importorskip("typer")
    cli = pytest.importorskip("flows.cli")
    commands = typer.main.get_command(cli.app).commands
    for line in "".join(blocks("bash")).splitlines():
        for name, rest in re.findall(r"bin/curate (\w+)(.*)", line):
            options = {option for parameter in commands[name].params for option in parameter.opts}
            unquoted = re.sub(r"'[^']*'", "", rest)
            assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", unquoted)) <= options


def test_the_two_commands_are_run_by_ci() -> None:
    commands = [block.strip() for block in blocks("bash") if "pip install" in block]
    assert len(commands) == 2
    for command in commands:
        assert command in CI


def test_links_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings
        elif "://" not in target:
            assert (ROOT / target).is_file(), target
