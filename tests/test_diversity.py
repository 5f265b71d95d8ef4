"""Greedy k-centre: the farthest row next, as the definition has it, whatever the pools, blocks and memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rise_ops import diversity, index
from rise_ops.diversity import SEED, k_center_order, plan_k_center
from rise_ops.errors import IntegrityError, LimitError
from rise_ops.memory import MIB, diversity_memory
from rise_ops.simhash import SimHash
from rise_ops.store import Store
from tests.benchmarks.near_duplicates import strangers
from tests.indexed import INDEX
from tests.test_near_duplicates import write_rows

Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
STEP = 2.0**-20


def order_of(folder: Path, rows: npt.NDArray[np.float16], candidates: Int64Array, count: int, *,
             sizes: Sequence[int] = (), memory: int = 2**30) -> list[int]:  # fmt: skip
    folder.mkdir(exist_ok=True)
    store = Store(str(folder / "store"))
    blocks = write_rows(store, rows, sizes or [len(rows)])
    found = k_center_order(store, INDEX, blocks, candidates, count, memory=memory, folder=folder)
    assert not (folder / "diversity-vectors").exists()
    picked: list[int] = found.tolist()
    assert len(set(picked)) == len(picked) == min(count, len(candidates))
    return picked


def distances(rows: npt.NDArray[np.floating[Any]]) -> Float64Array:
    wide = rows.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    return np.asarray(1 - wide @ wide.T)


def check_greedy(apart: Float64Array, candidates: Int64Array, picked: Sequence[int]) -> None:
    """Each pick is a farthest candidate by the distances of all rows, but for steps and rounding."""
    assert picked[0] == candidates[0]
    nearest = apart[picked[0]].copy()
    for pick in picked[1:]:
        left = candidates[~np.isin(candidates, picked[: picked.index(pick)])]
        assert nearest[pick] >= nearest[left].max() - 1.5 * STEP
        nearest = np.minimum(nearest, apart[pick])


def clustered(rows: int, dim: int, *, seed: int = 0) -> npt.NDArray[np.float16]:
    random = np.random.default_rng(seed)
    centres = strangers(12, dim, seed=seed)
    drawn = centres[random.integers(0, 12, rows)] + random.uniform(0.01, 0.1, (rows, 1)) * random.standard_normal(
        (rows, dim)
    )
    return np.asarray(drawn, np.float16)


@pytest.mark.parametrize("entries", [2**23, 64 * 64, 1])
@pytest.mark.parametrize("make", [clustered, strangers])
def test_each_pick_is_the_farthest_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int, make: Any
) -> None:
    monkeypatch.setattr(diversity, "_POOL_ENTRIES", entries)  # pools of all candidates, and of 64
    rows = make(600, 64).astype(np.float16)
    candidates = np.random.default_rng(1).permutation(600)[:500]
    picked = order_of(tmp_path, rows, candidates, 450, sizes=[200, 400])
    check_greedy(distances(rows), candidates, picked)


def test_of_rows_equally_far_the_better_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_POOL_ENTRIES", 1)
    rows = np.zeros((300, 128), np.float16)
    rows[np.arange(300), np.arange(300) % 100] = 1  # 100 directions, each three times
    candidates = np.random.default_rng(2).permutation(300)
    picked = order_of(tmp_path, rows, candidates, 300)
    seen: list[int] = []
    first = [row for row in candidates.tolist() if row % 100 not in seen and not seen.append(row % 100)]  # type: ignore[func-returns-value]
    assert picked == first + [row for row in candidates.tolist() if row not in first]


def test_the_radius_is_at_most_twice_the_smallest(tmp_path: Path) -> None:
    for seed in range(6):
        rows = clustered(14, 3, seed=seed)
        chord = np.sqrt(2 * np.maximum(0, distances(rows)))
        for count in (1, 2, 4):
            picked = order_of(tmp_path / f"{seed}-{count}", rows, np.arange(14), count)
            best = min(chord[list(chosen)].min(axis=0).max() for chosen in combinations(range(14), count))
            assert chord[picked].min(axis=0).max() <= 2 * best + 1e-5


def test_blocks_chunks_and_memory_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered(500, 64)
    candidates = np.random.default_rng(3).permutation(500)[:400]
    expected = order_of(tmp_path / "a", rows, candidates, 100, sizes=[100, 400], memory=2**33)
    monkeypatch.setattr(index, "CHUNK_BYTES", 5_000)
    assert order_of(tmp_path / "b", rows, candidates, 100, sizes=[100, 400], memory=180 * MIB) == expected
    moved = np.concatenate([np.arange(100, 500), np.arange(100)])  # the blocks the other way round
    place = np.argsort(moved)
    found = order_of(tmp_path / "c", rows[moved], place[candidates], 100, sizes=[400, 100])
    assert moved[found].tolist() == expected


def test_what_is_too_much_is_compared_by_a_projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_EXACT_FLOPS", 1)
    monkeypatch.setattr(diversity, "WIDTH", 256)
    rows = clustered(300, 1_024)
    plan = plan_k_center(300, 60, dim=1_024)
    assert (plan.width, plan.projected, plan.greedy) == (256, True, 60)
    assert plan.text == "diversity: 60 of 300 rows by greedy k-centre on a projection to 256 dimensions"
    picked = order_of(tmp_path, rows, np.arange(300), 60)
    turned = SimHash.from_seed(1_024, 256, SEED).project(rows.astype(np.float32))
    nearest = distances(turned)[picked[0]]
    for pick in picked[1:]:
        assert nearest[pick] >= nearest.max() - 2e-3  # vectors are stored in 16 bits
        nearest = np.minimum(nearest, distances(turned)[pick])
    exact, projected = distances(rows), distances(turned)
    off = (projected / np.where(exact > 0.05, exact, np.nan))[np.triu_indices(300, 1)]
    assert np.nanstd(off) < 1.3 * np.sqrt(2 / 256)
    assert abs(np.nanmean(off) - 1) < 0.05


def test_the_rest_of_a_long_order_follows_by_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "_MOST_FLOPS", 2 * 300 * 64 * 20)
    rows = clustered(300, 64)
    plan = plan_k_center(300, 100, dim=64)
    assert plan.greedy == 20
    assert plan.text.endswith("the others by distance to the first 20")
    candidates = np.random.default_rng(4).permutation(300)
    picked = order_of(tmp_path, rows, candidates, 100)
    apart = distances(rows)
    check_greedy(apart, candidates, picked[:20])
    nearest = apart[picked[:20]].min(axis=0)
    rest = nearest[picked[20:]]
    assert (np.diff(rest) <= 1.5 * STEP).all()
    assert rest[-1] >= np.delete(nearest, picked).max() - 1.5 * STEP


@pytest.mark.parametrize(("candidates", "count"), [([], 3), ([2], 1), ([2], 5), ([1, 0], 0), ([3, 1], 9)])
def test_few_rows(tmp_path: Path, candidates: list[int], count: int) -> None:
    rows = strangers(4, 32).astype(np.float16)
    assert order_of(tmp_path, rows, np.array(candidates, np.int64), count) == candidates[:count]


def test_rows_without_direction_harm_no_others(tmp_path: Path) -> None:
    rows = strangers(6, 32).astype(np.float16)
    rows[2], rows[4] = 0, np.nan
    assert sorted(order_of(tmp_path, rows, np.arange(6), 6)) == list(range(6))


def test_the_order_is_made_on_every_store(store: Store, tmp_path: Path) -> None:
    rows = clustered(100, 64)
    blocks = write_rows(store, rows, [60, 40])
    told: list[tuple[int, int | None]] = []
    found = k_center_order(
        store, INDEX, blocks, np.arange(100), 30, memory=2**30, folder=tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    check_greedy(distances(rows), np.arange(100), found.tolist())
    assert told[-1] == (30, 30)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    blocks = write_rows(store, strangers(5, 32).astype(np.float16), [5])
    store.delete([f"indexes/{INDEX}/blocks/{blocks[0]}.zarr/signature/c/0/0"])
    with pytest.raises(IntegrityError, match="missing"):
        k_center_order(store, INDEX, blocks, np.arange(5), 2, memory=2**30, folder=tmp_path)
    assert not (tmp_path / "diversity-vectors").exists()


def test_plans() -> None:
    assert not plan_k_center(5_000, 1_250, dim=24_576).projected
    large = plan_k_center(1_000_000, 250_000, dim=24_576)
    assert large.projected and large.greedy < large.count
    assert plan_k_center(10, 20, dim=24_576).count == 10
    for candidates, dim in ((5_000, 24_576), (1_000_000, 24_576), (1_000_000, 64)):
        plan = plan_k_center(candidates, candidates // 4, dim=dim)
        held = diversity_memory(2**30, candidates=candidates, dim=dim, width=plan.width, pool=plan.pool)
        assert held.plan.bytes <= 2**30
        assert held.plan.text.startswith("diversity: ")
    with pytest.raises(LimitError, match=r"diversity needs [\d,]+ MiB .*selection.diversity.candidates"):
        diversity_memory(2**28, candidates=10**7, dim=24_576, width=512, pool=2_048)
