"""The rules of a selection in the order in which they work, each with a number, and what they took.

| step | reason | rule |
|---|---|---|
| no_prediction | no_prediction | (none) |
| exclude | excluded_pattern | selection.exclude[N], patterns first |
| exclude | excluded_target | selection.exclude[N] |
| threshold | below_min_value, below_percentile | selection.keep.min_value, .min_percentile |
| near_duplicates | near_duplicate | selection.near_duplicates |
| sample | not_sampled | selection.sample |
| per_source | over_source_quota | selection.per_source.max_rows, … |
| per_label | over_label_quota | selection.per_label.groups.NAME.max_rows, … |
| budget | over_rows, over_fraction, over_tokens | selection.keep.rows, … |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.config import SelectionConfig
from rise_ops.quotas import Limit, Partition, Unit
from rise_ops.row_groups import LabelGroups, Pattern, SourceGroups

KEPT = 0
"""The number of no rule."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: the step that it belongs to, why a row goes by it, and the configuration key."""

    step: str
    reason: str
    rule: str | None


class Rules:
    """The rules of a configuration.

    Parameters
    ----------
    selection
        The configuration.
    uris
        Source objects of the corpus.
    sources
        `corpus.sources`.
    """

    def __init__(self, selection: SelectionConfig, *, uris: Sequence[str], sources: Sequence[str]) -> None:
        self.all: list[Rule] = [Rule("", "kept", None)]
        self.selection = selection
        self.no_prediction = self._new("no_prediction", "no_prediction", None)
        numbered = list(enumerate(selection.exclude))
        self.patterns = [
            Pattern(each.field, each.pattern, self._new("exclude", "excluded_pattern", f"selection.exclude[{number}]"))
            for number, each in numbered
            if each.pattern is not None
        ]
        self.targets = {
            self._new("exclude", "excluded_target", f"selection.exclude[{number}]"): each
            for number, each in numbered
            if each.target is not None
        }
        keep = selection.keep
        self.min_value = self._key("threshold", "below_min_value", "keep.min_value", keep.min_value)
        self.min_percentile = self._key("threshold", "below_percentile", "keep.min_percentile", keep.min_percentile)
        self.near_duplicate = self._key("near_duplicates", "near_duplicate", "near_duplicates",
                                        selection.near_duplicates)  # fmt: skip
        self.not_sampled = self._key("sample", "not_sampled", "sample", selection.sample)
        self.source_groups, self.label_groups = None, None
        if selection.per_source is not None:
            self.source_groups = SourceGroups.of(uris, selection.per_source, sources, self._new)
        if selection.per_label is not None:
            self.label_groups = LabelGroups.of(selection.per_label, self._new)
        self._budget = {
            name: self._key("budget", f"over_{name}", f"keep.{name}", getattr(keep, name))
            for name in ("rows", "fraction", "tokens")
        }

    def _new(self, step: str, reason: str, rule: str | None) -> int:
        self.all.append(Rule(step, reason, rule))
        return len(self.all) - 1

    def _key(self, step: str, reason: str, key: str, value: Any) -> int:
        """The number of a rule that is there where its key is set."""
        return KEPT if value is None else self._new(step, reason, f"selection.{key}")

    @property
    def unit(self) -> Unit:
        """What fractions of quotas are of."""
        return "rows" if self.selection.keep.tokens is None else "tokens"

    @property
    def partitions(self) -> list[Partition]:
        """Groups with bounds, when all rows were seen."""
        return [groups.partition for groups in (self.source_groups, self.label_groups) if groups is not None]

    def limits(self, rows: int) -> list[Limit]:
        """The budget, of so many rows in all."""
        keep, codes = self.selection.keep, self._budget
        found = []
        if keep.rows is not None:
            found.append(Limit(codes["rows"], "rows", keep.rows, "selection.keep.rows"))
        if keep.fraction is not None:
            # in decimal, as it was written: 0.29 of 100 rows are 29, and 28 in binary floating point
            most = int(Fraction(str(keep.fraction)) * rows)
            found.append(Limit(codes["fraction"], "rows", most, "selection.keep.fraction"))
        if keep.tokens is not None:
            found.append(Limit(codes["tokens"], "tokens", keep.tokens, "selection.keep.tokens"))
        return found


class Tally:
    """Rows and tokens by the number of the rule that decided."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.rows, self.tokens = (np.zeros(len(rules.all), np.int64) for _ in range(2))

    def add(self, codes: npt.NDArray[np.uint16], tokens: npt.NDArray[np.int32]) -> None:
        """What was decided on some rows."""
        self.rows += np.bincount(codes, minlength=len(self.rows))
        self.tokens += np.bincount(codes, weights=tokens, minlength=len(self.rows)).astype(np.int64)

    def reasons(self) -> dict[str, int]:
        """Rows by reason, the most first."""
        counts: dict[str, int] = {}
        for rule, rows in zip(self._rules.all, self.rows.tolist(), strict=True):
            if rows:
                counts[rule.reason] = counts.get(rule.reason, 0) + rows
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def steps(self) -> list[dict[str, Any]]:
        """What each rule took, those that took nothing included, in their order."""
        counted = zip(self._rules.all, self.rows.tolist(), self.tokens.tolist(), strict=True)
        return [
            {"step": rule.step, "reason": rule.reason, "rule": rule.rule, "rows": rows, "tokens": tokens}
            for rule, rows, tokens in list(counted)[1:]
        ]

    def text(self) -> str:
        """Why rows went, in one line."""
        went = [
            f"{rows:,} {rule.reason}" + (f" ({rule.rule})" if rule.rule else "")
            for rule, rows in zip(self._rules.all[1:], self.rows.tolist()[1:], strict=True)
            if rows
        ]
        return ", ".join(went) or "there are none"
