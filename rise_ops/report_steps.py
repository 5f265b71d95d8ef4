"""What each rule of a selection took, in the order of the rules, and what was left after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rise_ops.report_data import DecisionFigures, Reason
from rise_ops.report_text import setting

REASONS = {
    "no_prediction": "too short to predict a token, so it has no value",
    "excluded_pattern": "an excluded pattern is in it",
    "excluded_target": "too influential on an excluded target",
    "below_min_value": "value below the minimum",
    "below_percentile": "value below the percentile",
    "near_duplicate": "nearly the same as a better row that stays",
    "not_sampled": "the draw did not choose it",
    "over_source_quota": "its source had its share",
    "over_label_quota": "its label had its share",
    "over_rows": "the limit on rows was reached by better rows",
    "over_fraction": "the limit on the fraction was reached by better rows",
    "over_tokens": "the limit on tokens was reached by better rows",
    "kept": "within every limit",
}
"""Reasons in the order in which a selection comes to them, and what they mean."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one rule took."""

    reason: str
    meaning: str
    rule: str | None
    """Configuration key."""
    says: str
    """What the configuration says there."""
    rows: int
    tokens: int
    left: int
    """Rows after this step."""


def selection_steps(config: Mapping[str, Any], figures: DecisionFigures,
                    recorded: Iterable[Mapping[str, Any]] = ()) -> list[Step]:  # fmt: skip
    """The steps of a selection; the last is what was kept.

    Parameters
    ----------
    config
        The run's configuration, from which rules are quoted.
    recorded
        Steps as `run.json` has them: rules that took nothing are known from there alone.
    """
    idle = [Reason(step["reason"], step["rule"], 0, 0) for step in recorded if step["rule"] and not step["rows"]]
    order = {reason: number for number, reason in enumerate(REASONS)}
    left, steps = figures.rows, []
    for found in sorted([*figures.reasons, *idle], key=lambda each: (order.get(each.reason, 0), each.rule or "")):
        if found.reason != "kept":
            left -= found.rows
        says = setting(config, found.rule) if found.rule else ""
        meaning = REASONS.get(found.reason, "")
        steps.append(Step(found.reason, meaning, found.rule, says, found.rows, found.tokens, left))
    return steps
