"""What a selection decides, as one reads its rules: row by row, in memory, in exact fractions. Slow and plain.

It shares no code with `rise_ops`, but for the configuration; a test compares both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from rise_ops.config import Quota, SampleConfig, SelectionConfig

Groups = Mapping[str, tuple[str, Quota]]
"""Name of a group to the key and the bounds of its rule."""
Limit = tuple[str, str, int]
"""Key, rows or tokens, and how many."""


class Impossible(Exception):
    """The selection cannot be met."""


@dataclass
class Row:
    """One row, and what becomes of it."""

    place: int
    item: int
    """Its number in the index."""
    doc_id: str
    tokens: int
    value: float | None
    scores: Mapping[str, float]
    source: str = ""
    label: str | None = None
    columns: Mapping[str, str | None] = field(default_factory=dict)
    reason: str = ""
    rule: str | None = None
    rank: int | None = None
    duplicate_of: str | None = None

    def goes(self, reason: str, rule: str | None) -> None:
        """Leave, if it has not left before."""
        if not self.reason:
            self.reason, self.rule = reason, rule


def select(rows: Sequence[Row], config: SelectionConfig, *, sources: Groups, labels: Groups,
           leaders: Callable[[Sequence[Row]], Mapping[int, Row]] | None = None,
           spread: Callable[[Sequence[Row], int], Sequence[Row]] | None = None) -> None:  # fmt: skip
    """Decide on all rows.

    Parameters
    ----------
    leaders
        Of rows from the best down: by place, the better row for which each goes.
    spread
        Puts rows, the best first, in an order; so many of them are wanted.
    """
    for row in rows:
        if row.value is None:
            row.goes("no_prediction", None)
    _exclude(rows, config)
    ranked = sorted((row for row in rows if row.value is not None), key=_by_value)
    _threshold(ranked, config)
    if leaders is not None:
        for place, leader in leaders([row for row in ranked if not row.reason]).items():
            rows[place].duplicate_of = leader.doc_id
            rows[place].goes("near_duplicate", "selection.near_duplicates")
    for number, row in enumerate(ranked, 1):
        row.rank = number
    order = [row for row in ranked if not row.reason]
    limits = _limits(config, len(rows))
    unit = "tokens" if config.keep.tokens else "rows"
    if config.sample is not None:
        order = _drawn(order, config.sample)
    elif config.diversity is not None:
        assert spread is not None
        wanted = _affordable(order, limits)
        best = order[: math.ceil(Fraction(str(config.diversity.candidates)) * wanted)]
        first = spread(best, len(best) if sources or labels or unit == "tokens" else wanted)
        order = [*first, *(row for row in order if row not in first)]
    if config.sample is not None or config.diversity is not None:
        for row in rows:
            row.rank = None
        for number, row in enumerate(order, 1):
            row.rank = number
    _fill(order, sources, labels, limits, unit)


def _by_value(row: Row) -> tuple[float, str, int]:
    assert row.value is not None
    return -row.value, row.doc_id[:16], row.place


def _exclude(rows: Sequence[Row], config: SelectionConfig) -> None:
    for number, rule in enumerate(config.exclude):
        for row in rows:
            text = row.columns.get(rule.field)
            if rule.pattern is not None and text is not None and re.search(rule.pattern, text):
                row.goes("excluded_pattern", f"selection.exclude[{number}]")
    for number, rule in enumerate(config.exclude):
        if rule.target is None:
            continue
        name = rule.target
        scored = sorted(
            (row for row in rows if row.value is not None),
            key=lambda row, name=name: (-row.scores[name], row.doc_id[:16], row.place),  # type: ignore[misc]
        )
        if rule.min_score is not None:
            chosen = [row for row in scored if row.scores[name] >= np.float32(rule.min_score)]
        elif rule.top_rows is not None:
            chosen = scored[: rule.top_rows]
        else:
            chosen = scored[: math.floor(Fraction(str(rule.top_fraction)) * len(scored))]
        for row in chosen:
            row.goes("excluded_target", f"selection.exclude[{number}]")


def _threshold(ranked: Sequence[Row], config: SelectionConfig) -> None:
    keep, open_ = config.keep, [row for row in ranked if not row.reason]
    if keep.min_value is not None:
        for row in open_:
            if row.value is not None and row.value < np.float32(keep.min_value):
                row.goes("below_min_value", "selection.keep.min_value")
    if keep.min_percentile is not None:
        worst = math.floor(Fraction(str(keep.min_percentile)) * len(open_) / 100)
        for row in open_[len(open_) - worst :]:
            row.goes("below_percentile", "selection.keep.min_percentile")


def _drawn(order: Sequence[Row], config: SampleConfig) -> list[Row]:
    seen: dict[tuple[float | None, str], int] = {}
    keys = []
    seed = _mixed(config.seed % 2**64)
    for row in order:
        assert row.value is not None
        copy = seen.setdefault((row.value, row.doc_id[:16]), 0)
        seen[row.value, row.doc_id[:16]] += 1
        if config.temperature is None and row.value <= 0:
            row.goes("not_sampled", "selection.sample")
            continue
        number = _mixed((_mixed(int(row.doc_id[:16], 16) ^ seed) + copy * 0x9E3779B97F4A7C15) % 2**64)
        uniform = ((number >> 11) + 0.5) / 2**53
        log_weight = math.log(row.value) if config.temperature is None else row.value / config.temperature
        keys.append((-(log_weight - math.log(-math.log(uniform))), row.place, row))
    return [row for *_, row in sorted(keys)]


def _mixed(number: int) -> int:
    number = (number + 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def _limits(config: SelectionConfig, rows: int) -> list[Limit]:
    keep, found = config.keep, []
    if keep.rows is not None:
        found.append(("rows", "rows", keep.rows))
    if keep.fraction is not None:
        found.append(("fraction", "rows", math.floor(Fraction(str(keep.fraction)) * rows)))
    if keep.tokens is not None:
        found.append(("tokens", "tokens", keep.tokens))
    return found


def _affordable(order: Sequence[Row], limits: Sequence[Limit]) -> int:
    tokens = 0
    for number, row in enumerate(order):
        tokens += row.tokens
        if any((number + 1 if unit == "rows" else tokens) > most for _, unit, most in limits):
            return number
    return len(order)


@dataclass
class Taken:
    """What a group or all rows have."""

    rows: int = 0
    tokens: int = 0
    closed: str = ""
    ended: int = 0
    """When, in rows of the order."""

    def add(self, row: Row) -> None:
        """One row more."""
        self.rows, self.tokens = self.rows + 1, self.tokens + row.tokens

    def amount(self, unit: str) -> int:
        """Rows or tokens."""
        return self.rows if unit == "rows" else self.tokens


def fill_once(order: Sequence[Row], sources: Groups, labels: Groups, limits: Sequence[Limit], unit: str,
              low: int, high: int) -> tuple[int, dict[int, tuple[str, str | None]], bool]:  # fmt: skip
    """Minima, then the rest, with fractions of a total between two. Returns total, fates by place, minima are met."""
    taken: dict[tuple[str, str], Taken] = {}
    everything = Taken()
    fates: dict[int, tuple[str, str | None]] = {}

    def groups_of(row: Row) -> list[tuple[str, str, Quota, Taken]]:
        found = []
        for kind, name, known in (("source", row.source, sources), ("label", row.label, labels)):
            if name is not None and name in known:
                found.append((kind, *known[name], taken.setdefault((kind, name), Taken())))
        return found

    def size(row: Row) -> int:
        return 1 if unit == "rows" else row.tokens

    def exceeds(quota: Quota, have: Taken, row: Row) -> str:
        if quota.max_rows is not None and have.rows + 1 > quota.max_rows:
            return "max_rows"
        if quota.max_fraction is not None and have.amount(unit) + size(row) > Fraction(str(quota.max_fraction)) * low:
            return "max_fraction"
        return ""

    def needs(quota: Quota, have: Taken) -> bool:
        if quota.min_rows is not None and have.rows < quota.min_rows:
            return True
        return quota.min_fraction is not None and have.amount(unit) < Fraction(str(quota.min_fraction)) * high

    for row in order:
        mine = groups_of(row)
        if any(needs(quota, have) for _, _, quota, have in mine) and not any(
            exceeds(quota, have, row) for _, _, quota, have in mine
        ):
            fates[row.place] = ("kept", None)
            everything.add(row)
            for *_, have in mine:
                have.add(row)
    for kind, known in (("source", sources), ("label", labels)):
        for name, (_, quota) in known.items():
            if quota.min_rows is not None and taken.setdefault((kind, name), Taken()).rows < quota.min_rows:
                raise Impossible(f"min_rows of {name}")
    for _, limited, most in limits:
        if everything.amount(limited) > most:
            raise Impossible("minima exceed the budget")
    for number, row in enumerate(order):
        if row.place in fates:
            continue
        mine = groups_of(row)
        for _, key, quota, have in mine:
            if not everything.closed and not any(other.closed for *_, other in mine):
                bound = exceeds(quota, have, row)
                have.closed, have.ended = (f"{key}.{bound}", number) if bound else ("", 0)
        closed = sorted((have.ended, kind, have.closed) for kind, _, _, have in mine if have.closed)
        if closed:
            fates[row.place] = (f"over_{closed[0][1]}_quota", closed[0][2])
        else:
            sums = {"rows": everything.rows + 1, "tokens": everything.tokens + row.tokens}
            over = [name for name, limited, most in limits if sums[limited] > most]
            if not everything.closed and over:
                everything.closed = over[0]
            if everything.closed:
                fates[row.place] = (f"over_{everything.closed}", f"selection.keep.{everything.closed}")
                continue
            fates[row.place] = ("kept", None)
            everything.add(row)
            for *_, have in groups_of(row):
                have.add(row)
    total = everything.amount(unit)
    met = all(
        quota.min_fraction is None
        or taken.setdefault((kind, name), Taken()).amount(unit) >= Fraction(str(quota.min_fraction)) * total
        for kind, known in (("source", sources), ("label", labels))
        for name, (_, quota) in known.items()
    )
    return total, fates, met


def _fill(order: Sequence[Row], sources: Groups, labels: Groups, limits: Sequence[Limit],
          unit: str) -> None:  # fmt: skip
    """As `fill_once` with a total that stays as it is. Only for bounds in rows, and for one budget with quotas."""
    fractions = any(
        quota.min_fraction is not None or quota.max_fraction is not None
        for _, quota in [*sources.values(), *labels.values()]
    )
    total, fates, _ = fill_once(order, sources, labels, limits, unit, 10**12, 0)
    assert not fractions, "see test_selection_quotas"
    if not total:
        raise Impossible("nothing is kept")
    for row in order:
        row.goes(*fates[row.place])
