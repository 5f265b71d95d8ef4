"""What other budgets would keep, from a run's decisions.

Rows are taken in turns, each in the order that the run used: first those that a quota's minimum reserved, then the
other kept ones, then those that only the budget or a threshold dropped (`WAITING`). Exclusions, near-duplicates and
the rows over a quota stay out as they are, so the figures at the run's own budget are its own, and those at others
are what a run would decide if no quota moved.

One streaming pass counts rows, tokens and value in BINS bins of the order; budgets are then found to the row, in the
bins in which they end. A bin, not the corpus, is held in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from rise_ops.report_data import WAITING, Cut

FACTORS = (0.5, 0.8, 1.0, 1.25, 2.0)
"""Budgets that are looked at, as multiples of what the run kept."""
BINS = 960
POINTS = 160
"""Of the curve, at most."""
_WAITING_TURN = 2

Unit = Literal["rows", "tokens"]
_VALUE = pl.col("value").cast(pl.Float64)
_TOKENS = pl.col("tokens").cast(pl.Int64)


@dataclass(frozen=True, slots=True)
class Curve:
    """Along the order of rows: what is taken, its value there, and the mean of all up to there."""

    amounts: tuple[int, ...]
    """Tokens or rows taken, ascending."""
    value: tuple[float, ...]
    """Mean over the rows between two points."""
    mean: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """What one budget would keep."""

    factor: float
    rows: int
    tokens: int
    lowest: float | None
    """Value of the last row that is not reserved."""
    mean: float
    exhausted: bool
    """There are fewer rows than the budget allows; larger ones are left out."""
    shares: Mapping[str, Mapping[str, float]]
    """For `sources` and `labels`: the part that a group has of what is kept, in the budget's unit."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """The curve and the table."""

    unit: Unit
    curve: Curve
    budgets: tuple[Budget, ...]


@dataclass(frozen=True, slots=True)
class _End:
    """The last row that a budget takes: in which turn, and its rank."""

    turn: int
    rank: int


def other_budgets(decisions: pl.LazyFrame, cut: Cut, *, unit: Unit,
                  groups: Mapping[str, tuple[pl.Expr, Sequence[str]]]) -> Budgets | None:  # fmt: skip
    """What the run would keep if its budget were smaller or larger, or None where rows have no order.

    Parameters
    ----------
    decisions
        Lazy scan of `decisions.parquet`.
    unit
        What the budget counts.
    groups
        Name to the expression that names a row's group, and the groups that are shown.
    """
    if "rank" not in decisions.collect_schema().names():
        return None
    rank = pl.col("rank").cast(pl.Int64)
    open_ = decisions.filter(
        (pl.col("kept") | pl.col("reason").is_in(WAITING)) & rank.is_not_null() & _VALUE.is_finite()
    ).with_columns(rank, turn=_turn(cut))
    last = open_.select(pl.col("rank").max()).collect(engine="streaming").item()
    if last is None:
        return None
    binned = open_.with_columns(bin=pl.col("rank") * BINS // (last + 1))
    bins = (
        binned.group_by("turn", "bin")
        .agg(pl.len().cast(pl.Int64).alias("rows"), _TOKENS.sum().alias("tokens"), _VALUE.sum().alias("value"))
        .sort("turn", "bin")
        .collect(engine="streaming")
    )
    kept = int(bins.filter(pl.col("turn") < _WAITING_TURN)[unit].sum())
    ends = _ends(binned, bins, unit, [round(factor * kept) for factor in FACTORS])
    return Budgets(unit, _curve(bins, unit), _budgets(open_, unit, ends, groups))


def _curve(bins: pl.DataFrame, unit: Unit) -> Curve:
    """In order of rank alone: rows that a quota reserved are counted where they stand."""
    merged = (
        bins.group_by("bin")
        .agg(pl.col("rows", "tokens", "value").sum())
        .sort("bin")
        .with_columns(point=pl.int_range(pl.len()) * POINTS // pl.len())
        .group_by("point", maintain_order=True)
        .agg(pl.col("rows", "tokens", "value").sum())
    )
    amounts = merged[unit].cum_sum()
    mean = merged["value"].cum_sum() / merged["rows"].cum_sum()
    here = merged["value"] / merged["rows"]
    return Curve(tuple(amounts.to_list()), tuple(here.to_list()), tuple(mean.to_list()))


def _ends(binned: pl.LazyFrame, bins: pl.DataFrame, unit: Unit, goals: Sequence[int]) -> list[_End | None]:
    """Where each budget ends: None where all rows fit."""
    before = (bins[unit].cum_sum() - bins[unit]).to_list()
    after = bins[unit].cum_sum().to_list()
    places = [next((place for place, reached in enumerate(after) if reached > goal), None) for goal in goals]
    wanted = bins[sorted({place for place in places if place is not None})].select("turn", "bin")
    rows = (
        binned.select("turn", "bin", "rank", _TOKENS.alias("tokens"), pl.lit(1, pl.Int64).alias("rows"))
        .join(wanted.lazy(), on=["turn", "bin"], how="semi")
        .collect(engine="streaming")
        .sort("rank")
    )
    ends: list[_End | None] = []
    for goal, place in zip(goals, places, strict=True):
        if place is None:
            ends.append(None)
            continue
        turn, number = bins.select("turn", "bin").row(place)
        inside = rows.filter((pl.col("turn") == turn) & (pl.col("bin") == number))
        taken = int((inside[unit].cum_sum() + before[place] <= goal).sum())
        ends.append(_End(turn, inside["rank"][taken - 1] if taken else inside["rank"][0] - 1))
    return ends


def _budgets(open_: pl.LazyFrame, unit: Unit, ends: Sequence[_End | None],
             groups: Mapping[str, tuple[pl.Expr, Sequence[str]]]) -> tuple[Budget, ...]:  # fmt: skip
    takes = [_takes(end) for end in ends]
    amount = _TOKENS if unit == "tokens" else pl.lit(1, pl.Int64)
    totals = open_.select(
        pl.struct(
            take.cast(pl.Int64).sum().alias("rows"),
            _TOKENS.filter(take).sum().alias("tokens"),
            _VALUE.filter(take & (pl.col("turn") > 0)).min().alias("lowest"),
            _VALUE.filter(take).mean().alias("mean"),
        ).alias(str(number))
        for number, take in enumerate(takes)
    )
    totals_row = totals.collect(engine="streaming").row(0)
    shares: list[dict[str, dict[str, float]]] = [{} for _ in ends]
    for kind, (group, names) in groups.items():
        sums = (
            open_.select(group.alias("name"), "tokens", "turn", "rank")
            .filter(pl.col("name").is_in(list(names)))
            .group_by("name")
            .agg(pl.when(take).then(amount).otherwise(0).sum().alias(str(n)) for n, take in enumerate(takes))
            .collect(engine="streaming")
        )
        found = {row["name"]: row for row in sums.iter_rows(named=True)}
        for number, total in enumerate(totals_row):
            parts = {name: found[name][str(number)] if name in found else 0 for name in names}
            shares[number][kind] = {name: part / (total[unit] or 1) for name, part in parts.items()}
    budgets = [
        Budget(factor, **total, exhausted=end is None and factor > 1, shares=share)
        for factor, total, end, share in zip(FACTORS, totals_row, ends, shares, strict=True)
        if total["rows"]
    ]
    enough = next((place for place, budget in enumerate(budgets) if budget.exhausted), len(budgets))
    return tuple(budgets[: enough + 1])


def _turn(cut: Cut) -> pl.Expr:
    reserved = pl.lit(False) if cut.reserved_from is None else pl.col("rank") > cut.reserved_from
    turn = pl.when(pl.col("kept") & reserved).then(0).when("kept").then(1).otherwise(_WAITING_TURN)
    return turn.cast(pl.Int8)


def _takes(end: _End | None) -> pl.Expr:
    """Whether a row is among those that a budget takes."""
    turn = pl.col("turn")
    if end is None:
        return turn.is_not_null()
    return (turn < end.turn) | ((turn == end.turn) & (pl.col("rank") <= end.rank))
