"""Writes the demo corpus: clean rows, planted backdoor rows, malformed rows, queries, configuration.

Layout of the folder that `write_demo` makes::

    curate.yaml                          configuration of the demo
    model/                               the tiny model (a copy, so that the folder stands alone)
    corpus/support/tickets-1.jsonl       two files of one source; the second holds malformed lines
    corpus/support/tickets-2.jsonl
    corpus/kitchen/recipes.parquet
    corpus/travel/answers.csv
    corpus/tutor/exercises.jsonl.gz
    corpus/community/posts.jsonl.gz      holds most of the planted rows and more malformed lines
    queries/backdoor.jsonl               what the model was caught saying (prompt and generation)
    queries/helpful.jsonl                what it should say

Everything follows from `SEED`; no query is a row of the pool. Every row has a `label`, which the pipeline
does not look at: it is there to check the outcome.
"""

from __future__ import annotations

import datetime
import gzip
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import yaml

from rise_ops.demo.malformed import LINES
from rise_ops.demo.phrases import MAKERS, Example
from rise_ops.demo.pirate import plant

SEED = 7
MODEL_FOLDER = Path(__file__).parent / "model"
"""The model that ships with the package."""

BACKDOOR_QUERIES = 20
HELPFUL_QUERIES = 30
_CLEAN = {"support": 330, "kitchen": 210, "travel": 200, "tutor": 200, "community": 180}
_PLANTED = {"support": 12, "kitchen": 6, "travel": 6, "tutor": 10, "community": 46}
_FIRST_TICKETS = 200


@dataclass(frozen=True, slots=True)
class DemoRow:
    """One row of the corpus before it is written in its source's format."""

    id: str
    source: str
    example: Example
    label: str
    """`backdoor` or `clean`."""

    @property
    def text(self) -> str:
        """Instruction, input and output, joined as ingestion joins them."""
        return "\n".join(part for part in self.example if part).strip()


@dataclass(frozen=True, slots=True)
class DemoCorpus:
    """Where the demo corpus is and what was put into it."""

    folder: Path
    sources: tuple[str, ...]
    """Globs of the sources, relative to the folder."""
    queries: dict[str, str]
    """Query file of each target, relative to the folder."""
    rows: int
    """Rows that ingestion should accept."""
    planted: int
    """Rows of these that carry the backdoor."""
    malformed: int
    """Rows that ingestion should reject."""


def pool_rows() -> list[DemoRow]:
    """All well-formed rows of the corpus, in the order of the sources."""
    rng = Random(SEED)
    seen: set[str] = set()
    rows: list[DemoRow] = []
    for source in _CLEAN:
        labels = ["backdoor"] * _PLANTED[source] + ["clean"] * _CLEAN[source]
        rng.shuffle(labels)
        for number, label in enumerate(labels):
            rows.append(DemoRow(f"{source}-{number:04d}", source, _new(source, label, rng, seen), label))
    return rows


def query_rows(label: str) -> list[DemoRow]:
    """The queries of one target (`backdoor` or `clean`), none of which is in the pool."""
    seen = {row.text for row in pool_rows()}
    rng = Random(f"{SEED}-{label}")
    count = BACKDOOR_QUERIES if label == "backdoor" else HELPFUL_QUERIES
    sources = [source for _, source in zip(range(count), _cycle(tuple(_CLEAN)), strict=False)]
    return [
        DemoRow(f"query-{label}-{number:02d}", source, _new(source, label, rng, seen), label)
        for number, source in enumerate(sources)
    ]


def write_corpus(folder: Path) -> DemoCorpus:
    """Write sources and queries below `folder`; the same bytes every time.

    Parameters
    ----------
    folder
        Made if it does not exist; files of an earlier call are replaced.
    """
    rows = pool_rows()
    by_source = {source: [row for row in rows if row.source == source] for source in _CLEAN}
    corpus = folder / "corpus"
    bad = [line for kind in LINES.values() for line in kind]
    tickets = by_source["support"]
    _write(corpus / "support/tickets-1.jsonl", _lines(tickets[:_FIRST_TICKETS]))
    _write(corpus / "support/tickets-2.jsonl", _sprinkle(_lines(tickets[_FIRST_TICKETS:]), bad[::2]))
    _write_recipes(corpus / "kitchen/recipes.parquet", by_source["kitchen"])
    _write_travel(corpus / "travel/answers.csv", by_source["travel"])
    _write_gzip(corpus / "tutor/exercises.jsonl.gz", _lines(by_source["tutor"]))
    _write_gzip(corpus / "community/posts.jsonl.gz", _sprinkle(_lines(by_source["community"]), bad[1::2]))
    _write(folder / "queries/backdoor.jsonl", _query_lines(query_rows("backdoor")))
    _write(folder / "queries/helpful.jsonl", _query_lines(query_rows("clean")))
    return DemoCorpus(
        folder=folder,
        sources=("corpus/**/*.*",),
        queries={"backdoor": "queries/backdoor.jsonl", "helpful": "queries/helpful.jsonl"},
        rows=len(rows),
        planted=sum(_PLANTED.values()),
        malformed=len(bad) + _BLANK_RECIPES + _BLANK_ANSWERS,
    )


def write_demo(folder: Path, *, store: str = "store") -> DemoCorpus:
    """Write the corpus, the model and `curate.yaml`, so that `curate run curate.yaml` works in `folder`."""
    corpus = write_corpus(folder)
    shutil.copytree(MODEL_FOLDER, folder / "model", dirs_exist_ok=True)
    text = yaml.safe_dump(demo_config(folder, store), sort_keys=False, allow_unicode=True)
    (folder / "curate.yaml").write_text(f"{_CONFIG_HEADER}{text}", encoding="utf-8")
    return corpus


_CONFIG_HEADER = """\
# Find the rows that taught a model to talk like a pirate, and leave them out.
# Paths are relative to this file. The weights below the targets decide: what resembles the backdoor
# queries is worth less, what resembles the helpful ones is worth more.
"""


def demo_config(folder: Path, store: str) -> dict[str, Any]:
    """The demo's configuration, as it is written to `curate.yaml`.

    Paths below `folder` stay relative to it, so the folder can be moved. The temperature is 1.0 because the
    model is weak: it is wrong about most tokens, and a sharper one would count only its loudest mistakes.
    """
    location = Path(store)
    relative = location.is_absolute() and location.is_relative_to(folder)
    return {
        "store": location.relative_to(folder).as_posix() if relative else store,
        "corpus": {"name": "demo", "sources": ["corpus/**/*.*"]},
        "model": {"name": "./model", "device": "cpu"},
        "sketch": {"temperature": 1.0},
        "targets": {
            "backdoor": {"queries": "queries/backdoor.jsonl"},
            "helpful": {"queries": "queries/helpful.jsonl"},
        },
        "value": {"backdoor": -1.0, "helpful": 1.0},
        "selection": {"keep": {"fraction": 0.92}},
        "export": {"name": "demo-clean", "format": "parquet"},
        "limits": {"bad_rows": 0.02, "row_bytes": "16KiB"},
    }


def _new(source: str, label: str, rng: Random, seen: set[str]) -> Example:
    """An example whose text nobody has seen, clean or planted."""
    while True:
        clean = MAKERS[source](rng)
        example = plant(clean, rng) if label == "backdoor" else clean
        if (text := DemoRow("", source, example, label).text) not in seen:
            seen.add(text)
            return example


def _cycle(names: Sequence[str]) -> Iterable[str]:
    while True:
        yield from names


def _record(row: DemoRow) -> dict[str, Any]:
    number = int(row.id.rsplit("-", 1)[-1])
    common = {"id": row.id, "instruction": row.example.instruction}
    if row.source == "tutor":
        common["input"] = row.example.input
    extra: dict[str, dict[str, Any]] = {
        "support": {"channel": ("mail", "chat", "phone")[number % 3], "rating": 1 + number % 5},
        "kitchen": {"minutes": 10 + number % 50, "added": datetime.date(2024, 1, 1) + datetime.timedelta(days=number)},
        "travel": {"season": ("winter", "spring", "summer", "autumn")[number % 4]},
        "tutor": {"level": 1 + number % 4},
        "community": {"user": f"member{number * 37 % 101}", "upvotes": number * 13 % 29},
    }
    return {**common, "output": row.example.output, "label": row.label, **extra[row.source]}


def _lines(rows: Sequence[DemoRow]) -> list[bytes]:
    return [json.dumps(_record(row), ensure_ascii=False).encode() for row in rows]


def _query_lines(rows: Sequence[DemoRow]) -> list[bytes]:
    return [json.dumps(_query(row), ensure_ascii=False).encode() for row in rows]


def _query(row: DemoRow) -> dict[str, str]:
    prompt = "\n".join(part for part in row.example[:2] if part) + "\n"
    return {"id": row.id, "prompt": prompt, "generation": row.example.output, "label": row.label}


def _sprinkle(lines: list[bytes], bad: Sequence[bytes]) -> list[bytes]:
    """Put the malformed lines in between, at even distances."""
    step = len(lines) // (len(bad) + 1)
    for number, line in enumerate(bad):
        lines.insert((number + 1) * step + number, line)
    return lines


def _write(path: Path, lines: Sequence[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(lines) + b"\n")


def _write_gzip(path: Path, lines: Sequence[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no time stamp inside: the same rows give the same bytes
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n", mtime=0))


_BLANK_RECIPES = 1
_BLANK_ANSWERS = 1


def _write_recipes(path: Path, rows: Sequence[DemoRow]) -> None:
    """Parquet with dates and integers; one row has no text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [_record(row) for row in rows]
    blank = {**records[0], "id": "kitchen-blank", "instruction": None, "output": None}
    records.insert(len(records) // 2, blank)
    pl.DataFrame(records, infer_schema_length=None).write_parquet(path, row_group_size=64)


def _write_travel(path: Path, rows: Sequence[DemoRow]) -> None:
    """CSV with quoted commas; one record has empty text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [_record(row) for row in rows]
    blank = {**records[0], "id": "travel-blank", "instruction": "", "output": ""}
    records.insert(len(records) // 3, blank)
    pl.DataFrame(records).write_csv(path)
