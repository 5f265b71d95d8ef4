"""Ranking on disk: the same ranks and fates as a sort in memory, however little fits."""

from __future__ import annotations

import itertools
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.config import KeepConfig
from rise_ops.ranking import Ranking, Totals, ordered
from rise_ops.selection import REASONS, fate_rules

Row = tuple[float | None, int, int]
"""Value, eight bytes of the doc_id, tokens."""

_VALUES = [None, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.1, 0.25, 0.25000003, 1.0, float("inf"), float("-inf")]
_ROWS = st.lists(
    st.tuples(st.sampled_from(_VALUES), st.sampled_from([0, 1, 2**16, 2**48, 2**64 - 1]), st.integers(0, 30)),
    min_size=1,
    max_size=80,
)
_KEEPS = [
    dict(itertools.chain(*combination))
    for combination in itertools.product(
        ([], [("rows", 7)]), ([], [("fraction", 0.29)]), ([], [("tokens", 200)]), ([], [("min_value", 0.1)])
    )
]


def _in_memory(rows: list[Row], keep: KeepConfig) -> list[tuple[int | None, str]]:
    """Rank and reason of each row, as one reads the rules."""
    frame = pl.DataFrame(
        {"value": [row[0] for row in rows], "tie": [row[1] for row in rows], "tokens": [row[2] for row in rows]},
        schema={"value": pl.Float32, "tie": pl.UInt64, "tokens": pl.Int32},
    ).with_row_index("row")
    frame = frame.sort("value", "tie", "row", descending=[True, False, False], nulls_last=True)
    fates: list[tuple[int | None, str]] = [(None, "")] * len(rows)
    total = 0
    for rank, row in enumerate(frame.iter_rows(named=True), 1):
        total += row["tokens"]
        fates[row["row"]] = (
            None if row["value"] is None else rank,
            _reason(row["value"], rank, total, len(rows), keep),
        )
    return fates


def _reason(value: float | None, rank: int, tokens: int, rows: int, keep: KeepConfig) -> str:
    if value is None:
        return "no_prediction"
    if keep.min_value is not None and value < np.float32(keep.min_value):
        return "below_min_value"
    if keep.rows is not None and rank > keep.rows:
        return "over_rows"
    if keep.fraction is not None and rank > int(Fraction(str(keep.fraction)) * rows):
        return "over_fraction"
    return "over_tokens" if keep.tokens is not None and tokens > keep.tokens else "kept"


def _ranked(rows: list[Row], keep: KeepConfig, *, capacity: int, batch: int) -> tuple[Totals, list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        ranking = Ranking(Path(folder), capacity=capacity)
        for part in (rows[start : start + batch] for start in range(0, len(rows), batch)):
            values = pl.Series([row[0] for row in part], dtype=pl.Float32)
            ties = np.array([row[1] for row in part], np.uint64)
            tokens = np.array([row[2] for row in part], np.int32)
            ranking.add(values.fill_null(0.0).to_numpy(), values.is_not_null().to_numpy(), ties, tokens)
        totals = ranking.rank(fate_rules(keep, ranking.rows))
        parts = [ranking.take(min(batch, len(rows) - start)) for start in range(0, len(rows), batch)]
        found = [pair for ranks, codes in parts for pair in zip(ranks.tolist(), codes.tolist(), strict=True)]
    return totals, [(rank or None, REASONS[code]) for rank, code in found]


@settings(deadline=None, max_examples=150)
@given(rows=_ROWS, keep=st.sampled_from(_KEEPS), capacity=st.integers(1, 90), batch=st.integers(1, 90))
def test_fates_equal_a_sort_in_memory(rows: list[Row], keep: dict[str, Any], capacity: int, batch: int) -> None:
    config = KeepConfig(**keep)
    totals, found = _ranked(rows, config, capacity=capacity, batch=batch)
    expected = _in_memory(rows, config)
    assert found == expected
    for code, reason in enumerate(REASONS):
        mine = [row for row, (_, each) in zip(rows, expected, strict=True) if each == reason]
        assert (totals.rows[code], totals.tokens[code]) == (len(mine), sum(row[2] for row in mine))
    best = [row for row, (rank, _) in zip(rows, expected, strict=True) if rank == 1]
    assert (totals.best is None) == (not best)
    if totals.best is not None:
        assert totals.best[0] == pytest.approx(best[0][0])
        assert totals.best[1] == best[0][2]


@pytest.mark.parametrize("capacity", [500, 3_000, 100_000])
def test_many_rows_of_few_values_are_ranked_in_parts(capacity: int) -> None:
    generator = np.random.default_rng(0)
    rows: list[Row] = [
        (float(value), int(tie), 1)
        for value, tie in zip(
            generator.choice(np.array([0.5, 0.5000001, -3], np.float32), 20_000),
            generator.integers(0, 4, 20_000),
            strict=True,
        )
    ]
    _, found = _ranked(rows, KeepConfig(rows=777), capacity=capacity, batch=4_000)
    assert found == _in_memory(rows, KeepConfig(rows=777))


def test_a_fraction_of_all_rows_counts_those_without_a_value() -> None:
    rows: list[Row] = [(None, 0, 1)] * 50 + [(1.0, 0, 1)] * 50
    _, found = _ranked(rows, KeepConfig(fraction=0.29), capacity=7, batch=10)
    assert sum(reason == "kept" for _, reason in found) == 29


def test_order_of_values() -> None:
    values = np.array([np.nan, np.inf, 2, 1, 0.0, -0.0, -1, -np.inf, 7], np.float32)
    valued = np.array([True] * 8 + [False])
    keys = ordered(values, valued)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[4] == keys[5]
    assert len(set(keys.tolist())) == 8
