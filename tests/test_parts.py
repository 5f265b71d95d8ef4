"""Parts: cut by content, so that a change stays where it is; there when both files are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rise_ops.errors import DamagedError, IntegrityError
from rise_ops.parts import MAX_BLOCKS, Part, cut_parts, missing_parts, part_of, valuation_id
from rise_ops.scan import Extremes
from rise_ops.store import Store
from rise_ops.tables import TableWriter, iter_table
from rise_ops.valuation import extremes_frames, iter_part_scores, score_parts
from tests.corpora import make_rows
from tests.indexed import INDEX, SKETCH, Indexed, index_rows, make_target

VALUATION = "a" * 64
TARGETS = {"good": make_target(3)}


def _block(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


_BLOCKS = st.lists(st.integers(0, 10**6), max_size=200, unique=True).map(lambda numbers: [*map(_block, numbers)])


@given(blocks=_BLOCKS)
def test_parts_are_the_blocks_in_order(blocks: list[str]) -> None:
    parts = cut_parts(VALUATION, blocks)
    assert [block for part in parts for block in part.blocks] == blocks
    assert all(1 <= len(part.blocks) <= MAX_BLOCKS for part in parts)
    assert [blocks.index(part.blocks[0]) for part in parts] == [part.first_block for part in parts]


@given(blocks=_BLOCKS, place=st.integers(0, 200), replaced=st.booleans())
def test_a_new_block_changes_the_parts_around_it_only(blocks: list[str], place: int, replaced: bool) -> None:
    place = min(place, len(blocks))
    changed = [*blocks[:place], _block(-1), *blocks[place + int(replaced) :]]
    before, after = cut_parts(VALUATION, blocks), cut_parts(VALUATION, changed)
    new = {part.part_id for part in after} - {part.part_id for part in before}
    # the part with the block; and where one of eight blocks is cut, what follows up to the next that ends by content
    last = next((n for n, block in enumerate(changed) if n > place and int(block[-1], 16) % 4 == 0), len(changed))
    assert all(part.first_block <= last for part in after if part.part_id in new)
    assert all(part.first_block + len(part.blocks) > place for part in after if part.part_id in new)


@given(blocks=_BLOCKS, chosen=st.sets(st.integers(0, 200)))
def test_some_parts_are_cut_the_same_way_again(blocks: list[str], chosen: set[int]) -> None:
    parts = [part for number, part in enumerate(cut_parts(VALUATION, blocks)) if number in chosen]
    again = cut_parts(VALUATION, [block for part in parts for block in part.blocks])
    assert [part.part_id for part in again] == [part.part_id for part in parts]


def test_parts_hold_about_four_blocks() -> None:
    parts = cut_parts(VALUATION, [_block(number) for number in range(4_000)])
    assert 3 < 4_000 / len(parts) < 4.5


def test_a_valuation_is_named_by_what_decides_on_scores() -> None:
    one = valuation_id(INDEX, {"a": "1", "b": "2"}, "mean")
    assert one == valuation_id(INDEX, {"b": "2", "a": "1"}, "mean")
    others = [
        valuation_id("2" * 64, {"a": "1", "b": "2"}, "mean"),
        valuation_id(INDEX, {"a": "2", "b": "1"}, "mean"),
        valuation_id(INDEX, {"a": "1", "b": "2"}, "max"),
        valuation_id(INDEX, {"a": "1"}, "mean"),
    ]
    assert len({one, *others}) == 5


@pytest.fixture
def indexed(tmp_path: Path) -> Indexed:
    files = {f"{name}.jsonl": make_rows(256, seed=seed) for seed, name in enumerate("abcd")}
    made = index_rows(Store(str(tmp_path / "store")), tmp_path, files)
    assert len(made.blocks) == 4
    return made


def _score(indexed: Indexed, parts: list[Part]) -> int:
    return score_parts(indexed.store, INDEX, parts, targets=TARGETS, aggregate="mean", sketch=SKETCH, memory=2**30)


def test_a_part_is_there_when_both_files_are(indexed: Indexed) -> None:
    store = indexed.store
    parts = [part_of(VALUATION, indexed.blocks[first : first + 2], first) for first in (0, 2)]
    assert missing_parts(store, parts) == parts
    assert _score(indexed, parts) == 1_024
    assert missing_parts(store, parts) == []
    for key in (parts[0].scores, parts[0].extremes):
        store.delete([key])
        assert missing_parts(store, parts) == parts[:1]
        assert _score(indexed, parts[:1]) == 512
    assert missing_parts(store, parts) == []
    assert missing_parts(store, [part_of("b" * 64, part.blocks, part.first_block) for part in parts]) != []


def test_a_part_is_the_same_wherever_it_stands(indexed: Indexed) -> None:
    store, blocks = indexed.store, indexed.blocks
    part = part_of(VALUATION, blocks[2:], 2)
    _score(indexed, [part])
    written = store.get(part.scores), store.get(part.extremes)
    moved = part_of(VALUATION, blocks[2:], 1_000)
    assert (moved.scores, moved.extremes) == (part.scores, part.extremes)
    store.delete([part.scores, part.extremes])
    _score(indexed, [moved])
    assert (store.get(part.scores), store.get(part.extremes)) == written
    places = [frame["block"].unique().to_list() for each in (part, moved)
              for frame in iter_part_scores(store, [each], ["good"], "mean", rows=10_000)]  # fmt: skip
    assert places == [[2, 3], [1_000, 1_001]]


def test_a_part_that_is_damaged_or_missing_is_named(indexed: Indexed) -> None:
    store = indexed.store
    part = part_of(VALUATION, indexed.blocks, 0)
    with pytest.raises(DamagedError, match="is missing") as caught:
        list(iter_part_scores(store, [part], ["good"], "mean", rows=100))
    assert caught.value.where == store.url(part.scores)
    store.create(part.scores, b"PAR1 and then nothing of the kind")
    with pytest.raises(DamagedError, match="does not match its checksum"):
        list(iter_part_scores(store, [part], ["good"], "mean", rows=100))


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    with TableWriter(tmp_path / "new.parquet", format_version=7) as table:
        table.write(pl.DataFrame({"a": [1, 2, 3]}).to_arrow())
    store.create_from_file("new.parquet", tmp_path / "new.parquet")
    assert [frame["a"].to_list() for frame in iter_table(store, "new.parquet", columns=["a"], rows=2, known=7)] == [
        [1, 2],
        [3],
    ]
    with pytest.raises(IntegrityError, match="has format version 7, this program reads up to 6; upgrade it"):
        list(iter_table(store, "new.parquet", columns=["a"], rows=2, known=6))


def test_extremes_of_many_queries_come_in_several_frames() -> None:
    extremes = Extremes(10_000, k_bottom=50)
    extremes.add(np.random.default_rng(0).random((200, 40), dtype=np.float32), np.arange(200))
    frames = list(extremes_frames(extremes, {"good": make_target(40)}))
    assert len(frames) > 2
    whole = pl.concat(frames)
    assert whole.height == 40 * (200 + 50)
    assert whole["query"].unique().sort().to_list() == list(range(40))
