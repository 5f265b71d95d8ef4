"""Quotas and budgets: minima, largest parts, one partition or two, against plain loops; and what holds in the end."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rise_ops import quotas
from rise_ops.config import Quota
from rise_ops.errors import SelectionError
from rise_ops.ordering import RECORD
from rise_ops.quotas import Filled, Limit, Partition, Rule, Unit, fill_order
from rise_ops.ranking import Records
from tests.selection_reference import Groups, Impossible, Row, fill_once

LIMITS = {"rows": 900, "tokens": 901}


Numbers = Sequence[int] | npt.NDArray[np.integer[Any]]


def _records(source: Numbers, label: Numbers, tokens: Numbers) -> Records:
    records = np.zeros(len(source), RECORD)
    records["source"], records["label"], records["tokens"] = source, label, tokens
    records["row"] = np.arange(len(source))
    return records


def _partition(kind: Any, bounds: Sequence[Quota], groups: int) -> Partition:
    """Group g has the bounds g - 1, or the last ones; group 0 has none."""
    base = 100 if kind == "source" else 500
    rules = [Rule(quota, f"selection.per_{kind}.{number}", base + 2 * number, base + 2 * number + 1)
             for number, quota in enumerate(bounds)]  # fmt: skip
    rule_of = np.minimum(np.arange(groups + 1), len(bounds)) - 1
    return Partition(kind, [f"{kind} {number}" for number in range(groups + 1)], rules, rule_of)


def _fill(records: Records, partitions: Sequence[Partition], budget: Mapping[Unit, int], *, unit: Unit,
          piece: int = 1 << 16) -> tuple[Filled, list[int]]:  # fmt: skip
    for partition in partitions:
        partition.there_rows[:], partition.there_tokens[:] = 0, 0
        partition.count(records)
    limits = [Limit(LIMITS[name], name, most, f"selection.keep.{name}") for name, most in budget.items()]
    pieces = [records[start : start + piece] for start in range(0, len(records), piece)]
    with tempfile.TemporaryDirectory() as folder:
        filled, path = fill_order(
            lambda: iter(pieces), partitions, limits, rows=len(records), tokens=int(records["tokens"].sum()),
            largest=int(records["tokens"].max()), unit=unit, folder=Path(folder),
        )  # fmt: skip
        codes = np.fromfile(path, np.uint16)
    kept = codes == 0
    assert (filled.rows, filled.tokens) == (kept.sum(), records["tokens"][kept].sum())
    return filled, codes.tolist()


def _plain(records: Records, partitions: Sequence[Partition]) -> tuple[list[Row], Groups, Groups]:
    """The same for the plain loops."""
    groups: dict[str, Groups] = {"source": {}, "label": {}}
    for partition in partitions:
        groups[partition.kind] = {
            name: (partition.rules[rule].text, partition.rules[rule].quota)
            for name, rule in zip(partition.names, partition.rule_of.tolist(), strict=True)
            if rule >= 0
        }
    rows = [
        Row(place, place, "", int(record["tokens"]), 0.0, {}, f"source {record['source']}", f"label {record['label']}")
        for place, record in enumerate(records)
    ]
    return rows, groups["source"], groups["label"]


def _named(codes: Sequence[int], partitions: Sequence[Partition]) -> list[tuple[str, str | None]]:
    names: dict[int, tuple[str, str | None]] = {0: ("kept", None)}
    names |= {code: (f"over_{name}", f"selection.keep.{name}") for name, code in LIMITS.items()}
    for partition in partitions:
        for rule in partition.rules:
            names[rule.code_rows] = (f"over_{partition.kind}_quota", f"{rule.text}.max_rows")
            names[rule.code_fraction] = (f"over_{partition.kind}_quota", f"{rule.text}.max_fraction")
    return [names[code] for code in codes]


def _random(seed: int, *, rows: int = 60, groups: int = 4) -> Records:
    r = np.random.default_rng(seed)
    skewed = np.minimum(r.geometric(0.45, rows), groups)
    return _records(skewed, r.integers(0, groups, rows), r.integers(2, 30, rows))


def _some(r: np.random.Generator, name: str, values: Sequence[Any], chance: float) -> dict[str, Any]:
    return {name: values[int(r.integers(len(values)))]} if r.random() < chance else {}


def _bounds(r: np.random.Generator, *, fractions: bool) -> list[Quota]:
    found = []
    for _ in range(int(r.integers(1, 4))):
        bounds = _some(r, "max_rows", [0, 3, 9, 30], 0.5) | _some(r, "min_rows", [1, 2, 3], 0.4)
        if fractions:
            bounds |= _some(r, "max_fraction", [0.5, 0.34, 0.6, 0.251], 0.6)
            bounds |= _some(r, "min_fraction", [0.05, 0.1], 0.3)
        if bounds.get("max_rows", 99) < bounds.get("min_rows", 0):
            bounds.pop("min_rows")
        found.append(Quota(**bounds))
    return found


@pytest.mark.parametrize("seed", range(120))
def test_bounds_in_rows_equal_plain_loops(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are looked at together."""
    r = np.random.default_rng(seed)
    records = _random(seed)
    kinds = [kind for kind in ("source", "label") if r.random() < 0.8]
    partitions = [_partition(kind, _bounds(r, fractions=False), 4) for kind in kinds]
    budget: dict[Unit, int] = _some(r, "rows", [1, 10, 35], 0.6) | _some(r, "tokens", [5, 150, 700], 0.6)  # type: ignore[assignment]
    rows, sources, labels = _plain(records, partitions)
    monkeypatch.setattr(quotas, "_SMALL", int(r.integers(1, 9)))
    piece = int(r.integers(1, 70))
    unit: Unit = "tokens" if "tokens" in budget else "rows"
    try:
        limits = [(name, name, most) for name, most in budget.items()]
        _, fates, _ = fill_once(rows, sources, labels, limits, unit, 10**12, 0)
    except Impossible:
        with pytest.raises(SelectionError, match=r"asks for at least|reserve"):
            _fill(records, partitions, budget, unit=unit, piece=piece)
        return
    _, codes = _fill(records, partitions, budget, unit=unit, piece=piece)
    assert _named(codes, partitions) == [fates[place] for place in range(len(rows))]


def _holds(records: Records, codes: Sequence[int], partitions: Sequence[Partition], unit: Unit, total: int) -> None:
    """Every bound is kept, fractions of the total."""
    kept = records[np.array(codes) == 0]
    for partition in partitions:
        for group, rule in enumerate(partition.rule_of.tolist()):
            if rule < 0:
                continue
            quota, mine = partition.rules[rule].quota, kept[kept[partition.kind] == group]
            amount = len(mine) if unit == "rows" else int(mine["tokens"].sum())
            assert quota.max_rows is None or len(mine) <= quota.max_rows
            assert quota.min_rows is None or len(mine) >= quota.min_rows
            assert quota.max_fraction is None or amount <= Fraction(str(quota.max_fraction)) * total
            assert quota.min_fraction is None or amount >= Fraction(str(quota.min_fraction)) * total


@pytest.mark.parametrize("unit", ["rows", "tokens"])
@pytest.mark.parametrize("seed", range(100))
def test_fractions_hold_of_what_is_kept(seed: int, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both partitions together, and whatever is looked at together."""
    r = np.random.default_rng(1_000 + seed)
    records = _random(seed, rows=150)
    kinds = [kind for kind in ("source", "label") if r.random() < 0.8] or ["source"]
    partitions = [_partition(kind, _bounds(r, fractions=True), 4) for kind in kinds]
    most = int(r.choice([40, 90]) * (1 if unit == "rows" else 15))
    budget: dict[Unit, int] = {unit: most} if r.random() < 0.8 else {}
    monkeypatch.setattr(quotas, "_SMALL", int(r.integers(1, 9)))
    try:
        filled, codes = _fill(records, partitions, budget, unit=unit)
    except SelectionError as error:
        _is_honest(str(error), records, partitions, budget, unit)
        return
    total = filled.rows if unit == "rows" else filled.tokens
    if filled.exact:
        _holds(records, codes, partitions, unit, total)
    else:
        row = 1 if unit == "rows" else int(records["tokens"].max())
        assert filled.total is not None
        assert total <= filled.total <= total + row * (1 + 4 * len(partitions))
    for piece in (1, 7, 64):
        assert _fill(records, partitions, budget, unit=unit, piece=piece) == (filled, codes)


def _is_honest(text: str, records: Records, partitions: Sequence[Partition], budget: Mapping[Unit, int], unit: Unit,
               ) -> None:  # fmt: skip
    """What an error says is so, as far as a single partition tells."""
    if len(partitions) > 1 or unit == "tokens":
        return
    rows, sources, labels = _plain(records, partitions)
    limits = [(name, name, most) for name, most in budget.items()]
    for total in range(1, min([len(rows), *budget.values()]) + 1):
        try:
            found, fates, met = fill_once(rows, sources, labels, [*limits, ("", "rows", total)], unit, total, total)
        except Impossible:
            continue
        assert found != total or not met or "min_" in text or "reserve" in text, (text, total, fates)


@pytest.mark.parametrize("seed", range(60))
def test_the_total_is_the_largest_that_one_partition_allows(seed: int) -> None:
    r = np.random.default_rng(seed)
    records = _random(seed, rows=80)
    fractions = [Quota(max_fraction=float(r.choice([0.2, 0.3, 0.34, 0.45, 0.5, 0.9]))) for _ in range(4)]
    partition, budget = _partition("source", fractions, 4), int(r.integers(5, 90))
    rows, sources, labels = _plain(records, [partition])
    best = 0
    for total in range(min(budget, len(rows)), 0, -1):
        found, _, _ = fill_once(rows, sources, labels, [("rows", "rows", total)], "rows", total, total)
        if found == total:
            best = total
            break
    if not best:
        with pytest.raises(SelectionError, match=r"raise (a )?max_fraction"):
            _fill(records, [partition], {"rows": budget}, unit="rows")
        return
    filled, codes = _fill(records, [partition], {"rows": budget}, unit="rows")
    assert (filled.rows, filled.total, filled.exact) == (best, best, True)
    _holds(records, codes, [partition], "rows", best)


def test_a_larger_source_gives_way() -> None:
    """Of 100, 10 and 10 rows, with at most two fifths each: T = 2/5 T + 10 + 10, so 33, with rounding 33."""
    records = _records([1] * 100 + [2] * 10 + [3] * 10, [0] * 120, [5] * 120)
    filled, codes = _fill(records, [_partition("source", [Quota(max_fraction=0.4)], 3)], {}, unit="rows")
    assert filled.rows == 33
    kept = records["source"][np.array(codes) == 0]
    assert np.bincount(kept).tolist() == [0, 13, 10, 10]


def test_fractions_of_tokens_hold_where_the_budget_ends_within_a_row() -> None:
    r = np.random.default_rng(3)
    records = _records(r.integers(1, 4, 3_000), [0] * 3_000, r.integers(100, 900, 3_000))
    partition = _partition("source", [Quota(max_fraction=0.36)], 3)
    filled, codes = _fill(records, [partition], {"tokens": 200_000}, unit="tokens")
    assert filled.exact
    assert 199_000 < filled.tokens <= 200_000
    _holds(records, codes, [partition], "tokens", filled.tokens)


def test_two_halves_in_tokens_are_met_to_within_a_row_each() -> None:
    r = np.random.default_rng(4)
    records = _records([0] * 2_000, r.integers(1, 3, 2_000), 10 * r.integers(10, 90, 2_000) + r.integers(0, 7, 2_000))
    partition = _partition("label", [Quota(max_fraction=0.5)], 2)
    filled, codes = _fill(records, [partition], {"tokens": 100_000}, unit="tokens")
    kept = records[np.array(codes) == 0]
    halves = [int(kept["tokens"][kept["label"] == label].sum()) for label in (1, 2)]
    assert filled.tokens > 98_000
    assert max(halves) <= 50_000
    assert filled.exact == (halves[0] == halves[1])


def test_minima_come_first_from_the_best_of_the_group_down() -> None:
    label = [1] * 50 + [2] * 10
    records = _records([0] * 60, label, [2] * 60)
    filled, codes = _fill(records, [_partition("label", [Quota(), Quota(min_rows=4)], 2)], {"rows": 20}, unit="rows")
    assert np.flatnonzero(np.array(codes) == 0).tolist() == [*range(16), *range(50, 54)]
    assert (filled.rows, filled.total, filled.exact) == (20, None, True)


def test_a_row_can_meet_two_minima() -> None:
    records = _records([1, 1, 2, 2], [1, 2, 1, 2], [2] * 4)
    partitions = [_partition("source", [Quota(min_rows=1)], 2), _partition("label", [Quota(min_rows=1)], 2)]
    _, codes = _fill(records, partitions, {"rows": 3}, unit="rows")
    # the first row serves source 1 and label 1, the second label 2, the third source 2
    assert codes == [0, 0, 0, 900]


def test_a_row_over_its_source_takes_nothing_of_its_label() -> None:
    records = _records([1, 1, 1, 2, 2], [1, 1, 1, 1, 1], [2] * 5)
    partitions = [_partition("source", [Quota(max_rows=1)], 2), _partition("label", [Quota(max_rows=2)], 1)]
    _, codes = _fill(records, partitions, {}, unit="rows")
    assert _named(codes, partitions) == [
        ("kept", None),
        *[("over_source_quota", "selection.per_source.0.max_rows")] * 2,
        ("kept", None),
        ("over_source_quota", "selection.per_source.0.max_rows"),
    ]


@pytest.mark.parametrize(
    ("bounds", "budget", "message"),
    [
        (
            Quota(min_rows=7),
            {},
            (
                "selection.per_label.0.min_rows asks for at least 7 rows of label 'label 2'; 5 are left after the "
                "steps before. Loosen what is above it, or lower it"
            ),
        ),
        (
            Quota(min_rows=5),
            {"rows": 9},
            (
                "the minima of selection.per_label reserve 10 rows, selection.keep.rows allows 9; lower them or "
                "raise the budget"
            ),
        ),
        (
            Quota(min_rows=5),
            {"tokens": 60},
            "the minima of selection.per_label reserve 80 tokens, selection.keep.tokens allows 60",
        ),
        (
            Quota(min_fraction=0.3),
            {"rows": 25},
            (
                "selection.per_label.0.min_fraction asks for at least 0.3 of 25 rows, that is 8, of label 'label 2'; "
                "5 are left after the steps before. Loosen what is above it, or lower it, or keep at most 16 rows"
            ),
        ),
        (
            Quota(min_fraction=0.6),
            {"rows": 8},
            "the minima of selection.per_label reserve 10 rows, selection.keep.rows allows 8",
        ),
        (
            Quota(max_fraction=0.3),
            {},
            (
                "selection.per_label: the largest fractions of all labels that have rows left (2) add up to 0.6 of "
                "what is kept, so nothing can be; raise max_fraction to 1 in all, or more"
            ),
        ),
    ],
)
def test_what_cannot_be_met_is_an_error_with_the_numbers(bounds: Quota, budget: dict[Unit, int], message: str) -> None:
    records = _records([0] * 30, [1] * 25 + [2] * 5, [8] * 30)
    with pytest.raises(SelectionError, match=re.escape(message)):
        _fill(records, [_partition("label", [bounds], 2)], budget, unit="tokens" if "tokens" in budget else "rows")


def test_a_source_and_a_label_that_leave_no_total_are_named() -> None:
    records = _records([1] * 50 + [2] * 50, [1] * 50 + [2] * 50, [2] * 100)
    partitions = [
        _partition("source", [Quota(max_fraction=0.6)], 2),
        _partition("label", [Quota(max_fraction=0.3), Quota(max_fraction=0.9)], 2),
    ]
    with pytest.raises(SelectionError, match=r"selection\.per_source and selection\.per_label: the fractions allow no"):
        _fill(records, partitions, {"rows": 80}, unit="rows")


def test_a_minimum_that_another_bound_forbids_says_so() -> None:
    records = _records([1] * 10 + [2] * 10, [1] * 10 + [2] * 10, [2] * 20)
    partitions = [_partition("source", [Quota(max_rows=4)], 2), _partition("label", [Quota(min_rows=6)], 2)]
    with pytest.raises(SelectionError, match=r"10 are left after the steps before, and other bounds allow 4 of them"):
        _fill(records, partitions, {}, unit="rows")


def test_many_groups_are_counted_where_they_occur() -> None:
    """The same whether groups are found by counting all of them or only those of the rows."""
    r = np.random.default_rng(5)
    records = _records(r.integers(1, 5_000, 20_000), r.integers(0, 3, 20_000), r.integers(2, 9, 20_000))
    expected = []
    seen: dict[int, int] = {}
    for group in records["source"].tolist():
        seen[group] = seen.get(group, 0) + 1
        expected.append(0 if seen[group] <= 3 else 100)
    one = _partition("source", [Quota(max_rows=3)], 5_000)
    assert _fill(records, [one], {}, unit="rows", piece=1_000)[1] == expected
    both = [one, _partition("label", [Quota(max_rows=10**6)], 2)]
    assert _fill(records, both, {}, unit="rows", piece=1_000)[1] == expected
