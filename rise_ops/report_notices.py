"""What a person should look at before using a selection, each with what to do about it.

Found in the run's record and figures alone. A warning says that the result may not be what was meant; a note says
what the result does not show by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import eq
from typing import Any, Literal

from rise_ops.report_data import BUDGET, DecisionFigures, Groups
from rise_ops.report_text import count, percent, setting

_SCARCE = 1.1
"""A minimum is close to what cannot be had if the rows left are fewer than this many times it."""
_UNUSED = 0.98
"""A budget of which less is used was not used up."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing to look at."""

    kind: Literal["warning", "note"]
    title: str
    text: str
    section: str
    """Where the page shows more."""


def notices(run: Mapping[str, Any], figures: DecisionFigures | None, rejected: int) -> list[Notice]:
    """Warnings first."""
    found = [*_stability(run), *_rejected(run, rejected)]
    if figures is not None:
        selection = (run.get("config") or {}).get("selection") or {}
        found += _budget(selection.get("keep") or {}, figures)
        found += _idle(run)
        for kind, groups in (("source", figures.sources), ("label", figures.labels)):
            if groups is not None:
                found += _scarce(kind, groups, selection.get(f"per_{kind}") or {})
                found += _emptied(kind, groups, figures.rows)
        found += _values(run, figures)
    return sorted(found, key=lambda notice: notice.kind != "warning")


def _stability(run: Mapping[str, Any]) -> Iterator[Notice]:
    warning = ((run.get("selection") or {}).get("stability") or {}).get("warning")
    if warning:
        yield Notice("warning", "The choice is uncertain", str(warning), "stability")


def _rejected(run: Mapping[str, Any], rejected: int) -> Iterator[Notice]:
    if rejected:
        rows = (run.get("counts") or {}).get("rows") or 0
        text = f"{count(rejected)} rows ({percent(rejected, rows + rejected)}) could not be read and are left out."
        yield Notice("note", "Rejected rows", text, "rejected")


def _budget(keep: Mapping[str, Any], figures: DecisionFigures) -> Iterator[Notice]:
    if any(found.reason in BUDGET for found in figures.reasons):
        return
    fraction = keep.get("fraction")
    limits = {
        "tokens": (keep.get("tokens"), figures.tokens_kept),
        "rows": (keep.get("rows"), figures.kept),
        "fraction": (int(fraction * figures.rows) if fraction else None, figures.kept),
    }
    for name, (limit, used) in limits.items():
        if limit and used < _UNUSED * limit:
            unit = "tokens" if name == "tokens" else "rows"
            text = (
                f"selection.keep.{name} allows {count(limit)} {unit}, {count(used)} were left to keep. "
                "Loosen the exclusions, quotas or thresholds above it, or lower the budget."
            )
            yield Notice("warning", "The budget is not used up", text, "steps")


def _idle(run: Mapping[str, Any]) -> Iterator[Notice]:
    """Exclusions that took no row: a misspelt pattern looks like this."""
    config = run.get("config") or {}
    for step in (run.get("selection") or {}).get("steps") or ():
        if step["step"] == "exclude" and not step["rows"]:
            rule = step["rule"]
            text = f"{rule} ({setting(config, rule)}) took no row that was still there. Check what it says."
            yield Notice("warning", "An exclusion did nothing", text, "steps")


def _scarce(kind: str, groups: Groups, quota: Mapping[str, Any]) -> Iterator[Notice]:
    special: Mapping[str, Any] = quota.get("groups") or {}
    names = set(groups.names)
    for group in groups.shown:
        if group.name not in names:
            continue
        # sources are named by globs, labels by themselves
        fits = fnmatchcase if kind == "source" else eq
        own = next((each for name, each in special.items() if fits(group.name, name)), quota)
        least, left = own.get("min_rows"), group.rows - group.filtered
        if least and left < _SCARCE * least:
            text = (
                f"selection.per_{kind} asks for at least {count(least)} rows of {kind} {group.name}; {count(left)} are "
                "left after the exclusions. With a few less the selection fails: lower the minimum or add rows."
            )
            yield Notice("warning", "A minimum is close to what cannot be had", text, "groups")


def _emptied(kind: str, groups: Groups, rows: int) -> Iterator[Notice]:
    names = set(groups.names)
    lost = [group for group in groups.shown if group.name in names and not group.kept and group.rows >= rows / 100]
    if lost:
        listed = ", ".join(group.name for group in lost[:3]) + (", …" if len(lost) > 3 else "")
        total = sum(group.rows for group in lost)
        text = f"Nothing is kept of {listed} ({count(total)} rows); selection.per_{kind} can hold a minimum for each."
        yield Notice("note", f"A whole {kind} is gone" if len(lost) == 1 else f"Whole {kind}s are gone", text, "groups")


def _values(run: Mapping[str, Any], figures: DecisionFigures) -> Iterator[Notice]:
    config = run.get("config") or {}
    weights = config.get("value") or dict.fromkeys(config.get("targets") or {}, 1.0)
    # where all targets describe what to avoid, a value below zero is what every other row has
    if figures.below_zero and any(number > 0 for number in weights.values()):
        text = (
            f"{count(figures.below_zero)} kept rows ({percent(figures.below_zero, figures.kept)}) have values below 0: "
            "by the targets' weights they do more harm than good. selection.keep.min_value 0 would drop them."
        )
        yield Notice("note", "Kept rows of negative value", text, "budgets")
    if figures.unvalued > figures.rows / 100:
        text = f"{count(figures.unvalued)} rows are too short to predict a token; without a value they are dropped."
        yield Notice("note", "Rows without a value", text, "steps")
