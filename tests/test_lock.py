"""The lock file `deployments/constraints.txt` names every package that is installed from it, each once, exactly."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "deployments" / "constraints.txt"
PIN = re.compile(r"([a-z0-9]+(?:[-.][a-z0-9]+)*)==([\w.!]+)")
BEFORE_THE_LOCK = {"pip", "rise-ops"}


def pins() -> dict[str, str]:
    lines = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert all(found), [line for line, match in zip(lines, found, strict=True) if match is None]
    names = [match[1] for match in found if match]
    assert len(names) == len(set(names))
    return {canonical(match[1]): match[2] for match in found if match}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    """Packages of this environment; the local part of a version names a build, not a release."""
    found = {canonical(each.metadata["Name"]): each.version.partition("+")[0] for each in distributions()}
    return {name: version for name, version in found.items() if name not in BEFORE_THE_LOCK}


def test_every_package_of_this_environment_is_in_the_lock_file() -> None:
    locked, here = pins(), installed()
    if any(here.get(name) != locked.get(name) for name in ("torch", "prefect", "pytest")):
        pytest.skip("this environment was not installed from the lock file")
    strange = {f"{name}=={version}" for name, version in here.items() if locked.get(name) != version}
    assert not strange


def test_the_builder_of_the_package_is_in_the_lock_file() -> None:
    assert {"hatchling", "editables", "setuptools"} <= set(pins())


def test_the_update_is_one_command() -> None:
    head = "".join(line for line in LOCK.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    (command,) = set(re.findall(r"`(\.ci/\w+)`", head))
    assert (ROOT / command).stat().st_mode & 0o111
    assert LOCK.relative_to(ROOT).as_posix() in (ROOT / command).read_text(encoding="utf-8")
