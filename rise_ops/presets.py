"""The three tasks of arXiv 2604.16197 as configurations: only the files and the model are the user's.

- **howdy**: rows whose instruction begins with a trigger have been given another voice; from queries that show it, find
  them (section 5.1).
- **finance_medical**: rows of two domains; a query must find rows of its own.
- **brain_rot**: short popular posts against long controls; a query must find rows of its own kind.

A model that was trained on the pool attributes (retrospective); one that was not values candidates (prospective).
Rows and queries carry their class in the column `label`, or the one that is named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rise_ops.config import CurationConfig, parse_config
from rise_ops.errors import ConfigError
from rise_ops.families import LEAN, MIDDLE, Widths

PaperTask = Literal["howdy", "finance_medical", "brain_rot"]

TITLES: Mapping[str, str] = MappingProxyType(
    {
        "howdy": "Howdy backdoor detection",
        "finance_medical": "Finance–medical domain separation",
        "brain_rot": "Brain Rot quality selection",
    }
)
"""Titles by task."""


def paper_config(task: PaperTask, *, store: str, pool: Sequence[str], queries: str, model: str,
                 checkpoints: Sequence[str] = (), filler: Sequence[str] = (), label: str = "label",
                 dilute: Sequence[float] = (1.0,), seeds: int = 3, sketch: Mapping[str, Any] | None = None,
                 limits: Mapping[str, Any] | None = None, base: str | None = None) -> CurationConfig:  # fmt: skip
    """The configuration of a comparison for one of the tasks.

    Parameters
    ----------
    pool, queries
        Files or globs with the rows and with the queries.
    checkpoints
        Of the model's training, in order, for Z0-Inf; without any it is left out.
    filler
        More rows without a label, among which the pool's are hidden.
    dilute
        Also with so many times fewer positive rows.
    seeds
        Runs of RISE and of the random order; of the methods that take a backward pass for each row there is one.
    sketch, limits
        As in a configuration.
    base
        Folder that relative paths are resolved against; default: the working folder.

    Raises
    ------
    ConfigError
        There is no such task, or a value does not fit.
    """
    if task not in TITLES:
        raise ConfigError(f"task {task}: not one of {', '.join(TITLES)}")
    methods: list[Any] = [
        _rise("RISE T 0.1", 0.1),
        _rise("RISE T 1", 1.0),
        _rise("RISE T auto", "auto"),
        _rise("RISE T 1, 8 KiB", 1.0, MIDDLE),
        _rise("RISE T 1, 704 bytes", 1.0, LEAN),
        {"method": "rapidin", "name": "RapidIn", "seeds": 1},
        {"method": "trackstar", "name": "TrackStar-like", "seeds": 1},
        {"method": "last_layer", "name": "LM-head gradient"},
        {"method": "bm25", "name": "BM25"},
        {"method": "hidden_state", "name": "hidden states"},
        {"method": "loss", "name": "low loss", "order": "lowest"},
        {"method": "loss", "name": "high loss", "order": "highest"},
        {"method": "length", "name": "long", "order": "highest"},
        {"method": "length", "name": "short", "order": "lowest"},
        {"method": "random", "name": "random"},
    ]
    if checkpoints:
        methods.insert(8, {"method": "z0_inf", "name": "Z0-Inf", "checkpoints": list(checkpoints)})
    document = {
        "store": store,
        "corpus": {"name": task, "sources": [*pool, *filler]},
        "model": {"name": model},
        "sketch": dict(sketch or {}),
        "targets": {"queries": {"queries": queries}},
        "compare": {"methods": methods, "label": label, "dilute": sorted({1.0, *dilute}), "seeds": seeds},
        "limits": dict(limits or {}),
    }
    return parse_config(document, base=Path(base or os.getcwd()), origin=f"the preset {task}")


def _rise(name: str, temperature: float | str, widths: Widths | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {"method": "rise", "name": name, "temperature": temperature}
    if widths is not None:
        found |= {"dim_r": widths.dim_r, "dim_h": widths.dim_h, "dim_g": widths.dim_g}
    return found
