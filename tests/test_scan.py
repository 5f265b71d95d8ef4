"""The scan: every row against every query, as brute force would, whatever the batches are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rise_ops import index
from rise_ops.errors import IntegrityError
from rise_ops.index import write_block
from rise_ops.memory import TILE_ROWS, ScanMemory
from rise_ops.scan import BLOCK_SHIFT, Extremes, iter_scores, score_blocks
from rise_ops.store import Store
from tests.indexed import INDEX, signed, unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("sizes", "dim", "queries", "chunk_bytes"),
    [
        ([1], 1, 1, 2**20),
        ([3, 1, 7], 5, 2, 16),
        ([TILE_ROWS, TILE_ROWS + 1, 2 * TILE_ROWS - 1], 33, 7, 2**20),
        ([300, 2, 511], 64, 11, 37 * 128),
    ],
)
def test_scores_equal_brute_force(
    store: Store, monkeypatch: pytest.MonkeyPatch, sizes: list[int], dim: int, queries: int, chunk_bytes: int
) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", chunk_bytes)
    written = [signed(rows, dim, seed=seed) for seed, rows in enumerate(sizes)]
    records = [
        write_block(store, INDEX, f"{number:064x}", signatures, seconds=0, producer={})
        for number, signatures in enumerate(written)
    ]
    wanted = unit(queries, dim, seed=99)
    for memory in (ScanMemory(1, TILE_ROWS), ScanMemory(2, 2 * TILE_ROWS), ScanMemory(3, 8 * TILE_ROWS)):
        found = [np.full((rows, queries), np.nan, np.float32) for rows in sizes]
        for number, start, scores in iter_scores(store, INDEX, records, wanted, memory=memory):
            found[number][start : start + len(scores)] = scores
        for scores, signatures in zip(found, written, strict=True):
            np.testing.assert_allclose(scores, signatures.signature.astype(np.float64) @ wanted.T, atol=2e-6)


def test_blocks_come_with_their_counts_and_places(store: Store) -> None:
    for number, rows in enumerate((5, 9)):
        signatures = signed(rows, seed=number, silent=[1])
        write_block(store, INDEX, f"{number:064x}", signatures, seconds=0, producer={})
    seen: list[int] = []
    extremes = Extremes(100)
    blocks = list(
        score_blocks(
            store, INDEX, [f"{1:064x}", f"{0:064x}"], unit(2), extremes=extremes,
            progress=lambda done, _: seen.append(done),
        )
    )  # fmt: skip
    assert [(block.position, block.record.rows) for block in blocks] == [(0, 9), (1, 5)]
    assert seen == [9, 14]
    assert blocks[0].chunks.tolist() == [1, 0] + 7 * [1]
    assert extremes.top.shape == (2, 12)  # rows without a signature are not among them
    assert {int(row) & 0xFFFFFFFF for row in extremes.top_rows.ravel()} == {0, 2, 3, 4, 5, 6, 7, 8}
    assert {int(row) >> BLOCK_SHIFT for row in extremes.top_rows.ravel()} == {0, 1}


def test_a_damaged_chunk_stops_the_scan(store: Store) -> None:
    record = write_block(store, INDEX, "b" * 64, signed(5), seconds=0, producer={})
    key = f"indexes/{INDEX}/blocks/{'b' * 64}.zarr/signature/c/0/0"
    store.delete([key])
    with pytest.raises(IntegrityError, match="missing"):
        list(iter_scores(store, INDEX, [record], unit(1)))


_SCORES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 60), st.integers(1, 4)),
    elements=st.sampled_from([-1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0]),  # few values: many ties
)


@settings(deadline=None)
@given(scores=_SCORES, k=st.integers(1, 70), low=st.none() | st.integers(1, 70), cuts=st.lists(st.integers(0, 60)))
def test_extremes_equal_a_full_sort(scores: npt.NDArray[np.float32], k: int, low: int | None, cuts: list[int]) -> None:
    ordinals = np.arange(len(scores), dtype=np.int64) * 3 + (5 << BLOCK_SHIFT)
    extremes = Extremes(k, k_bottom=low)
    bounds = [0, *sorted(min(cut, len(scores)) for cut in cuts), len(scores)]
    for start, end in pairwise(bounds):
        extremes.add(scores[start:end], ordinals[start:end])
    for query, column in enumerate(scores.T):
        best = np.lexsort((ordinals, -column))[:k]
        worst = np.lexsort((ordinals, column))[: low or k]
        np.testing.assert_array_equal(extremes.top[query], column[best])
        np.testing.assert_array_equal(extremes.top_rows[query], ordinals[best])
        np.testing.assert_array_equal(extremes.bottom[query], column[worst])
        np.testing.assert_array_equal(extremes.bottom_rows[query], ordinals[worst])
