"""Exact search: the same rows, order and scores whatever order, tiles and memory; and only among what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rise_ops import index
from rise_ops.code_search import CodeScorer, search_codes, unpacked
from rise_ops.codes import codes_folder, missing_codes, open_simhash, read_codes, write_codes
from rise_ops.config import SimHashConfig
from rise_ops.corpus import placements
from rise_ops.errors import ConfigError, IntegrityError, LimitError, ModelError
from rise_ops.filters import RowFilter
from rise_ops.index import read_records, read_rows, write_block
from rise_ops.memory import TILE_ROWS, ScanMemory
from rise_ops.scan import BLOCK_SHIFT
from rise_ops.search import Found, exact_scores, search
from rise_ops.signatures import RowSignatures
from rise_ops.simhash import SimHash, scale, standard_error
from rise_ops.store import Store
from tests.corpora import make_rows
from tests.indexed import INDEX, Indexed, index_rows, signed, unit

DIM = 64
CODES = SimHashConfig(bits=2_048, seed=3)
FEWER = SimHashConfig(bits=512, seed=4)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[str], dict[str, RowSignatures]]:
    """Blocks of several chunks each, with silent rows and rows that stand in several blocks."""
    store = Store(str(tmp_path_factory.mktemp("search") / "store"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK_BYTES", 200 * 2 * DIM)
        written = {f"{7 * number % 11:064x}": signed(rows, DIM, seed=number, silent=[0])
                   for number, rows in enumerate((300, 517, 130, 1))}  # fmt: skip
        names = list(written)
        for name in names[1:3]:
            written[name].signature[5:50] = written[names[0]].signature[5:50]
        for name, signatures in written.items():
            write_block(store, INDEX, name, signatures, seconds=0, producer={})
    return store, names, written


def _named(found: Found, blocks: list[str]) -> list[list[tuple[float, str, int]]]:
    mask = (1 << BLOCK_SHIFT) - 1
    return [
        [(float(score), blocks[row >> BLOCK_SHIFT], row & mask) for score, row in zip(scores, rows, strict=True)]
        for scores, rows in zip(found.scores, found.rows.tolist(), strict=True)
    ]


def _brute(
    written: dict[str, RowSignatures], query: npt.NDArray[np.float32], k: int, sign: int
) -> list[tuple[float, str, int]]:
    scored = [
        (float(np.float32(np.dot(row.astype(np.float64), query.astype(np.float64)))), name, place)
        for name, signatures in written.items()
        for place, row in enumerate(signatures.signature)
        if signatures.chunks[place]
    ]
    return sorted(scored, key=lambda item: (sign * item[0], item[1], item[2]))[:k]


@pytest.mark.parametrize("k", [1, 7, 60, 2_000])
def test_results_are_brute_forces_in_any_order_and_memory(
    blocks: tuple[Store, list[str], dict[str, RowSignatures]], k: int
) -> None:
    store, names, written = blocks
    queries = unit(3, DIM, seed=9)
    queries[2] = written[names[0]].signature[7]  # equal rows in three blocks
    expected = [[_brute(written, query, k, sign) for query in queries] for sign in (-1, 1)]
    orders = [names, names[::-1], [names[2], names[0], names[3], names[1]]]
    plans = [ScanMemory(1, TILE_ROWS), ScanMemory(3, 8 * TILE_ROWS)]
    for order in orders:
        for memory in plans:
            both = search(store, INDEX, order, queries, k=k, k_bottom=k, memory=memory)
            assert [_named(found, order) for found in both] == expected


def test_rounding_of_float32_decides_nothing(tmp_path: Path) -> None:
    """Rows whose float32 scores come out equal or in the wrong order are ordered by their exact scores."""
    store = Store(str(tmp_path / "store"))
    rows = np.full((400, 4_096), 0.015625, np.float16)
    rows[:, 0] += np.linspace(0, 0.01, 400).astype(np.float16)
    signatures = RowSignatures(rows, np.ones(400, np.int32), np.ones(400, np.int32))
    write_block(store, INDEX, "a" * 64, signatures, seconds=0, producer={})
    query = unit(1, 4_096)
    (top, _) = search(store, INDEX, ["a" * 64], query, k=400)
    assert _named(top, ["a" * 64])[0] == _brute({"a" * 64: signatures}, query[0], 400, -1)


@pytest.mark.parametrize("dim", [3, 352, 8_192, 24_576])
def test_an_exact_score_does_not_depend_on_its_company(dim: int) -> None:
    rows, query = unit(40, dim).astype(np.float16), unit(1, dim, seed=1)[0]
    together = exact_scores(rows, np.arange(40), query)
    assert [exact_scores(rows, np.array([row]), query)[0] for row in range(40)] == together.tolist()
    np.testing.assert_array_equal(exact_scores(rows, np.arange(39, -1, -1), query)[::-1], together)
    right = [math.fsum(row.astype(np.float64) * query.astype(np.float64)) for row in rows]
    assert np.abs(together - np.array(right)).max() <= 2.0**-24 * np.abs(together).max()


def test_single_rows_are_read_from_their_chunks(blocks: tuple[Store, list[str], dict[str, RowSignatures]]) -> None:
    store, names, written = blocks
    (record,) = read_records(store, INDEX, [names[1]]).values()
    wanted = [516, 0, 199, 200, 3]
    assert record.chunk_rows < 517
    found = read_rows(store, INDEX, [(record, row) for row in wanted])
    np.testing.assert_array_equal(found, written[names[1]].signature[wanted])


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    record = write_block(store, INDEX, "a" * 64, signed(9, DIM), seconds=0, producer={})
    file = tmp_path / "store" / f"indexes/{INDEX}/blocks/{'a' * 64}.zarr/signature/c/0/0"
    data = bytearray(file.read_bytes())
    data[2 * DIM * 4 : 2 * DIM * 5] = b"\x00\x3c" * DIM
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="no signature of row 4"):
        read_rows(store, INDEX, [(record, 4)])
    file.write_bytes(data[:300])
    with pytest.raises(IntegrityError, match="no signature of row 8"):
        read_rows(store, INDEX, [(record, 8)])


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """Two objects with blocks of their own, two small ones that share one."""
    folder = tmp_path_factory.mktemp("filters")
    files = {
        name: [{**row, "kind": line if line % 2 else "even"} for line, row in enumerate(make_rows(rows, seed=rows))]
        for name, rows in (("raw/a.jsonl", 400), ("raw/b.jsonl", 300), ("small/c.jsonl", 40), ("small/d.jsonl", 30))
    }  # fmt: skip
    (folder / "raw").mkdir()
    (folder / "small").mkdir()
    return index_rows(Store(str(folder / "store")), folder, files, silent=1)


@pytest.mark.parametrize(
    ("source", "label", "expected"),
    [
        ("raw/a.jsonl", None, lambda uri, _: uri.endswith("raw/a.jsonl")),
        ("raw/", None, lambda uri, _: "/raw/" in uri),
        ("*.jsonl", None, lambda *_: True),
        ("small/d.jsonl", None, lambda uri, _: uri.endswith("small/d.jsonl")),
        (None, "kind=even", lambda _, row: row % 2 == 0),
        (None, "kind=7", lambda _, row: row == 7),
        ("small/c.jsonl", "kind=even", lambda uri, row: uri.endswith("small/c.jsonl") and row % 2 == 0),
    ],
)
def test_only_wanted_rows_are_searched(
    indexed: Indexed, source: str | None, label: str | None, expected: Callable[[str, int], bool]
) -> None:
    folder = Path(indexed.store.uri).parent
    only = RowFilter.parse(source=None if source is None else f"{folder}/{source}", label=label)
    wanted = only.wanted(indexed.store, indexed.version)
    (top, _) = search(indexed.store, INDEX, indexed.blocks, unit(1), k=10_000, wanted=wanted)
    places = placements(indexed.store, indexed.version, indexed.blocks)
    uris = {(block, row): (uri, line) for block, row, uri, line in places.iter_rows()}
    found = {uris[block, row] for _, block, row in _named(top, indexed.blocks)[0]}
    silent = {uris[block, 0] for block in indexed.blocks}
    assert found == {place for place in uris.values() if expected(*place)} - silent
    assert found


@pytest.mark.parametrize(
    ("source", "label", "says"), [("/nowhere/*", None, "no such object"), (None, "colour=red", "no such column")]
)
def test_a_filter_that_finds_nothing_says_so(
    indexed: Indexed, source: str | None, label: str | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RowFilter.parse(source=source, label=label).wanted(indexed.store, indexed.version)
    with pytest.raises(ConfigError, match="FIELD=VALUE"):
        RowFilter.parse(source=None, label="colour")


def test_estimates_are_within_their_error_and_rounding_adds_little() -> None:
    rows, queries = unit(500, DIM), unit(11, DIM, seed=2)
    queries[1] *= 3
    simhash = SimHash.from_seed(DIM, CODES.bits, 3)
    codes = simhash.codes(rows)
    signs = np.unpackbits(codes, axis=1).astype(np.float64) * 2 - 1
    projected = simhash.project(queries)
    unrounded = scale(CODES.bits) * signs @ projected.astype(np.float64).T
    norms = np.linalg.norm(queries, axis=1)
    found = CodeScorer(projected).score(codes)
    assert (np.abs(found - unrounded).std(axis=0) < 0.02 * standard_error(CODES.bits) * norms).all()
    error = (found - rows @ queries.T) / norms
    assert 0.4 < error.std() / standard_error(CODES.bits) < 1.05
    for cut in (1, 333):
        np.testing.assert_array_equal(CodeScorer(projected).score(codes[cut:]), found[cut:])


@pytest.mark.gpu
def test_products_on_a_gpu_are_the_same() -> None:
    simhash = SimHash.from_seed(DIM, CODES.bits, 3)
    projected, codes = simhash.project(unit(11, DIM, seed=2)), simhash.codes(unit(1_500, DIM))
    np.testing.assert_array_equal(CodeScorer(projected, device="cuda").score(codes), CodeScorer(projected).score(codes))


def test_bits_are_unpacked_as_numpy_does() -> None:
    codes = np.random.default_rng(0).integers(0, 256, (37, 24), dtype=np.uint8)
    np.testing.assert_array_equal(unpacked(torch.from_numpy(codes)).numpy(), np.unpackbits(codes, axis=1))


@pytest.mark.parametrize("memory", [2**30, 160 * 2**20])
def test_less_memory_changes_nothing_but_too_little_is_refused(indexed: Indexed, memory: int) -> None:
    store, queries = indexed.store, unit(5, seed=4)
    write_codes(store, INDEX, indexed.blocks, FEWER, dim=32, device="cpu")
    expected = search_codes(store, INDEX, indexed.blocks, queries, FEWER, k=10)
    found = search_codes(store, INDEX, indexed.blocks[::-1], queries, FEWER, k=10, memory=memory)
    np.testing.assert_array_equal(found[0].scores, expected[0].scores)
    assert _named(found[0], indexed.blocks[::-1]) == _named(expected[0], indexed.blocks)
    with pytest.raises(LimitError, match="search needs"):
        search_codes(store, INDEX, indexed.blocks, queries, FEWER, k=10, memory=64 * 2**20)


def test_codes_find_what_the_index_finds(indexed: Indexed) -> None:
    store = indexed.store
    rows_of = {block: len(indexed.signatures[block].tokens) for block in indexed.blocks}
    assert missing_codes(store, INDEX, rows_of, CODES) == indexed.blocks
    with pytest.raises(ModelError, match="curate compress"):
        search_codes(store, INDEX, indexed.blocks, unit(1), CODES, k=1)
    assert write_codes(store, INDEX, indexed.blocks, CODES, dim=32, device="cpu") == sum(rows_of.values())
    assert missing_codes(store, INDEX, rows_of, CODES) == []
    queries = unit(5, seed=4)
    exact = search(store, INDEX, indexed.blocks, queries, k=10, k_bottom=5)
    again = search_codes(store, INDEX, indexed.blocks, queries, CODES, k=10, k_bottom=5, rescore=20)
    for one, other in zip(exact, again, strict=True):
        np.testing.assert_array_equal(one.rows, other.rows)
        np.testing.assert_array_equal(one.scores, other.scores)
    only = RowFilter(f"{Path(store.uri).parent}/small/c.jsonl").wanted(store, indexed.version)
    (estimated, _) = search_codes(store, INDEX, indexed.blocks, queries, CODES, k=10, rescore=0, wanted=only)
    (right, _) = search(store, INDEX, indexed.blocks, queries, k=1_000, wanted=only)
    assert all(
        set(some) <= set(whole) for some, whole in zip(estimated.rows.tolist(), right.rows.tolist(), strict=True)
    )
    assert np.abs(estimated.scores - right.scores[:, :10]).max() < 6 * standard_error(CODES.bits)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "record"])
def test_damaged_codes_are_named_and_made_again(tmp_path: Path, damage: str) -> None:
    store, name = Store(str(tmp_path / "store")), "a" * 64
    signatures = signed(9, DIM)
    write_block(store, INDEX, name, signatures, seconds=0, producer={})
    write_codes(store, INDEX, [name], CODES, dim=DIM, device="cpu")
    rotation = open_simhash(store, INDEX, CODES, dim=DIM).identity
    right = read_codes(store, INDEX, name, CODES, rotation=rotation).copy()
    file = tmp_path / "store" / codes_folder(INDEX, CODES) / f"{name}.bin"
    if damage == "gone":
        file.unlink()
    elif damage == "record":
        file.with_suffix(".json").unlink()
    else:
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data if damage == "changed" else data[:-1])
    with pytest.raises(IntegrityError, match="curate compress"):
        read_codes(store, INDEX, name, CODES, rotation=rotation)
    write_codes(store, INDEX, [name], CODES, dim=DIM, device="cpu")
    np.testing.assert_array_equal(read_codes(store, INDEX, name, CODES, rotation=rotation), right)


def test_a_lost_rotation_takes_the_codes_of_another_one_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, name = Store(str(tmp_path / "store")), "a" * 64
    write_block(store, INDEX, name, signed(9, DIM), seconds=0, producer={})
    write_codes(store, INDEX, [name], CODES, dim=DIM, device="cpu")
    file = tmp_path / "store" / codes_folder(INDEX, CODES) / "simhash.npz"
    file.unlink()
    open_simhash(store, INDEX, CODES, dim=DIM)
    assert missing_codes(store, INDEX, {name: 9}, CODES) == []
    file.unlink()
    other = SimHash.from_seed(DIM, CODES.bits, 99)
    monkeypatch.setattr(SimHash, "from_seed", lambda *_: other)
    open_simhash(store, INDEX, CODES, dim=DIM)
    assert missing_codes(store, INDEX, {name: 9}, CODES) == [name]
    write_codes(store, INDEX, [name], CODES, dim=DIM, device="cpu")
    with pytest.raises(IntegrityError, match="another rotation"):
        read_codes(store, INDEX, name, CODES, rotation="the first one")
    assert len(read_codes(store, INDEX, name, CODES, rotation=other.identity)) == 9


def test_codes_of_another_worker_stay(tmp_path: Path) -> None:
    store, name = Store(str(tmp_path / "store")), "a" * 64
    signatures = signed(9, DIM)
    write_block(store, INDEX, name, signatures, seconds=0, producer={})
    theirs = np.zeros((9, CODES.bits // 8), np.uint8)
    store.create(f"{codes_folder(INDEX, CODES)}/{name}.bin", theirs.tobytes())
    write_codes(store, INDEX, [name], CODES, dim=DIM, device="cpu")
    rotation = open_simhash(store, INDEX, CODES, dim=DIM).identity
    np.testing.assert_array_equal(read_codes(store, INDEX, name, CODES, rotation=rotation), theirs)
