"""The report's section on a comparison of methods: quality, costs, and whether anything beats RISE.

All from `comparison` of the run's record. Several runs of a method are one line, with mean and range. RISE is held
against the others by the line of its best auPRC at the middle K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from rise_ops import charts
from rise_ops.comparison_lines import Line, comparison_lines, middle_k

FIGURES = (("auprc", "auPRC"), ("precision", "Precision"), ("auroc", "auROC"))
"""Figures of the protocol, as the table orders them."""
_OWN = "rise"

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure of a line."""

    mean: float | None
    """None: there is none."""
    low: float
    high: float
    is_best: bool
    """Of its column, ties included."""

    @property
    def has_range(self) -> bool:
        """Whether runs differ by what is shown."""
        return self.mean is not None and f"{self.low:.3f}" != f"{self.high:.3f}"


@dataclass(frozen=True, slots=True)
class Row:
    """A method in a table."""

    number: int
    line: Line
    is_own: bool
    """Whether it is RISE."""
    cells: list[Cell]
    """By figure, then by K; empty where no run completed."""


@dataclass(frozen=True, slots=True)
class Setting:
    """All methods under one dilution."""

    dilution: float
    rows: int | None
    positives: int | None
    """Fewest of a query; None where no method completed."""
    lines: list[Row]
    verdict: list[str]
    """Sentences: what beats RISE."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the section shows."""

    ks: list[int]
    middle: int
    """The K that orders the lines."""
    settings: list[Setting]
    diluted: list[tuple[Row, list[Cell]]]
    """Precision at the middle K of each line, by dilution; empty with a single one."""
    chart: Markup | None
    completed: int


def comparison_view(comparison: Json | None) -> Comparison | None:
    """The section's content; None without a comparison."""
    if not comparison:
        return None
    ks = sorted(int(k) for k in comparison["k"])
    middle = middle_k(comparison)
    settings = [_setting(comparison, factor, ks, middle) for factor in sorted(comparison["dilute"])]
    first = settings[0]
    return Comparison(
        ks=ks,
        middle=middle,
        settings=settings,
        diluted=_diluted(settings, middle) if len(settings) > 1 else [],
        chart=_chart(first, middle),
        completed=sum(bool(row.cells) for row in first.lines),
    )


def _setting(comparison: Json, factor: float, ks: Sequence[int], middle: int) -> Setting:
    key = f"{factor:g}"
    lines = comparison_lines(comparison, key)
    columns = [(str(k), figure) for figure, _ in FIGURES for k in ks]
    best = {column: max((_shown(line, column) for line in lines if column in line.figures), default=0.0)
            for column in columns}  # fmt: skip
    rows = [
        Row(
            number, line, line.method == _OWN, [_cell(line, each, best[each]) for each in columns] if line.seeds else []
        )
        for number, line in enumerate(lines, 1)
    ]
    found: Json = next((each["settings"][key] for each in comparison["methods"] if each["status"] == "completed"), {})
    return Setting(factor, found.get("rows"), found.get("positives"), rows, _verdict(lines, ks, middle))


def _shown(line: Line, column: tuple[str, str]) -> float:
    """Rounded as it is printed: lines that read the same are equally good."""
    return round(fmean(line.figures[column]), 3)


def _cell(line: Line, column: tuple[str, str], best: float) -> Cell:
    values = line.figures.get(column)
    if not values:
        return Cell(None, 0.0, 0.0, is_best=False)
    return Cell(fmean(values), min(values), max(values), is_best=_shown(line, column) == best)


def _verdict(lines: Sequence[Line], ks: Sequence[int], middle: int) -> list[str]:
    """A sentence for each K."""
    done = [line for line in lines if line.seeds]
    own = next((line for line in done if line.method == _OWN), None)  # lines are ordered by auPRC at the middle K
    others = [line for line in done if line.method != _OWN]
    if own is None:
        return ["RISE has no figures here, so nothing is held against it."]
    if not others:
        return ["No other method has figures here to hold RISE against."]
    held = f"Held against {own.name}, the best RISE line at K = {middle}"
    beaten = {k: found for k in ks if (found := _better(own, others, k))}
    if not beaten:
        return [f"{held}: no other method has a higher auPRC at any K."]
    none = [str(k) for k in ks if k not in beaten]
    told = [f"{held}, by auPRC."]
    told += [
        f"At K = {k} ({_at(own, k):.3f}) better: {', '.join(f'{name} by {ahead:.3f}' for name, ahead in found)}."
        for k, found in beaten.items()
    ]
    return [*told, f"At K = {' and '.join(none)} no other method is better."] if none else told


def _better(own: Line, others: Sequence[Line], k: int) -> list[tuple[str, float]]:
    """Names of better lines and by how much, as figures are printed; the best first."""
    found = [(line.name, _at(line, k) - _at(own, k)) for line in others if _at(line, k) > _at(own, k)]
    return sorted(found, key=lambda each: -each[1])


def _at(line: Line, k: int) -> float:
    return _shown(line, (str(k), "auprc"))


def _diluted(settings: Sequence[Setting], middle: int) -> list[tuple[Row, list[Cell]]]:
    """Lines in the order of the first setting, with their precision under each dilution."""
    by_name = [{row.line.name: row.line for row in setting.lines} for setting in settings]
    column = (str(middle), "precision")
    best = [max((_shown(line, column) for line in lines.values() if line.seeds), default=0.0) for lines in by_name]
    return [
        (row, [_cell(lines[row.line.name], column, top) for lines, top in zip(by_name, best, strict=True)])
        for row in settings[0].lines
        if row.line.seeds
    ]


def _chart(setting: Setting, middle: int) -> Markup | None:
    """auPRC at the middle K against the bytes that a row takes."""
    rows = [row for row in setting.lines if row.line.seeds]
    if not rows:
        return None
    places = [
        charts.Place(row.number, row.line.name, row.line.bytes_per_row, _at(row.line, middle), row.is_own)
        for row in rows
    ]
    told = "; ".join(
        f"{each.label}: {each.y:.3f}, {'nothing stored' if each.x is None else f'{each.x:,.0f} bytes'}"
        for each in places
    )
    words = charts.Words(f"auPRC at {middle} against bytes stored for each row", f"{told}.")
    return charts.named(places, x="bytes a row (log)", y=f"auPRC@{middle}", aside="0", words=words)
