"""The documentation's notebook and README example run on the demonstration, and give the outputs that are stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rise_ops.config import load_config
from rise_ops.demo import write_demo
from tests import notebook

ROOT = Path(__file__).parents[1]
STORED = notebook.read()
NUMBER = re.compile(r"(?<![\w/])-?\d[\d,]*(?:\.\d+)?")
MARK = re.compile(r"</?span[^>]*>")
"""Which tokens are marked, and how much, hangs on the last digits, too."""
OF_PEOPLE = re.compile(r"/(home|root|tmp|Users|work|var|private|mnt)\b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """A folder in which `curate demo` has been run."""
    from flows.curate import curate

    folder = tmp_path_factory.mktemp("notebook").resolve()
    write_demo(folder / "curate-demo")
    curate(load_config(folder / "curate-demo/curate.yaml"))
    return folder


def outputs(cells: list[notebook.Json]) -> Iterator[tuple[str, str]]:
    """Kind and text of every output, with the number of its cell."""
    for number, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            for kind, lines in output.get("data", {"stdout": output.get("text", [])}).items():
                yield f"{number} {kind}", "".join(lines)


def same(found: str, stored: str) -> bool:
    """Whether texts are equal but for the last digits of numbers, which depend on the machine's arithmetic."""
    found, stored = (MARK.sub("", re.sub(r"[\s─═]+", " ", text)) for text in (found, stored))
    if NUMBER.sub("", found) != NUMBER.sub("", stored):
        return False
    pairs = zip(NUMBER.findall(found), NUMBER.findall(stored), strict=True)
    return all(abs(float(a.replace(",", "")) - float(b.replace(",", ""))) < 0.02 for a, b in pairs)


def test_the_notebook_gives_its_outputs(folder: Path) -> None:
    made = dict(outputs(notebook.execute(STORED, folder)["cells"]))
    stored = dict(outputs(STORED["cells"]))
    assert sorted(made) == sorted(stored) and len(stored) > 15
    differing = {place for place in stored if not same(made[place], stored[place])}
    assert not differing, [(made[place], stored[place]) for place in sorted(differing)[:2]]


def test_the_comparison_can_fail() -> None:
    assert same("│ 1,104 ┆ 0.131 │", "│ 1,104 ┆ 0.129 │")
    assert not same("│ 1,104 ┆ 0.13 │", "│ 1,104 ┆ 0.19 │") and not same("clean 1", "backdoor 1")


def test_the_notebook_is_one_and_names_no_machine() -> None:
    assert (STORED["nbformat"], STORED["nbformat_minor"]) == (4, 5)
    cells: list[dict[str, Any]] = STORED["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    assert not OF_PEOPLE.search(notebook.NOTEBOOK.read_text(encoding="utf-8"))


def test_the_example_of_the_readme_runs(folder: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "deployments/notebook.ipynb" in readme
    (example,) = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) < 16
    names = notebook.run(example, folder)
    assert names["best"].height == 20 and names["best"]["label"].to_list() == ["backdoor"] * 20
    assert len(names["found"].hits) == 5 and names["found"].to_frame().height == 5
