"""Batches: everything once, in order, bounded in size and number."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.batches import MAX_TASKS, split


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), max_size=2000), target=st.integers(1, 10_000))
def test_batches_hold_every_item_once_in_order(sizes: list[int], target: int) -> None:
    batches = list(split(range(len(sizes)), sizes, target=target))
    assert [item for batch in batches for item in batch] == list(range(len(sizes)))
    assert len(batches) <= MAX_TASKS
    assert all(batches)
    grown = max(target, -(-sum(sizes) // MAX_TASKS))
    for batch in batches:
        assert sum(sizes[item] for item in batch) < grown + max(sizes[item] for item in batch) + 1


def test_greedy_filling_would_need_too_many() -> None:
    assert len(list(split(range(511), [100] * 511, target=1))) <= MAX_TASKS


def test_small_work_is_one_task() -> None:
    assert list(split(["a", "b"], [10, 20], target=1000)) == [["a", "b"]]
    assert list(split([], [], target=10)) == []


def test_an_item_larger_than_a_batch_stands_alone() -> None:
    assert list(split(["a", "b", "c"], [10, 1000, 10], target=10)) == [["a"], ["b"], ["c"]]
