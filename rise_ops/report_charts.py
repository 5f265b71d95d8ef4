"""The report's figures as drawings, each with its words for those who do not see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from rise_ops import charts
from rise_ops.report_budgets import Budgets
from rise_ops.report_data import DRAWN, Cut, DecisionFigures, Groups, Histogram
from rise_ops.report_rows import Beside, Plane
from rise_ops.report_text import count, percent, plain, signed


def value_chart(found: Histogram, cut: Cut) -> Markup:
    """All rows by value, with the cut."""
    return _histogram(found, "value", cut.value, charts.WIDE, 240)


def target_chart(found: Histogram) -> Markup:
    """All rows by their score on a target."""
    return _histogram(found, f"score on {found.column}", None, charts.NARROW, 210)


def _histogram(found: Histogram, unit: str, cut: float | None, wide: int, height: int) -> Markup:
    words = charts.Words(
        f"Rows by {unit}",
        f"Histogram of {sum(found.kept):,} kept and {sum(found.dropped):,} dropped rows from {signed(found.low)} to "
        f"{signed(found.high)}" + (f"; the lowest kept value is {signed(cut)}." if cut is not None else "."),
    )
    return charts.histogram(
        found.edges, found.kept, found.dropped, unit=unit, cut=cut, words=words, height=height, wide=wide
    )


def group_chart(groups: Groups, value: Histogram, cut: Cut, *, kind: str, prefix: str = "") -> Markup | None:
    """The values of each large group, kept and dropped."""
    drawn = [group for group in groups.shown if group.bins is not None][:DRAWN]
    if not drawn:
        return None
    items = [
        charts.Ridge(
            group.name.removeprefix(prefix) or group.name,
            f"{percent(group.kept, group.rows)} of {count(group.rows)} kept",
            *(group.bins or ((), ())),
        )
        for group in drawn
    ]
    means = "; ".join(f"{item.label} mean {signed(group.mean_value)}" for item, group in zip(items, drawn, strict=True))
    words = charts.Words(f"Value of the rows of each {kind}", f"A histogram for each {kind}: {means}.")
    return charts.ridges(value.edges, items, unit="value", cut=cut.value, words=words)


def budget_chart(found: Budgets, figures: DecisionFigures) -> Markup:
    """The value along the order of rows."""
    unit = found.unit
    kept = figures.tokens_kept if unit == "tokens" else figures.kept
    curve = found.curve
    steps = [round(share * (len(curve.amounts) - 1)) for share in (0, 0.25, 0.5, 0.75, 1)]
    told = "; ".join(f"{count(curve.amounts[at])} {unit}: {signed(curve.value[at])}" for at in dict.fromkeys(steps))
    words = charts.Words(
        f"Value against {unit} taken",
        f"The value of the rows taken falls as more are taken: {told}. {count(kept)} {unit} are kept.",
    )
    return charts.curve(
        curve.amounts, curve.value, curve.mean, unit=f"{unit} taken, in the order of this run", here=kept,
        mark=f"kept: {charts.brief(kept)}", words=words,
    )  # fmt: skip


def plane_chart(found: Plane, weights: Mapping[str, float], cut: Cut, *, by_value: bool) -> Markup:
    """Rows by their scores on two targets; the cut as a line where these two alone make the value."""
    words = charts.Words(
        f"Scores on {found.x} and {found.y}",
        f"{len(found.kept):,} kept rows as dots, {len(found.dropped):,} dropped rows as crosses, "
        f"{'a sample' if found.shown < found.rows else 'all'} of {found.rows:,} rows.",
    )
    others = [name for name, weight in weights.items() if weight and name not in (found.x, found.y)]
    a, b = weights.get(found.x, 0.0), weights.get(found.y, 0.0)
    line = (a, b, cut.value) if by_value and not others and cut.value is not None and (a or b) else None
    return charts.scatter(
        found.kept, found.dropped, x=f"score on {found.x}", y=f"score on {found.y}", line=line, words=words
    )


def beside_chart(found: Beside, cut: float) -> Markup:
    """The rows around the cut with their errors."""
    kept = sum(found.kept)
    words = charts.Words(
        "Values around the cut, with their standard errors",
        f"{kept} kept and {len(found.kept) - kept} dropped rows by falling value; the cut is at {signed(cut)}, the "
        f"errors are about {plain(sorted(found.errors)[len(found.errors) // 2])}.",
    )
    return charts.whiskers(found.values, found.errors, found.kept, cut=cut, words=words)


def stage_shares(stages: list[dict[str, Any]]) -> list[float]:
    """Time of each stage as a part of the longest."""
    seconds = [float(stage.get("seconds") or 0.0) for stage in stages]
    longest = max(seconds, default=0.0) or 1.0
    return [each / longest for each in seconds]
