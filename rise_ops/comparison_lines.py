"""A comparison's outcomes as lines of a table: one a method, its runs with several seeds together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One method under one dilution."""

    name: str
    method: str
    paper: str
    status: str
    """completed, infeasible or failed."""
    reason: str | None
    seeds: int
    """Runs that completed."""
    figures: dict[tuple[str, str], list[float]]
    """(K, auprc | auroc | precision) → of each run; empty where none completed."""
    need_bytes: int | None
    """Working memory that it says it needs."""
    bytes_per_row: float | None
    """None: nothing is stored."""
    index_seconds: float | None
    tokens_per_second: float | None
    query_seconds: float | None
    peak_mib: float | None
    """Of the whole process."""
    working_mib: float | None
    """Beside what it held when all was loaded."""
    cached: bool
    """Whether all was measured by an earlier run."""


def comparison_lines(comparison: Json, dilution: str) -> list[Line]:
    """Lines, the best auPRC at the middle K first, and last those without figures.

    Parameters
    ----------
    comparison
        `comparison` of a run's record.
    dilution
        A key of an outcome's `settings`.
    """
    groups: dict[str, list[Json]] = {}
    for outcome in comparison["methods"]:
        groups.setdefault(outcome["name"], []).append(outcome)
    lines = [_line(name, runs, dilution) for name, runs in groups.items()]
    middle = str(middle_k(comparison))
    return sorted(lines, key=lambda line: -fmean(line.figures.get((middle, "auprc"), [-1.0])))


def middle_k(comparison: Json) -> int:
    """The K that orders the lines."""
    ks = sorted(int(k) for k in comparison["k"])
    return ks[len(ks) // 2]


def _line(name: str, runs: Sequence[Json], dilution: str) -> Line:
    done = [run for run in runs if run["status"] == "completed"]
    first = (done or runs)[0]
    figures: dict[tuple[str, str], list[float]] = {}
    for run in done:
        for k, found in run["settings"][dilution]["top_k"].items():
            for figure, value in found.items():
                if value is not None:
                    figures.setdefault((k, figure), []).append(value)

    def average(key: str) -> float | None:
        values = [run[key] for run in done if run.get(key) is not None]
        return fmean(values) if values else None

    peak, loaded = average("peak_bytes"), average("loaded_bytes")
    broken = next((run for run in runs if run["status"] != "completed"), None)
    return Line(
        name=name,
        method=first["method"],
        paper=first["paper"],
        status="completed" if done else first["status"],
        reason=None if broken is None else broken["reason"],
        seeds=len(done),
        figures=figures,
        need_bytes=(first.get("need") or {}).get("bytes"),
        bytes_per_row=average("bytes_per_row"),
        index_seconds=average("index_seconds"),
        tokens_per_second=average("tokens_per_second"),
        query_seconds=average("query_seconds"),
        peak_mib=None if peak is None else peak / 2**20,
        working_mib=None if peak is None or loaded is None else (peak - loaded) / 2**20,
        cached=bool(done) and all(run["cached"] for run in done),
    )
