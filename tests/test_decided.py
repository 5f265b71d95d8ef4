"""What was decided before is decided once: taken over by content, never where something differs or is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rise_ops import decided
from rise_ops.config import KeepConfig, SelectionConfig
from rise_ops.decided import decide_once, preview_once, take_examples
from rise_ops.errors import DamagedError
from rise_ops.examples import FORMAT_VERSION, examples_key
from rise_ops.runs import decided_key, decisions_key
from rise_ops.selection import Scored
from rise_ops.store import Store
from tests.corpora import make_rows
from tests.indexed import Indexed, index_rows, make_target, score_parts

HALF = SelectionConfig(keep=KeepConfig(fraction=0.5))
MEMORY = 2**30


@pytest.fixture
def indexed(tmp_path: Path) -> Indexed:
    store = Store(str(tmp_path / "store"))
    return index_rows(store, tmp_path / "in", {"one.jsonl": make_rows(300), "two.jsonl": make_rows(280, seed=1)})


def scored(indexed: Indexed, **weights: float) -> Scored:
    parts = score_parts(indexed, {"good": make_target(3)})
    return Scored(indexed.version, parts, ["good"], weights or {"good": 1.0}, "mean")


def once(indexed: Indexed, run_id: str, rows: Scored, selection: SelectionConfig = HALF) -> decided.Decided:
    return decide_once(indexed.store, rows, run_id=run_id, selection=selection, memory=MEMORY)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("it was decided again")


def test_the_same_is_decided_once(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, store = scored(indexed), indexed.store
    first = once(indexed, "a", rows)
    monkeypatch.setattr(decided, "decide", refuse)
    monkeypatch.setattr(decided, "preview", refuse)
    second, third = once(indexed, "b", rows), once(indexed, "c", rows)
    assert (first.reused, second.reused, third.reused) == (False, True, True)
    assert first.selection == second.selection == third.selection
    assert store.get(decisions_key("a")) == store.get(decisions_key("b")) == store.get(decisions_key("c"))
    assert preview_once(store, rows, HALF, memory=MEMORY) == first.selection


@pytest.mark.parametrize("change", ["selection", "weights", "targets' aggregate", "code"])
def test_what_differs_is_decided_anew(indexed: Indexed, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, selection = scored(indexed), HALF
    once(indexed, "a", rows)
    if change == "selection":
        selection = SelectionConfig(keep=KeepConfig(fraction=0.25))
    elif change == "weights":
        rows = scored(indexed, good=-1.0)
    elif change == "code":
        monkeypatch.setattr(decided, "code_identity", lambda: {"fingerprint": "another"})
    else:
        parts = score_parts(indexed, {"good": make_target(3)}, aggregate="max", run_id="max")
        rows = Scored(indexed.version, parts, ["good"], {"good": 1.0}, "max")
    assert not once(indexed, "b", rows, selection).reused


def test_the_place_of_a_row_is_part_of_its_decision(tmp_path: Path) -> None:
    """An object that was renamed has the same blocks and scores, and other decisions."""
    store, content = Store(str(tmp_path / "store")), make_rows(300)
    first = index_rows(store, tmp_path / "in", {"one.jsonl": content})
    once(first, "a", scored(first))
    second = index_rows(store, tmp_path / "other", {"two.jsonl": content})
    assert second.blocks == first.blocks
    assert not once(second, "b", scored(second)).reused


@pytest.mark.parametrize("broken", ["cut", "gone", "record"])
def test_broken_decisions_are_made_again(indexed: Indexed, broken: str) -> None:
    rows, store = scored(indexed), indexed.store
    once(indexed, "a", rows)
    whole = store.get(decisions_key("a"))
    key = decided_key("a") if broken == "record" else decisions_key("a")
    store.delete([key])
    if broken != "gone":
        store.create(key, b"{" if broken == "record" else whole[:-1])
    found = once(indexed, "b", rows)
    assert not found.reused
    assert store.get(decisions_key("b")) == whole


def test_broken_scores_are_not_passed_over(indexed: Indexed) -> None:
    rows, store = scored(indexed), indexed.store
    once(indexed, "a", rows)
    store.delete([rows.parts[0].scores])
    with pytest.raises(DamagedError, match="missing"):
        once(indexed, "b", rows)
    with pytest.raises(DamagedError, match="missing"):
        preview_once(store, rows, HALF, memory=MEMORY)


@pytest.mark.parametrize("hit", [{"tokens": []}, {}])
def test_examples_go_along_where_they_are_whole(indexed: Indexed, hit: dict[str, Any]) -> None:
    rows, store = scored(indexed), indexed.store
    examples = {"format_version": FORMAT_VERSION, "queries": [{"top": [hit]}], "evaluation": None}
    for run_id in ("a", "b"):
        once(indexed, run_id, rows)
        if run_id == "a":
            assert take_examples(store, run_id, evaluation=None) is None
            store.create_json(examples_key(run_id), examples)
    assert take_examples(store, "b", evaluation={"good": {}}) is None
    taken = take_examples(store, "b", evaluation=None)
    assert taken == (examples_key("b") if hit else None)
    if taken:
        assert store.get_json(taken) == store.get_json(examples_key("a"))
