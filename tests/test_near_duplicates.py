"""Near-duplicates: greedy from the best row down, none goes that should not, as many are found as is said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops import index, near_duplicates
from rise_ops.bands import CODE_BITS, Bands, band_keys, bands_for, most_differing, plan_bands
from rise_ops.chains import Chains
from rise_ops.errors import DamagedError, IntegrityError, LimitError
from rise_ops.index import read_records, write_block
from rise_ops.index_rows import IndexRows, row_digests
from rise_ops.memory import MIB, DuplicatesMemory, StageMemory, duplicates_memory
from rise_ops.near_duplicates import NOT_ELIGIBLE, SEED, NearDuplicates, find_near_duplicates
from rise_ops.scratch import Scratch
from rise_ops.signatures import RowSignatures
from rise_ops.simhash import SimHash
from rise_ops.store import Store
from tests.benchmarks.near_duplicates import Setting, at_cosine, measure, strangers
from tests.indexed import INDEX

Float16Array = npt.NDArray[np.float16]
UInt64Array = npt.NDArray[np.uint64]
DIM = 256


def write_rows(store: Store, rows: Float16Array, sizes: Sequence[int], silent: Sequence[int] = ()) -> list[str]:
    """Blocks of these sizes with these rows; the silent ones have no signature."""
    chunks = np.ones(len(rows), np.int32)
    chunks[list(silent)] = 0
    blocks = []
    for start, stop in pairwise(np.cumsum([0, *sizes]).tolist()):
        blocks.append(f"{start:032x}{stop:032x}")
        part = RowSignatures(rows[start:stop], 9 * chunks[start:stop], chunks[start:stop])
        write_block(store, INDEX, blocks[-1], part, seconds=0, producer={})
    return blocks


def search(folder: Path, rows: Float16Array, priority: UInt64Array | None = None, *, cosine: float = 0.95,
           recall: float = 0.99, sizes: Sequence[int] = (), silent: Sequence[int] = (), memory: int = 2**30,
           ) -> NearDuplicates:  # fmt: skip
    """The search on an index of these rows."""
    folder.mkdir(exist_ok=True)
    store = Store(str(folder / "store"))
    blocks = write_rows(store, rows, sizes or [len(rows)], silent)
    order = np.arange(len(rows), dtype=np.uint64) if priority is None else priority
    return near_duplicates.near_duplicates(
        store, INDEX, blocks, order, cosine=cosine, recall=recall, memory=memory, folder=folder
    )


def cosines_of(rows: Float16Array) -> npt.NDArray[np.float64]:
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    return np.asarray((wide @ wide.T) / np.outer(lengths, lengths))


def greedy(near: npt.NDArray[np.bool_], priority: UInt64Array) -> list[int]:
    """Leaders by the definition, on a graph of pairs."""
    leaders = [-1] * len(near)
    kept: list[int] = []
    for row in np.lexsort((np.arange(len(near)), priority)).tolist():
        if priority[row] == NOT_ELIGIBLE:
            continue
        better = [other for other in kept if near[row, other]]
        leaders[row] = better[0] if better else -1
        kept += [] if better else [row]
    return leaders


def mixed(rows: int, *, seed: int = 0) -> tuple[Float16Array, UInt64Array]:
    """Strangers with much in common, pairs, chains, clusters, equal and nearly so; priorities, some of them none."""
    random = np.random.default_rng(seed)
    found = strangers(rows, DIM, common=0.4, seed=seed).astype(np.float32)
    for _ in range(rows // 4):
        one, other = random.integers(0, rows, 2)
        found[other] = at_cosine(found[one], random.uniform(0.93, 1), seed=int(random.integers(2**31)))
    found[rows // 10 : rows // 5] = found[3]
    found[rows // 5 : rows // 4] = found[5] + 0.004 * random.standard_normal((rows // 4 - rows // 5, DIM))
    priority = random.permutation(rows).astype(np.uint64)
    priority[random.integers(0, rows, rows // 50)] = NOT_ELIGIBLE
    return found.astype(np.float16), priority


@pytest.mark.parametrize("cosine", [0.95, 0.99, 0.8, 1.0])
def test_with_almost_full_recall_the_result_is_that_of_the_definition(tmp_path: Path, cosine: float) -> None:
    rows, priority = mixed(900)
    silent = [1, 4, 95, 500]
    found = search(tmp_path, rows, priority, cosine=cosine, recall=1 - 1e-9, sizes=[300, 50, 550], silent=silent)
    priority[silent] = NOT_ELIGIBLE
    cosines = cosines_of(rows)
    # the diagonal and identical rows: sums in another order than the library's
    assert found.leaders.tolist() == greedy(cosines >= cosine - 1e-12, priority)
    gone = np.flatnonzero(found.leaders >= 0)
    np.testing.assert_allclose(found.cosines[gone], cosines[gone, found.leaders[gone]], atol=1e-6)
    assert not found.cosines[found.leaders < 0].any()
    assert (found.rows, found.removed) == ((priority != NOT_ELIGIBLE).sum(), len(gone))


def test_the_result_is_the_greedy_one_on_the_pairs_that_the_codes_find(tmp_path: Path) -> None:
    rows, priority = mixed(500, seed=1)
    found = search(tmp_path, rows, priority, cosine=0.94, recall=0.4)
    assert found.bands is not None
    codes = SimHash.from_seed(DIM, CODE_BITS, SEED).codes(rows.astype(np.float32))
    keys = band_keys(codes, found.bands)
    candidates = (keys[:, None] == keys[None]).any(axis=2)
    for bits, most in found.bands.near:
        signs = 2 * np.unpackbits(codes, axis=1)[:, :bits].astype(np.float32) - 1
        candidates &= (bits - signs @ signs.T) / 2 <= most
    near = cosines_of(rows) >= 0.94 - 1e-12
    assert found.leaders.tolist() == greedy(candidates & near, priority)
    assert found.leaders.tolist() != greedy(near, priority)  # the recall is low enough to matter


def test_in_a_chain_the_middle_goes_and_both_ends_stay(tmp_path: Path) -> None:
    # angles of 0, 15 and 30 degrees; the cosine of 15 is 0.966
    chain = np.zeros((3, DIM), np.float32)
    chain[:, 0], chain[:, 1] = np.cos(np.radians([0, 15, 30])), np.sin(np.radians([0, 15, 30]))
    options: dict[str, Any] = {"cosine": 0.96, "recall": 1 - 1e-9}
    assert search(tmp_path / "a", chain.astype(np.float16), **options).leaders.tolist() == [-1, 0, -1]
    middle = np.array([2, 0, 1], np.uint64)
    assert search(tmp_path / "b", chain.astype(np.float16), middle, **options).leaders.tolist() == [1, -1, 1]


@pytest.mark.parametrize(("cosine", "recall"), [(0.98, 0.99), (0.95, 0.9), (0.9, 0.99), (0.7, 0.6)])
def test_as_many_pairs_are_found_as_is_said(tmp_path: Path, cosine: float, recall: float) -> None:
    pairs = 1_500
    left = strangers(pairs, DIM, common=0.3).astype(np.float32)
    right = np.stack([at_cosine(row, cosine + 2e-4, seed=seed) for seed, row in enumerate(left)])
    found = search(tmp_path, np.concatenate([left, right]).astype(np.float16), cosine=cosine, recall=recall)
    share = (found.leaders[pairs:] == np.arange(pairs)).mean()
    assert (found.leaders[:pairs] == -1).all()
    assert share >= recall - 3 * math.sqrt(recall * (1 - recall) / pairs)


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_a_huge_cluster_costs_a_comparison_a_row(tmp_path: Path, noise: float) -> None:
    random = np.random.default_rng(0)
    rows = strangers(1, DIM) + noise * random.standard_normal((9_000, DIM))
    found = search(tmp_path, rows.astype(np.float16), random.permutation(9_000).astype(np.uint64), cosine=0.98)
    assert found.bands is not None
    assert found.removed == 8_999
    assert len(np.unique(found.leaders)) == 2
    assert found.compared <= 9_000
    within_a_batch = 2_048 * 2_047 // 2
    assert found.candidates <= within_a_batch + 9_000 * found.bands.bands


def test_rows_without_a_signature_or_priority_neither_go_nor_make_others_go(tmp_path: Path) -> None:
    rows = np.tile(strangers(1, DIM), (8, 1)).astype(np.float16)
    rows[[2, 3]], rows[[4, 5], 7] = 0, np.nan
    priority = np.array([NOT_ELIGIBLE, *range(1, 8)], np.uint64)
    found = search(tmp_path, rows, priority, silent=[1])
    assert found.leaders.tolist() == [-1, -1, -1, -1, -1, -1, -1, 6]


def test_rows_equal_to_one_that_went_go_for_its_leader(tmp_path: Path) -> None:
    best = strangers(1, DIM)[0]
    rows = np.stack([best, *[at_cosine(best, 0.97, seed=1)] * 3]).astype(np.float16)
    found = search(tmp_path, rows, cosine=0.96, recall=1 - 1e-9)
    assert found.leaders.tolist() == [-1, 0, 0, 0]
    np.testing.assert_allclose(found.cosines, [0, 0.97, 0.97, 0.97], atol=1e-3)
    assert found.compared == 1


def test_rows_exactly_at_the_cosine_are_duplicates(tmp_path: Path) -> None:
    rows = np.repeat(strangers(2, DIM).astype(np.float16), 2, axis=0)
    rows[[1, 3]] *= 2  # other bytes, the same direction
    assert search(tmp_path, rows, cosine=1.0).leaders.tolist() == [-1, 0, -1, 2]


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(tmp_path: Path, rows: int) -> None:
    priority = np.full(3, NOT_ELIGIBLE)
    priority[:rows] = 0
    found = search(tmp_path, np.tile(strangers(1, DIM), (3, 1)).astype(np.float16), priority)
    assert found.leaders.tolist() == [-1, -1, -1]
    assert found.bands is None


def test_of_rows_of_equal_priority_the_first_stays(tmp_path: Path) -> None:
    rows = np.tile(strangers(2, DIM), (3, 1)).astype(np.float16)
    assert search(tmp_path, rows, np.ones(6, np.uint64)).leaders.tolist() == [-1, -1, 0, 1, 0, 1]


def test_order_of_blocks_chunks_batches_and_memory_do_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, priority = mixed(1_200, seed=2)
    expected = search(tmp_path / "a", rows, priority, sizes=[700, 500], recall=0.9)
    assert expected.removed > 200
    moved = np.concatenate([np.arange(700, 1_200), np.arange(700)])  # the blocks the other way round
    for name, batch, columns, pairs, order in (
        ("batches", 53, 2**28, 4_096, np.arange(1_200)),
        ("files", 2_048, 0, 3, np.arange(1_200)),
        ("both", 53, 2**16, 3, moved),
    ):
        plan = DuplicatesMemory(StageMemory("near_duplicates", 0, ""), 1, pairs, columns)
        monkeypatch.setattr(near_duplicates, "_BATCH_ROWS", batch)
        monkeypatch.setattr(near_duplicates, "_PIECE_ROWS", 100)
        monkeypatch.setattr(near_duplicates, "_PENDING_PAIRS", 10)
        monkeypatch.setattr(near_duplicates, "duplicates_memory", lambda *_, plan=plan, **__: plan)
        monkeypatch.setattr(index, "CHUNK_BYTES", 10_000)
        sizes = [500, 700] if order is moved else [700, 500]
        found = search(tmp_path / name, rows[order], priority[order], sizes=sizes, recall=0.9)
        leaders = np.where(found.leaders < 0, -1, order[found.leaders])
        np.testing.assert_array_equal(leaders, expected.leaders[order])
        np.testing.assert_allclose(found.cosines, expected.cosines[order], atol=1e-7)


def test_the_search_works_on_every_store(store: Store, tmp_path: Path) -> None:
    rows, priority = mixed(200)
    blocks = write_rows(store, rows, [150, 50])
    told: list[tuple[int, int | None]] = []
    options: dict[str, Any] = {"cosine": 0.95, "recall": 1 - 1e-9, "memory": 2**30, "folder": tmp_path}
    found = find_near_duplicates(
        store, INDEX, list(read_records(store, INDEX, blocks).values()), priority,
        progress=lambda done, total: told.append((done, total)), **options,
    )  # fmt: skip
    assert found.tolist() == greedy(cosines_of(rows) >= 0.95 - 1e-12, priority)
    assert told == sorted(told) and told[-1] == (400, 400)


def test_a_row_that_changes_after_it_was_coded_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = strangers(5, DIM).astype(np.float16)
    reader = IndexRows(store, INDEX, write_rows(store, rows, [2, 3]))
    digests = row_digests(rows)
    np.testing.assert_array_equal(reader.fetch(np.array([4, 0, 2]), digests[[4, 0, 2]]), rows[[4, 0, 2]])
    with pytest.raises(DamagedError, match=r"row 1 of .*/signature/c/0/0 is not what it was .*curate verify --deep"):
        reader.fetch(np.array([3]), digests[[4]])
    store.delete([f"indexes/{INDEX}/blocks/{0:032x}{2:032x}.zarr/signature/c/0/0"])
    with pytest.raises(DamagedError, match="is not what it was"):
        reader.fetch(np.array([0]), digests[[0]])


def test_a_damaged_chunk_and_a_missing_block_stop_the_search(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = strangers(5, DIM).astype(np.float16)
    blocks = write_rows(store, rows, [5])
    options: dict[str, Any] = {"cosine": 0.95, "recall": 0.9, "memory": 2**30, "folder": tmp_path}
    store.delete([f"indexes/{INDEX}/blocks/{blocks[0]}.zarr/signature/c/0/0"])
    with pytest.raises(IntegrityError, match="missing"):
        find_near_duplicates(store, INDEX, blocks, np.arange(5, dtype=np.uint64), **options)
    with pytest.raises(IntegrityError, match="is not in index"):
        find_near_duplicates(store, INDEX, ["0" * 64], np.arange(5, dtype=np.uint64), **options)
    with pytest.raises(ValueError, match="4 priorities for 5 rows"):
        find_near_duplicates(store, INDEX, blocks, np.arange(4, dtype=np.uint64), **options)


# ---- bands


def test_the_tail_of_the_binomial_distribution() -> None:
    assert most_differing(100, 0.0, 0.01) == 0
    for bits, differs, miss in ((10, 0.5, 0.06), (512, 0.064, 1e-3), (1_000, 0.14, 1e-4)):
        most = most_differing(bits, differs, miss)
        chances = [math.comb(bits, n) * differs**n * (1 - differs) ** (bits - n) for n in range(bits + 1)]
        assert sum(chances[most + 1 :]) <= miss < sum(chances[most:])


@settings(deadline=None, max_examples=30)
@given(cosine=st.floats(0.51, 1.0), recall=st.floats(0.01, 0.9999), rows=st.integers(2, 10**8))
def test_a_plan_keeps_its_word(cosine: float, recall: float, rows: int) -> None:
    plan = plan_bands(cosine, recall, rows=rows, sample=_sample_codes(64))
    differs = math.acos(cosine) / math.pi
    missed_by_bands = (1 - (1 - differs) ** plan.bits) ** plan.bands
    assert missed_by_bands + 0.2 * (1 - recall) <= 1 - recall + 1e-12
    assert plan.bits * plan.bands <= CODE_BITS


def test_more_rows_get_longer_keys_and_strangers_alike_too() -> None:
    few, many = (plan_bands(0.95, 0.99, rows=rows, sample=_sample_codes(256)) for rows in (10**3, 10**7))
    assert few.bits < many.bits
    alike = plan_bands(0.95, 0.99, rows=10**5, sample=_sample_codes(256, common=0.5))
    isotropic = plan_bands(0.95, 0.99, rows=10**5, sample=_sample_codes(256))
    assert alike.bits > isotropic.bits
    assert bands_for(20, 0.1, 0.01) == math.ceil(math.log(0.01) / math.log(1 - 0.9**20))


def _sample_codes(rows: int, *, common: float = 0.0) -> npt.NDArray[np.uint8]:
    vectors = strangers(rows, 64, common=common).astype(np.float32)
    rotation = np.random.default_rng(1).standard_normal((64, CODE_BITS)).astype(np.float32)
    return np.packbits(vectors @ rotation > 0, axis=1)


def test_keys_are_the_bits_of_the_bands() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (5, 16)).astype(np.uint8)
    keys = band_keys(codes, Bands(bits=11, bands=7, near=(), candidates=0))
    for row, code in enumerate(codes):
        text = "".join(f"{byte:08b}" for byte in code)
        assert keys[row].tolist() == [int(text[11 * band : 11 * band + 11], 2) for band in range(7)]


# ---- tables


@settings(deadline=None, max_examples=40)
@given(batches=st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=8), mapped=st.booleans())
def test_chains_hold_what_was_added(batches: list[list[int]], mapped: bool,
                                    tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    total = sum(map(len, batches))
    scratch = Scratch(tmp_path_factory.mktemp("chains"), 0 if mapped else 2**20)
    chains = Chains(scratch, "test", tables=2, rows=max(1, total))
    added: list[int] = []
    for batch in batches:
        keys = np.array(batch, np.uint64)
        found: list[list[int]] = [[] for _ in batch]
        for asking, rows in chains.walk(1, keys):
            assert len(set(asking.tolist())) == len(asking)
            for place, row in zip(asking.tolist(), rows.tolist(), strict=True):
                found[place].append(row)
        for key, rows_found in zip(batch, found, strict=True):
            same = [row for row, other in enumerate(added) if other == key]
            assert [row for row in rows_found if added[row] == key] == same[::-1]
            assert len(rows_found) == len(set(rows_found))
        chains.add(1, keys, np.arange(len(added), len(added) + len(batch)))
        added += batch
        assert not list(chains.walk(0, keys))


@pytest.mark.parametrize("memory", [0, 2**20])
def test_columns_are_the_same_in_memory_and_in_files(tmp_path: Path, memory: int) -> None:
    column = Scratch(tmp_path, memory).column("numbers", (10_000, 3), np.int32)
    assert (tmp_path / "numbers").exists() == (memory == 0)
    assert not column.read(0, 10_000).any()
    expected = np.zeros((10_000, 3), np.int32)
    random = np.random.default_rng(0)
    for _ in range(3):
        rows = random.permutation(10_000)[:6_000]
        values = random.integers(0, 99, (6_000, 3)).astype(np.int32)
        column.put(rows, values)
        expected[rows] = values
    column.write(17, values[:100])
    expected[17:117] = values[:100]
    np.testing.assert_array_equal(column.take(rows), expected[rows])
    np.testing.assert_array_equal(column.take(rows, 2), expected[rows, :2])
    np.testing.assert_array_equal(column.array, expected)
    assert len(column) == 10_000


# ---- memory


@pytest.mark.parametrize("memory", [256 * MIB, 2**30, 2**40])
def test_a_plan_keeps_the_limit(memory: int) -> None:
    plan = duplicates_memory(memory, dim=24_576)
    assert plan.plan.bytes <= memory
    assert plan.pairs >= 1 and 0 <= plan.columns < memory
    assert plan.plan.text.startswith("near_duplicates: ")


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(LimitError, match=r"near_duplicates needs \d+ MiB .* or use a smaller sketch"):
        duplicates_memory(64 * MIB, dim=24_576)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["near_duplicates", "diversity"])
def test_signatures_that_are_more_than_memory_are_compared_within_the_limit(tmp_path: Path, work: str) -> None:
    setting = Setting(work, str(tmp_path), 70_000, 2_048, 0.3, 0.98, 0.99, 0.02, 256 * MIB)
    measure(setting, fill=True)
    store = Store(str(tmp_path / "store"))
    assert sum(size for _, size in store.list("indexes")) > 256 * MIB
    found = measure(setting)
    assert found["peak MiB"] < 256
    if work == "near_duplicates":
        assert found["found of all"] > 0.98
