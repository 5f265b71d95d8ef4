"""Figures of the report, computed from a run's decisions without ever holding them.

Every figure is a streaming Polars aggregation over `runs/<run_id>/decisions.parquet`. Histograms, tables and sums
count every row; nothing is sampled here (`rise_ops.report_rows` samples, and says so). Columns that a run's
decisions lack are left out. Memory depends on the number of bins, targets, sources and labels, not on the
number of rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import polars as pl

SHOWN = 48
"""Bins of a histogram."""
LARGEST = 20
"""Sources and labels that are shown one by one, by number of rows."""
DRAWN = 12
"""Of these, the ones whose values are drawn."""
BUDGET = ("over_rows", "over_fraction", "over_tokens")
"""Reasons of rows that another budget would keep."""
WAITING = (*BUDGET, "below_min_value", "below_percentile", "not_sampled")
"""Reasons of rows that another budget or threshold would keep."""
SCORE = "score_"
NO_LABEL = "(none)"
MOST_LABELS = 100_000
"""A column with more values than this, about, is no label that rows share, and is left out."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Kept and dropped rows by value of one column."""

    column: str
    edges: tuple[float, ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Reason:
    """Why rows were kept or dropped."""

    reason: str
    rule: str | None
    """Configuration key that decided."""
    rows: int
    tokens: int


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """Rows of one source or label, or of all that are not shown one by one."""

    name: str
    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    filtered: int
    """Rows that went before budgets and quotas were looked at."""
    over_quota: int
    """Rows that went because the group had its share."""
    reserved: int
    """Kept rows that are worse than some that the budget dropped: a minimum holds their place."""
    mean_value: float | None
    mean_scores: tuple[float | None, ...]
    """Of each target, in the order of `DecisionFigures.targets`."""
    bins: tuple[tuple[int, ...], tuple[int, ...]] | None
    """Kept and dropped rows by value, in the bins of `DecisionFigures.value`."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The largest groups, then one line for all others, if there are more."""

    shown: tuple[GroupFigures, ...]
    count: int
    rest: bool

    @property
    def names(self) -> list[str]:
        """Of the groups that are shown one by one."""
        return [group.name for group in (self.shown[:-1] if self.rest else self.shown)]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where the kept rows end."""

    value: float | None
    """Lowest value of a kept row that no minimum of a quota holds."""
    rank: int | None
    """Its place in the order, at most."""
    reserved_from: int | None
    """Kept rows from this rank on are reserved: the best row that the budget dropped has it."""


@dataclass(frozen=True, slots=True)
class DecisionFigures:
    """What the report shows of all decisions."""

    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    unvalued: int
    """Rows without a value (too short to predict a token)."""
    below_zero: int
    """Kept rows of negative value."""
    reasons: tuple[Reason, ...]
    """Kept rows first, then the most rows first."""
    cut: Cut
    value: Histogram | None
    targets: tuple[Histogram, ...]
    correlations: tuple[tuple[str, str, float], ...]
    """Of the scores of two targets, over all rows (Pearson)."""
    sources: Groups
    labels: Groups | None
    """None where rows have no label, or hardly any two the same."""


def decision_figures(decisions: pl.LazyFrame, *, source: pl.Expr | None = None) -> DecisionFigures:
    """Aggregate a run's decisions.

    Parameters
    ----------
    decisions
        Lazy scan of `decisions.parquet`.
    source
        What a source is; by default the object that a row came from.
    """
    columns = decisions.collect_schema().names()
    targets = [name for name in columns if name.startswith(SCORE)]
    ranges = _ranges(decisions, ["value", *targets])
    reasons = _reasons(decisions, columns)
    cut = find_cut(decisions)
    value = _histogram(decisions, "value", ranges)
    scored = [found for name in targets if (found := _histogram(decisions, name, ranges)) is not None]
    shared: dict[str, Any] = {"targets": [f"{SCORE}{found.column}" for found in scored], "value": value, "cut": cut}
    labelled = 0 < ranges["labels"] <= MOST_LABELS
    label = pl.col("label").fill_null(NO_LABEL)
    return DecisionFigures(
        rows=sum(found.rows for found in reasons),
        kept=sum(found.rows for found in reasons if found.reason == "kept"),
        tokens=sum(found.tokens for found in reasons),
        tokens_kept=sum(found.tokens for found in reasons if found.reason == "kept"),
        unvalued=ranges["missing"],
        below_zero=ranges["below_zero"],
        reasons=tuple(reasons),
        cut=cut,
        value=value,
        targets=tuple(scored),
        correlations=_correlations(decisions, [found.column for found in scored]),
        sources=_groups(
            decisions, pl.col("source_uri") if source is None else source, quota="over_source_quota",
            rest="{:,} smaller sources", **shared,
        ),
        labels=_groups(decisions, label, quota="over_label_quota", rest="{:,} rarer labels", **shared)
        if labelled else None,
    )  # fmt: skip


def _ranges(decisions: pl.LazyFrame, columns: Sequence[str]) -> Row:
    """Smallest and largest finite value of each column, and counts over all rows."""
    finite = [pl.col(name).filter(pl.col(name).is_finite()) for name in columns]
    labelled = "label" in decisions.collect_schema().names()
    return (
        decisions.select(
            *[column.min().alias(f"low_{name}") for column, name in zip(finite, columns, strict=True)],
            *[column.max().alias(f"high_{name}") for column, name in zip(finite, columns, strict=True)],
            pl.col("value").null_count().cast(pl.Int64).alias("missing"),
            (pl.col("kept") & (pl.col("value") < 0)).cast(pl.Int64).sum().alias("below_zero"),
            (pl.col("label").drop_nulls().approx_n_unique() if labelled else pl.lit(0)).alias("labels"),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )


def _reasons(decisions: pl.LazyFrame, columns: Collection[str]) -> list[Reason]:
    rule = pl.col("rule") if "rule" in columns else pl.lit(None, pl.String).alias("rule")
    table = (
        decisions.group_by("reason", rule)
        .agg(pl.len().alias("rows"), pl.col("tokens").cast(pl.Int64).sum())
        .sort(pl.col("reason") == "kept", "rows", "reason", "rule", descending=[True, True, False, False])
        .collect(engine="streaming")
    )
    return [Reason(**row) for row in table.iter_rows(named=True)]


def find_cut(decisions: pl.LazyFrame) -> Cut:
    """Where the kept rows end, those that a quota's minimum holds aside."""
    values = pl.col("value").filter(pl.col("value").is_finite())
    if "rank" not in decisions.collect_schema().names():
        lowest = decisions.filter("kept").select(values.min()).collect(engine="streaming").item()
        return Cut(lowest, None, None)
    first = decisions.filter(pl.col("reason").is_in(BUDGET)).select(pl.col("rank").cast(pl.Int64).min())
    reserved_from = first.collect(engine="streaming").item()
    usual = decisions.filter(pl.col("kept") & ~_reserved(reserved_from))
    lowest, last = usual.select(values.min(), pl.col("rank").cast(pl.Int64).max()).collect(engine="streaming").row(0)
    return Cut(lowest, last, reserved_from)


def _reserved(reserved_from: int | None) -> pl.Expr:
    return pl.lit(False) if reserved_from is None else pl.col("kept") & (pl.col("rank") > reserved_from)


def _span(ranges: Row, column: str) -> tuple[float, float] | None:
    low, high = ranges[f"low_{column}"], ranges[f"high_{column}"]
    if low is None or high is None:
        return None
    return (low, high) if high > low else (low - 0.5, high + 0.5)  # all rows alike: one bin in the middle


def _bin(column: str, span: tuple[float, float]) -> pl.Expr:
    low, high = span
    position = (pl.col(column).cast(pl.Float64) - low) / (high - low) * SHOWN
    return position.floor().clip(0, SHOWN - 1).cast(pl.Int32).alias("bin")


def _histogram(decisions: pl.LazyFrame, column: str, ranges: Row) -> Histogram | None:
    span = _span(ranges, column)
    if span is None:
        return None
    counts = (
        decisions.filter(pl.col(column).is_finite())
        .group_by(_bin(column, span), "kept")
        .agg(pl.len().alias("rows"))
        .collect(engine="streaming")
    )
    kept, dropped = _bins(counts)
    step = (span[1] - span[0]) / SHOWN
    return Histogram(
        column=column.removeprefix(SCORE),
        edges=tuple(span[0] + step * number for number in range(SHOWN + 1)),
        kept=kept,
        dropped=dropped,
        low=ranges[f"low_{column}"],
        high=ranges[f"high_{column}"],
    )


def _bins(counts: pl.DataFrame) -> tuple[tuple[int, ...], tuple[int, ...]]:
    kept, dropped = [0] * SHOWN, [0] * SHOWN
    for number, is_kept, rows in counts.select("bin", "kept", "rows").iter_rows():
        (kept if is_kept else dropped)[number] += rows
    return tuple(kept), tuple(dropped)


def _correlations(decisions: pl.LazyFrame, targets: Sequence[str]) -> tuple[tuple[str, str, float], ...]:
    """From sums over the rows that both targets have scored, about their means: scores are small."""
    pairs = list(combinations(targets, 2))
    if not pairs:
        return ()
    found = decisions.select(
        pl.corr(pl.col(f"{SCORE}{a}").cast(pl.Float64), pl.col(f"{SCORE}{b}").cast(pl.Float64)).alias(str(number))
        for number, (a, b) in enumerate(pairs)
    )
    row = found.collect(engine="streaming").row(0)
    return tuple((a, b, r) for (a, b), r in zip(pairs, row, strict=True) if r is not None and r == r)


def _groups(decisions: pl.LazyFrame, group: pl.Expr, *, quota: str, rest: str, targets: Sequence[str],
            value: Histogram | None, cut: Cut) -> Groups:  # fmt: skip
    tokens, kept, finite = pl.col("tokens").cast(pl.Int64), pl.col("kept"), pl.col("value").is_finite()
    waits = kept | pl.col("reason").is_in([*WAITING, "over_source_quota", "over_label_quota"])

    def number(each: pl.Expr, name: str) -> pl.Expr:
        return each.cast(pl.Int64).alias(name)

    table = (
        # sums of columns alone: with filters inside, Polars would hold all rows of a group
        decisions.select(
            group.alias("name"),
            number(pl.lit(1), "rows"),
            number(kept, "kept"),
            tokens.alias("tokens"),
            number(tokens * kept, "tokens_kept"),
            number(~waits, "filtered"),
            number(pl.col("reason") == quota, "over_quota"),
            number(_reserved(cut.reserved_from), "reserved"),
            *[pl.when(finite).then(pl.col(name).cast(pl.Float64)).alias(name) for name in ("value", *targets)],
            number(finite, "valued"),
        )
        .group_by("name")
        .agg(pl.all().sum())
        .sort("rows", "name", descending=[True, False])
        .collect(engine="streaming")
    )
    shown, others = table[:LARGEST], table[LARGEST:]
    bins = _group_bins(decisions, group, shown["name"].to_list()[:DRAWN], value)
    figures = [_group(row, targets, bins.get(row["name"])) for row in shown.iter_rows(named=True)]
    if others.height:
        sums = others.drop("name").sum().row(0, named=True)
        figures.append(_group({**sums, "name": rest.format(others.height)}, targets, None))
    return Groups(tuple(figures), table.height, others.height > 0)


def _group(row: Row, targets: Sequence[str], bins: tuple[tuple[int, ...], tuple[int, ...]] | None) -> GroupFigures:
    names = ("name", "rows", "kept", "tokens", "tokens_kept", "filtered", "over_quota", "reserved")
    valued = row["valued"]
    return GroupFigures(
        **{name: row[name] for name in names},
        mean_value=row["value"] / valued if valued else None,
        mean_scores=tuple(row[name] / valued if valued else None for name in targets),
        bins=bins,
    )


def _group_bins(decisions: pl.LazyFrame, group: pl.Expr, names: Sequence[str], value: Histogram | None
                ) -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]:  # fmt: skip
    if value is None:
        return {}
    counts = (
        decisions.select(group.alias("name"), "value", "kept")
        .filter(pl.col("value").is_finite() & pl.col("name").is_in(list(names)))
        .group_by("name", _bin("value", (value.edges[0], value.edges[-1])), "kept")
        .agg(pl.len().alias("rows"))
        .collect(engine="streaming")
    )
    return {str(name): _bins(bins) for (name,), bins in counts.group_by("name")}
