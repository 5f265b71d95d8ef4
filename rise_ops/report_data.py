"""Figures of the report, computed from a run's decisions without ever holding them.

Every figure is a streaming Polars aggregation over `runs/<run_id>/decisions.parquet`: one pass for totals
and ranges, one for histograms, one for the sources. Histograms count every row; nothing is sampled.
Quantiles are read off FINE bins between the smallest and the largest value, so they are right to 1/FINE of
that range. Memory depends on the number of bins, targets and sources, not on the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

FINE = 960
"""Bins that are counted."""
SHOWN = 48
"""Bins that are drawn; divides FINE."""
LARGEST_SOURCES = 20
"""Sources that are shown one by one, by number of rows."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_SCORE = "score_"


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
class SourceFigures:
    """One source object, or all that are not shown one by one."""

    uri: str
    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    mean_value: float | None
    quantiles: tuple[float, float, float, float, float] | None
    """Of the value: 5 %, 25 %, 50 %, 75 %, 95 %."""


@dataclass(frozen=True, slots=True)
class DecisionFigures:
    """What the report shows of all decisions."""

    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    unvalued: int
    """Rows without a value (too short to predict a token)."""
    reasons: tuple[tuple[str, int, int], ...]
    """Reason, rows, tokens; most rows first."""
    value: Histogram | None
    targets: tuple[Histogram, ...]
    sources: tuple[SourceFigures, ...]
    """The largest first, then one line for all others, if there are more."""
    source_count: int


def decision_figures(decisions: pl.LazyFrame) -> DecisionFigures:
    """Aggregate a run's decisions.

    Parameters
    ----------
    decisions
        Lazy scan of `decisions.parquet`.
    """
    columns = decisions.collect_schema().names()
    targets = [name for name in columns if name.startswith(_SCORE)]
    ranges = _ranges(decisions, ["value", *targets])
    reasons = (
        decisions.group_by("reason", "kept")
        .agg(pl.len().alias("rows"), pl.col("tokens").cast(pl.Int64).sum())
        .sort("rows", "reason", descending=[True, False])
        .collect(engine="streaming")
    )
    kept = reasons.filter(pl.col("kept"))
    return DecisionFigures(
        rows=int(reasons["rows"].sum()),
        kept=int(kept["rows"].sum()),
        tokens=int(reasons["tokens"].sum()),
        tokens_kept=int(kept["tokens"].sum()),
        unvalued=int(ranges["missing"]),
        reasons=tuple(reasons.select("reason", "rows", "tokens").iter_rows()),
        value=_histogram(decisions, "value", ranges),
        targets=tuple(found for name in targets if (found := _histogram(decisions, name, ranges)) is not None),
        **_sources(decisions, ranges),
    )


def _ranges(decisions: pl.LazyFrame, columns: Sequence[str]) -> dict[str, Any]:
    """Smallest and largest finite value of each column, and the rows without a value."""
    finite = [pl.col(name).filter(pl.col(name).is_finite()) for name in columns]
    return (
        decisions.select(
            *[column.min().alias(f"low_{name}") for column, name in zip(finite, columns, strict=True)],
            *[column.max().alias(f"high_{name}") for column, name in zip(finite, columns, strict=True)],
            pl.col("value").null_count().alias("missing"),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )


def _span(ranges: dict[str, Any], column: str) -> tuple[float, float] | None:
    low, high = ranges[f"low_{column}"], ranges[f"high_{column}"]
    if low is None or high is None:
        return None
    return (low, high) if high > low else (low - 0.5, high + 0.5)  # all rows alike: one bin in the middle


def _bin(column: str, span: tuple[float, float]) -> pl.Expr:
    low, high = span
    position = (pl.col(column).cast(pl.Float64) - low) / (high - low) * FINE
    return position.floor().clip(0, FINE - 1).cast(pl.Int32).alias("bin")


def _histogram(decisions: pl.LazyFrame, column: str, ranges: dict[str, Any]) -> Histogram | None:
    span = _span(ranges, column)
    if span is None:
        return None
    counts = (
        decisions.filter(pl.col(column).is_finite())
        .group_by(_bin(column, span) * SHOWN // FINE, "kept")
        .agg(pl.len().alias("rows"))
        .collect(engine="streaming")
    )
    kept, dropped = [0] * SHOWN, [0] * SHOWN
    for number, is_kept, rows in counts.select("bin", "kept", "rows").iter_rows():
        (kept if is_kept else dropped)[number] += rows
    step = (span[1] - span[0]) / SHOWN
    return Histogram(
        column=column.removeprefix(_SCORE),
        edges=tuple(span[0] + step * number for number in range(SHOWN + 1)),
        kept=tuple(kept),
        dropped=tuple(dropped),
        low=ranges[f"low_{column}"],
        high=ranges[f"high_{column}"],
    )


def _sources(decisions: pl.LazyFrame, ranges: dict[str, Any]) -> dict[str, Any]:
    tokens = pl.col("tokens").cast(pl.Int64)
    table = (
        decisions.group_by("source_uri")
        .agg(
            pl.len().alias("rows"),
            pl.col("kept").cast(pl.Int64).sum().alias("kept"),
            tokens.sum().alias("tokens"),
            tokens.filter(pl.col("kept")).sum().alias("tokens_kept"),
            pl.col("value").filter(pl.col("value").is_finite()).cast(pl.Float64).sum().alias("total"),
            pl.col("value").is_finite().cast(pl.Int64).sum().alias("valued"),
        )
        .sort("rows", "source_uri", descending=[True, False])
        .collect(engine="streaming")
    )
    shown, rest = table[:LARGEST_SOURCES], table[LARGEST_SOURCES:]
    quantiles = _quantiles(decisions, shown["source_uri"].to_list(), _span(ranges, "value"))
    figures = [_source(row, quantiles.get(row["source_uri"])) for row in shown.iter_rows(named=True)]
    if rest.height:
        sums = rest.drop("source_uri").sum().row(0, named=True)
        figures.append(_source({**sums, "source_uri": f"{rest.height:,} smaller sources"}, None))
    return {"sources": tuple(figures), "source_count": table.height}


def _source(row: dict[str, Any], quantiles: tuple[float, float, float, float, float] | None) -> SourceFigures:
    return SourceFigures(
        uri=row["source_uri"],
        rows=row["rows"],
        kept=row["kept"],
        tokens=row["tokens"],
        tokens_kept=row["tokens_kept"],
        mean_value=row["total"] / row["valued"] if row["valued"] else None,
        quantiles=quantiles,
    )


def _quantiles(decisions: pl.LazyFrame, uris: Sequence[str], span: tuple[float, float] | None
               ) -> dict[str, tuple[float, float, float, float, float]]:  # fmt: skip
    if span is None:
        return {}
    counts = (
        decisions.filter(pl.col("value").is_finite() & pl.col("source_uri").is_in(list(uris)))
        .group_by("source_uri", _bin("value", span))
        .agg(pl.len().alias("rows"))
        .sort("source_uri", "bin")
        .collect(engine="streaming")
    )
    found = {}
    for (uri,), bins in counts.group_by("source_uri", maintain_order=True):
        reached = bins["rows"].cum_sum() / bins["rows"].sum()
        step = (span[1] - span[0]) / FINE
        five = [span[0] + step * (bins["bin"][_first(reached, share)] + 0.5) for share in QUANTILES]
        found[str(uri)] = (five[0], five[1], five[2], five[3], five[4])
    return found


def _first(reached: pl.Series, share: float) -> int:
    """Position of the first bin at which `share` of the rows is reached."""
    return int((reached >= share - 1e-12).arg_max() or 0)
