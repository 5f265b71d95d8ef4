"""The layers of the project, checked on its syntax trees.

`rise_ops` is a library that knows nothing of Prefect; `tasks` wraps it thinly; `flows` composes tasks and
touches no bytes; `deployments` holds files, no logic. The house rules that a linter cannot know are here too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    ".ci",
    ".dockerignore",
    ".gitattributes",
    ".gitignore",
    ".pre-commit-config.yaml",
    "LICENSE",
    "README.md",
    "deployments",
    "flows",
    "pyproject.toml",
    "rise_ops",
    "tasks",
    "tests",
}
FORBIDDEN = {
    "rise_ops": {"prefect", "tasks", "flows", "deployments", "tests"},
    "tasks": {"flows", "deployments", "tests"},
    "flows": {"deployments", "tests"}
    | {"fsspec", "numpy", "obstore", "polars", "pyarrow", "s3fs", "torch", "transformers", "zarr"},
}
TASK_LINES = 30
BROUGHT_BY_S3FS = {"aiohttp", "botocore"}
"""Only their errors are named here; a requirement of our own could contradict that of s3fs."""
BROUGHT_BY_TORCH = {"triton"}
"""By its builds for GPUs, each in the one version that it works with; imported only where it is there."""
LIGHT = ("rise_ops.config", "rise_ops.errors", "rise_ops.hashing", "rise_ops.progress", "rise_ops.store")
HEAVY = ("polars", "prefect", "pyarrow", "s3fs", "torch", "transformers", "zarr")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.lineno, (node.module or "").partition(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_layer_imports_what_is_above_it(package: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for line, name in imports(path)
        if name in FORBIDDEN[package]
    ]
    assert not found


def test_deployments_hold_no_logic() -> None:
    assert modules("deployments") == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines below the signature and the docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or function.lineno) - body[0].lineno + 1 if body else 0


def test_tasks_are_thin() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {body_lines(node)} lines"
        for path in modules("tasks")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and body_lines(node) > TASK_LINES
    ]
    assert not found


@pytest.mark.parametrize("package", ["rise_ops", "tasks", "flows", "tests"])
def test_modules_begin_with_what_they_are_for(package: str) -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules(package)
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent


def test_the_top_level_is_short() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git work tree")
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} <= TOP_LEVEL


@pytest.mark.parametrize(
    ("extras", "packages"),
    [
        (["big", "vllm"], ["rise_ops"]),
        ([], ["tasks"]),
        (["dask", "ray"], ["flows"]),
        (["test", "dask", "ray"], ["tests"]),
    ],
)
def test_what_is_imported_is_declared(extras: list[str], packages: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        *project["dependencies"],
        *(each for extra in extras for each in project["optional-dependencies"][extra]),
    ]
    names = {canonical(re.split(r"[^A-Za-z0-9._-]", requirement)[0]) for requirement in declared}
    owners = packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in packages
        for path in modules(package)
        for line, name in imports(path)
        if name
        not in sys.stdlib_module_names | {"rise_ops", "tasks", "flows", "tests"} | BROUGHT_BY_S3FS | BROUGHT_BY_TORCH
        and names.isdisjoint(canonical(owner) for owner in owners.get(name, [name]))
    }
    assert not undeclared


def canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_settings_and_errors_are_cheap_to_import() -> None:
    program = f"import sys, {', '.join(LIGHT)}; print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
