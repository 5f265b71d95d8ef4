"""Selection: the rules, their reasons, and every row exactly once."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rise_ops import selection
from rise_ops.config import KeepConfig, SelectionConfig
from rise_ops.errors import IntegrityError, LimitError, SelectionError
from rise_ops.memory import SelectMemory, StageMemory
from rise_ops.runs import decisions_key
from rise_ops.selection import Selection, decide
from rise_ops.store import Store
from rise_ops.valuation import Aggregate
from tests.corpora import corpus_of, make_rows, write_as
from tests.indexed import Indexed, index_corpus, index_rows, make_target, score_parts

SILENT = 3
TARGET = {"good": make_target(4)}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """Three objects; a copy of the large one, and one of a small one."""
    folder = tmp_path_factory.mktemp("selection")
    write_as(folder / "raw/large.jsonl", make_rows(600, seed=1))
    write_as(folder / "raw/small.jsonl", make_rows(30, seed=2))
    write_as(folder / "raw/other.jsonl", make_rows(40, seed=3))
    shutil.copy(folder / "raw/large.jsonl", folder / "raw/copy of large.jsonl")
    shutil.copy(folder / "raw/small.jsonl", folder / "raw/copy of small.jsonl")
    (folder / "raw/bad.jsonl").write_text('{"text": "good"}\nnot json\n{"text": ""}\n{"text": "also good"}\n')
    return index_corpus(Store(str(folder / "store")), corpus_of(folder / "raw/*.jsonl"), silent=SILENT)


def _decide(indexed: Indexed, name: str, keep: Mapping[str, Any], *, memory: int = 2**30, aggregate: Aggregate = "mean",
            ) -> tuple[Selection, pl.DataFrame]:  # fmt: skip
    parts = score_parts(indexed, TARGET, run_id=name, size=2, aggregate=aggregate)
    selection = decide(
        indexed.store,
        indexed.version,
        run_id=name,
        parts=parts,
        weights={"good": 1.0},
        targets=["good"],
        aggregate=aggregate,
        selection=SelectionConfig(keep=KeepConfig(**keep)),
        memory=memory,
    )
    return selection, indexed.store.scan_parquet([decisions_key(name)]).collect()


def _expected(frame: pl.DataFrame, keep: Mapping[str, Any]) -> dict[tuple[str, int], str]:
    """Reasons by place, with a plain loop; what is used up first takes all that follow."""
    rows = sorted(
        (row for row in frame.iter_rows(named=True) if row["value"] is not None),
        key=lambda row: (-row["value"], row["doc_id"]),
    )
    reasons = {}
    tokens, full = 0, "kept"
    for rank, row in enumerate(rows, 1):
        tokens += row["tokens"]
        reason = full
        if row["value"] < keep.get("min_value", -9):
            reason = "below_min_value"
        elif full == "kept" and rank > keep.get("rows", 10**9):
            reason = full = "over_rows"
        elif full == "kept" and rank > round(keep.get("fraction", 1) * frame.height, 6) // 1:
            reason = full = "over_fraction"
        elif full == "kept" and tokens > keep.get("tokens", 10**9):
            reason = full = "over_tokens"
        reasons[row["source_uri"], row["source_row"]] = reason
    return reasons


def test_every_accepted_row_appears_once(indexed: Indexed) -> None:
    _, frame = _decide(indexed, "all", {})
    expected = []
    for entry in indexed.version.sources:
        rows = [0, 3] if entry.uri.endswith("bad.jsonl") else range(entry.rows)
        expected += [(entry.uri, row) for row in rows]
    assert sorted(frame.select("source_uri", "source_row").rows()) == sorted(expected)
    assert frame.height == indexed.version.rows == 2 * 630 + 40 + 2


def test_columns_and_types(indexed: Indexed) -> None:
    _, frame = _decide(indexed, "types", {})
    assert dict(frame.schema) == {
        "doc_id": pl.String,
        "block_id": pl.String,
        "block_row": pl.UInt32,
        "source_uri": pl.String,
        "source_row": pl.Int64,
        "tokens": pl.Int32,
        "label": pl.String,
        "score_good": pl.Float32,
        "error_good": pl.Float32,
        "value": pl.Float32,
        "value_error": pl.Float32,
        "rank": pl.UInt32,
        "kept": pl.Boolean,
        "reason": pl.String,
        "rule": pl.String,
        "duplicate_of": pl.String,
    }
    always = ("doc_id", "block_id", "block_row", "source_uri", "source_row", "tokens", "kept", "reason")
    assert frame.null_count().select(always).row(0) == (0,) * len(always)


@pytest.mark.parametrize(
    "keep",
    [
        {},
        {"rows": 1},
        {"rows": 10_000},
        {"fraction": 0.29},
        {"fraction": 1.0},
        {"tokens": 1000},
        {"min_value": 0.0},
        {"rows": 300, "min_value": 0.01},
        {"rows": 500, "fraction": 0.2, "tokens": 5000, "min_value": -0.1},
        {"fraction": 0.5, "tokens": 15_000, "rows": 640},
    ],
)
def test_rules_and_reasons(indexed: Indexed, keep: dict[str, Any]) -> None:
    name = "rules-" + "-".join(f"{key}{value}" for key, value in keep.items())
    selection, frame = _decide(indexed, name, keep)
    reasons = _expected(frame, keep)
    counts: dict[str, int] = {}
    for row in frame.iter_rows(named=True):
        reason = reasons.get((row["source_uri"], row["source_row"]), "no_prediction")
        assert row["reason"] == reason
        assert row["kept"] == (reason == "kept")
        counts[reason] = counts.get(reason, 0) + 1
    kept = frame.filter("kept")
    assert selection == Selection(
        rows=frame.height,
        kept=kept.height,
        tokens=int(frame["tokens"].sum()),
        tokens_kept=int(kept["tokens"].sum()),
        reasons=counts,
        steps=selection.steps,
    )
    assert kept["rank"].sort().to_list() == list(range(1, kept.height + 1))


def test_ranks_follow_value_then_doc_id(indexed: Indexed) -> None:
    _, frame = _decide(indexed, "ranks", {})
    ranked = frame.drop_nulls("rank").sort("rank")
    assert ranked["rank"].to_list() == list(range(1, ranked.height + 1))
    keys = list(zip((-ranked["value"]).to_list(), ranked["doc_id"].to_list(), strict=True))
    assert keys == sorted(keys)
    assert len(set(keys)) < len(keys)  # copies have ties


def test_a_fraction_is_what_it_says(tmp_path: Path) -> None:
    indexed = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": make_rows(100)})
    selection, _ = _decide(indexed, "run", {"fraction": 0.29})
    assert selection.kept == 29  # int(0.29 * 100) is 28


def test_nothing_kept_is_an_error_with_numbers(indexed: Indexed) -> None:
    for name, keep in (("first", {"tokens": 1}), ("small", {"fraction": 1e-9}), ("high", {"min_value": 1.5})):
        numbers = r"keeps none of 1,302 rows: the best one has value 0\.\d+ and \d+ tokens; of all, .*\(selection\.keep"
        with pytest.raises(SelectionError, match=numbers):
            _decide(indexed, f"nothing-{name}", keep)
        assert not indexed.store.exists(decisions_key(f"nothing-{name}"))


def test_no_row_with_a_prediction(tmp_path: Path) -> None:
    indexed = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": make_rows(5)}, silent=5)
    with pytest.raises(SelectionError, match="none of the 5 rows has 2 tokens"):
        _decide(indexed, "run", {})


def test_memory_is_checked_first(indexed: Indexed) -> None:
    with pytest.raises(LimitError, match=r"select needs \d+ MiB .* limits\.memory"):
        _decide(indexed, "memory", {}, memory=1000)


def test_parts_must_cover_the_version(indexed: Indexed) -> None:
    parts = score_parts(indexed, TARGET, run_id="cover", size=1)
    with pytest.raises(IntegrityError, match="scores cover"):
        decide(
            indexed.store, indexed.version, run_id="cover", parts=parts[1:], weights={"good": 1.0}, targets=["good"],
            aggregate="mean", selection=SelectionConfig(), memory=2**30,
        )  # fmt: skip


def test_places_are_those_of_the_sources(indexed: Indexed) -> None:
    _, frame = _decide(indexed, "places", {})
    texts = indexed.rows.select("doc_id", "text").unique()
    named = frame.join(texts, on="doc_id")
    for uri, group in named.partition_by("source_uri", as_dict=True).items():
        lines = pl.read_ndjson(str(uri[0]), ignore_errors=True) if not str(uri[0]).endswith("bad.jsonl") else None
        if lines is not None:
            ordered = group.sort("source_row")
            np.testing.assert_array_equal(ordered["text"].to_list(), lines["text"].to_list())


@pytest.mark.parametrize("aggregate", ["mean", "rrf"])
def test_decisions_do_not_depend_on_memory(
    indexed: Indexed, monkeypatch: pytest.MonkeyPatch, aggregate: Aggregate
) -> None:
    """However few rows are joined, sorted and written at a time."""
    keep = {"rows": 900, "fraction": 0.6, "tokens": 15_000, "min_value": -0.1}
    _, whole = _decide(indexed, f"whole-{aggregate}", keep, aggregate=aggregate)
    for sort_rows, slice_rows in ((60, 100), (300, 7)):
        plan = SelectMemory(StageMemory("select", 0, ""), slice_rows=slice_rows, sort_rows=sort_rows)
        monkeypatch.setattr(selection, "select_memory", lambda *_, plan=plan, **__: plan)
        monkeypatch.setattr(selection, "_GROUP_ROWS", 50)
        _, parts = _decide(indexed, f"parts-{aggregate}-{sort_rows}", keep, aggregate=aggregate)
        assert parts.equals(whole)
