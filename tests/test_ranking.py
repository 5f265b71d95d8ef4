"""Sorting on disk: the same order as a sort in memory, however little fits; fates come back by place."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops import ranking
from rise_ops.ranking import KEY, Fates, Records, Sorter, by_value, has_value, ordered, ties_of, values_of

Row = tuple[float | None, int]
"""Value, eight bytes of the doc_id."""

_RECORD = np.dtype([*((name, KEY[name]) for name in KEY.names or ()), ("tokens", "<i4")])
_VALUES = [None, -1.0, -0.5, -0.0, 0.0, 1e-30, 0.1, 0.25, 0.25000003, 1.0, float("inf"), float("-inf")]
_TIES = [0, 1, 2**16, 2**31, 2**32, 2**48, 2**64 - 1]
_ROWS = st.lists(st.tuples(st.sampled_from(_VALUES), st.sampled_from(_TIES)), min_size=1, max_size=80)


def _records(rows: Sequence[Row], first: int) -> Records:
    records = np.zeros(len(rows), _RECORD)
    values = pl.Series([row[0] for row in rows], dtype=pl.Float32)
    by_value(
        records,
        values.fill_null(0.0).to_numpy(),
        values.is_not_null().to_numpy(),
        np.array([row[1] for row in rows], np.uint64),
    )
    records["row"] = np.arange(first, first + len(rows))
    records["tokens"] = records["row"] % 97
    return records


def _sorted(rows: Sequence[Row], *, capacity: int, batch: int, last_first: bool = False) -> Records:
    with tempfile.TemporaryDirectory() as folder:
        sorter = Sorter(Path(folder) / "keys", _RECORD, capacity=capacity)
        starts = range(0, len(rows), batch)
        for start in reversed(starts) if last_first else starts:
            sorter.add(_records(rows[start : start + batch], start))
        found = np.concatenate(list(sorter.runs()))
        assert not list(Path(folder).iterdir())
        return found


def _in_memory(rows: Sequence[Row]) -> list[int]:
    frame = pl.DataFrame(rows, schema={"value": pl.Float32, "tie": pl.UInt64}, orient="row").with_row_index("row")
    ranked = frame.sort("value", "tie", "row", descending=[True, False, False], nulls_last=True)
    return list(ranked["row"].to_list())


@settings(deadline=None, max_examples=150)
@given(
    rows=_ROWS,
    capacity=st.integers(1, 90),
    batch=st.integers(1, 90),
    piece=st.integers(1, 50),
    last_first=st.booleans(),
)
def test_the_order_equals_a_sort_in_memory(
    rows: list[Row], capacity: int, batch: int, piece: int, *, last_first: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "PIECE_ROWS", piece)
        found = _sorted(rows, capacity=capacity, batch=batch, last_first=last_first)
    order = _in_memory(rows)
    assert found["row"].tolist() == order
    assert found["tokens"].tolist() == [row % 97 for row in order]
    assert has_value(found).tolist() == [rows[row][0] is not None for row in order]
    assert ties_of(found).tolist() == [rows[row][1] for row in order]
    expected = np.array([rows[row][0] or 0.0 for row in order], np.float32)
    np.testing.assert_array_equal(values_of(found)[has_value(found)], expected[has_value(found)])


@pytest.mark.parametrize("capacity", [500, 3_000, 100_000])
def test_many_rows_of_few_values_are_sorted_in_parts(capacity: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.choice(np.array([0.5, 0.5000001, -3], np.float32), 20_000)
    rows = [(float(value), int(tie)) for value, tie in zip(values, generator.integers(0, 4, 20_000), strict=True)]
    assert _sorted(rows, capacity=capacity, batch=4_000)["row"].tolist() == _in_memory(rows)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 200), capacity=st.integers(1, 220), batch=st.integers(1, 90), take=st.integers(1, 90))
def test_fates_come_back_by_place(rows: int, capacity: int, batch: int, take: int) -> None:
    order = np.random.default_rng(rows).permutation(rows).astype(np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        fates = Fates(Path(folder), capacity=capacity)
        for start in range(0, rows, batch):
            some = order[start : start + batch]
            fates.add(some, (some * np.uint64(3)).astype(np.int64), (some % np.uint64(5)).astype(np.uint16))
        found: list[npt.NDArray[Any]] = [fates.take(min(take, rows - start)) for start in range(0, rows, take)]
    every = np.concatenate(found)
    assert every["row"].tolist() == list(range(rows))
    assert every["rank"].tolist() == [3 * row for row in range(rows)]
    assert every["code"].tolist() == [row % 5 for row in range(rows)]


def test_order_of_values() -> None:
    values = np.array([np.nan, np.inf, 2, 1, 0.0, -0.0, -1, -np.inf, 7], np.float32)
    valued = np.array([True] * 8 + [False])
    keys = ordered(values, valued)
    assert keys.tolist() == sorted(keys.tolist())
    assert keys[4] == keys[5]
    assert len(set(keys.tolist())) == 8
