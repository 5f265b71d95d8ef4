"""Rows by which a selection is judged, against plain sorting."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from rise_ops import judged_rows as judged
from rise_ops.report_data import find_cut
from rise_ops.store import Store
from tests.report_runs import synthetic_decisions


@pytest.fixture
def frame() -> pl.DataFrame:
    return synthetic_decisions(3_000)


def found(tmp_path: Path, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    read: list[str] = []

    def read_block(_: Store, block: str, *, columns: list[str]) -> pl.DataFrame:
        read.append(block)
        assert columns == ["text"]
        return pl.DataFrame({"text": [f"{block[:8]} {row} " + "x" * 3_000 for row in range(2_048)]})

    monkeypatch.setattr(judged, "read_block", read_block)
    store, buffer = Store(str(tmp_path)), io.BytesIO()
    frame.write_parquet(buffer)
    store.create("runs/run/decisions.parquet", buffer.getvalue())
    rows = judged.judged_rows(store, "run")
    assert len(read) == len(set(read))
    return rows


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["doc_id"] for row in rows]


def test_rows_are_the_ones_that_sorting_finds(
    tmp_path: Path, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = found(tmp_path, frame, monkeypatch)
    ranked = frame.filter(pl.col("value").is_not_null()).sort("rank")
    assert ids(rows["best"]) == ranked["doc_id"].head(10).to_list()
    assert ids(rows["worst"]) == ranked["doc_id"].tail(10).reverse().to_list()
    cut = find_cut(frame.lazy())
    last = ranked.filter(pl.col("kept") & (pl.col("rank") <= cut.rank)).tail(5)
    assert ids(rows["cut"]["kept"]) == last["doc_id"].to_list()
    waiting = ranked.filter(pl.col("reason") == "over_tokens")
    assert ids(rows["cut"]["dropped"]) == waiting["doc_id"].head(5).to_list()
    assert set(rows["dropped"]) == {"excluded_pattern", "excluded_target", "near_duplicate", "over_source_quota"}
    for reason, some in rows["dropped"].items():
        assert ids(some) == ranked.filter(pl.col("reason") == reason)["doc_id"].head(3).to_list()
    for row in rows["best"]:
        place = frame.row(by_predicate=pl.col("doc_id") == row["doc_id"], named=True)
        assert row["text"].startswith(f"{place['block_id'][:8]} {place['block_row']} ")
        assert len(row["text"]) == judged.TEXT_CHARACTERS
        assert (row["label"], row["value_error"]) == (place["label"], place["value_error"])


def test_the_largest_groups_of_near_duplicates(
    tmp_path: Path, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rise_ops.report_rows._GROUPS_AT_ONCE", 40)
    groups = found(tmp_path, frame, monkeypatch)["near_duplicates"]
    sizes = frame.filter(pl.col("duplicate_of").is_not_null()).group_by("duplicate_of").len()
    assert [group["size"] - 1 for group in groups] == sizes["len"].sort(descending=True).head(5).to_list()
    for group in groups:
        members = frame.filter(pl.col("duplicate_of") == group["stayed"]["doc_id"]).sort("rank")
        assert members.height == group["size"] - 1
        assert ids(group["dropped"]) == members["doc_id"].head(4).to_list()


def test_a_run_that_keeps_all_has_no_other_side(
    tmp_path: Path, frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = frame.select(
        "doc_id", "block_id", "block_row", "source_uri", "source_row", "tokens", "value", "rank",
        kept=pl.lit(True), reason=pl.lit("kept"),
    )  # fmt: skip
    rows = found(tmp_path, plain, monkeypatch)
    assert rows["cut"]["dropped"] == [] and rows["dropped"] == {} and rows["near_duplicates"] == []
    assert "label" not in rows["best"][0]
