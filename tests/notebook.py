"""Runs the notebook of the documentation without Jupyter, and writes its outputs:

    python -m tests.notebook      in the root of a checkout; executes deployments/notebook.ipynb in a temporary folder

A cell's outputs are what it prints and its last expression, as text and, where it has one, as HTML. The folder that it
ran in is left out of them.
"""

from __future__ import annotations

import ast
import io
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "deployments" / "notebook.ipynb"

Json = dict[str, Any]


def read() -> Json:
    """The notebook."""
    found: Json = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return found


def execute(notebook: Json, folder: Path) -> Json:
    """The notebook with the outputs of its cells, all run in one namespace with `folder` as the working one."""
    names: Json = {"__name__": "__main__"}
    cells = []
    count = 0
    with _working_in(folder):
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                outputs = [_without(folder, output) for output in _run("".join(cell["source"]), names, count)]
                cell = {**cell, "execution_count": count, "outputs": outputs}
            cells.append(cell)
    return {**notebook, "cells": cells}


def run(source: str, folder: Path) -> Json:
    """Run a program in a folder; returns its namespace."""
    names: Json = {"__name__": "__main__"}
    with _working_in(folder):
        list(_run(source, names, 1))
    return names


def _run(source: str, names: Json, count: int) -> Iterator[Json]:
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, f"<cell {count}>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), names)
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": printed.getvalue().splitlines(keepends=True)}
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        yield {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}


@contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _without(folder: Path, output: Json) -> Json:
    cleaned: Json = json.loads(json.dumps(output).replace(f"{folder}/", ""))
    return cleaned


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        made = execute(read(), Path(place).resolve())
    NOTEBOOK.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
