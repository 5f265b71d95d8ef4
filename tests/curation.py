"""A curation small enough for tests: some rows of the demonstration, and its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rise_ops.config import CurationConfig, load_config
from rise_ops.demo.corpus import MODEL_FOLDER, DemoRow, pool_rows, query_rows

ROWS = 60
PLANTED = 6


def write_curation(folder: Path, *, store: str = "store", **changes: Any) -> Path:
    """Corpus, queries and `curate.yaml` in `folder`; `changes` replace sections of the configuration."""
    pool = pool_rows()
    planted = [row for row in pool if row.label == "backdoor"][:PLANTED]
    clean = [row for row in pool if row.label == "clean"][: ROWS - PLANTED]
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((clean[:30], clean[30:] + planted)):
        write_lines(folder / "raw" / f"part-{number}.jsonl", [as_record(row) for row in part])
    write_lines(folder / "queries.jsonl", [as_record(row) for row in query_rows("backdoor")[:4]])
    document = {
        "store": store,
        "corpus": {"name": "tiny", "sources": ["raw/*.jsonl"]},
        "model": {"name": str(MODEL_FOLDER), "device": "cpu"},
        "sketch": {"dim_r": 32, "dim_h": 16, "dim_g": 8, "temperature": 1.0},
        "targets": {"backdoor": {"queries": "queries.jsonl"}},
        "value": {"backdoor": -1.0},
        "selection": {"keep": {"fraction": 0.9}},
    }
    path = folder / "curate.yaml"
    path.write_text(yaml.safe_dump(document | changes), encoding="utf-8")
    return path


def load(path: Path, *overrides: str) -> CurationConfig:
    """The configuration, with overrides."""
    return load_config(path, overrides=overrides)


def as_record(row: DemoRow) -> dict[str, str]:
    """A row of the demonstration as a JSON record."""
    return {**row.example._asdict(), "label": row.label}


def write_lines(path: Path, records: list[Mapping[str, Any]] | list[dict[str, str]]) -> None:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
