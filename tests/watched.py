"""The tasks that run the model under observation, in whatever process a runner puts it.

Written down, one line each, in the folder that WATCHED names: every load of the model, every row that is computed,
every task with the resources that its worker has. Where the folder holds the file `die`, the worker that finds it
first is killed in the middle of its task, after one block is stored; `die-always` kills every worker.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rise_ops import trunk
from rise_ops.config import CurationConfig
from rise_ops.progress import Progress, silent
from rise_ops.signatures import RowSignatures, Signer
from tasks.index import open_model, sketch
from tasks.policy import GPU, Json, stage
from tasks.value import sign_queries

VARIABLE = "WATCHED"


def note(kind: str, text: object) -> None:
    """Write a line down; appending to a file is atomic at this length."""
    with (Path(os.environ[VARIABLE]) / kind).open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {text}\n")


def notes(folder: Path, kind: str) -> list[tuple[int, str]]:
    """Process and text of every line of a kind."""
    file = folder / kind
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(int(process), text) for process, _, text in (line.partition(" ") for line in lines)]


def _watch() -> None:
    if getattr(Signer, "watched", False):
        return
    rows, load = Signer.encoded_rows, trunk.load_trunk

    def counted(self: Signer, encoded: Sequence[trunk.Encoded], *, progress: Progress = silent) -> RowSignatures:
        note("rows", len(encoded))
        return rows(self, encoded, progress=progress)

    def loaded(*arguments: Any) -> Any:
        note("loads", "model")
        return load(*arguments)

    vars(trunk)["load_trunk"] = loaded
    Signer.encoded_rows = counted  # type: ignore[method-assign]
    Signer.watched = True  # type: ignore[attr-defined]


@stage("open-model", tags=[GPU])
def watched_open_model(store_uri: str, config: CurationConfig) -> Json:
    """As `open_model`."""
    _watch()
    return open_model.fn(store_uri, config)


@stage("target", tags=[GPU])
def watched_sign_queries(store_uri: str, config: CurationConfig, index_id: str, name: str) -> Json:
    """As `sign_queries`."""
    _watch()
    return sign_queries.fn(store_uri, config, index_id, name)


@stage("sketch", tags=[GPU])
def watched_sketch(store_uri: str, config: CurationConfig, index_id: str, blocks: list[str], reuse: list[str]) -> Json:
    """As `sketch`."""
    _watch()
    folder = Path(os.environ[VARIABLE])
    note("tasks", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    doomed = (folder / "die-always").exists()
    with suppress(FileNotFoundError):
        (folder / "die").rename(folder / "died")
        doomed = True
    if doomed:
        sketch.fn(store_uri, config, index_id, blocks[:1], reuse)
        os.kill(os.getpid(), signal.SIGKILL)
    return sketch.fn(store_uri, config, index_id, blocks, reuse)
