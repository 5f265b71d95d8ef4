"""The report's section on a closed loop: what training on each arm's rows did to the held-out losses.

All from `closed_loop` of the run's record (`rise_ops.closed_loop.compare_results`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from rise_ops import charts
from rise_ops.report_text import count, signed

ARMS = {
    "rise": "the highest value",
    "lowest": "the lowest value",
    "random": "by chance",
    "bm25": "words of the queries (BM25)",
    "length": "the most tokens",
}
"""What each arm takes first."""

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference."""

    mean: float
    span: tuple[float, float] | None
    """Its 95 % interval; None with one seed."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.span is not None and not self.span[0] <= 0 <= self.span[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One arm on one set of texts."""

    arm: str
    meaning: str
    tokens: int
    figure: float
    """Loss in nats a token, or accuracy."""
    change: Difference
    against_random: Difference | None
    over_texts: Difference | None
    """The same text by text; None without random, and of accuracies."""
    lower: str
    """On how many texts it is lower."""


@dataclass(frozen=True, slots=True)
class TextSet:
    """All arms on one set of texts, the best one first."""

    name: str
    untrained: float
    is_judged: bool
    rows: list[Row]
    chart: Markup | None


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What the section shows."""

    tokens: int
    seeds: int
    verdicts: list[tuple[str, str]]
    """(held-out set, sentences)"""
    held_out: list[TextSet]
    choices: list[TextSet]


def closed_loop_view(found: Json | None) -> ClosedLoop | None:
    """The section's content; None without a loop, or with one that did not come to its end."""
    if not found or "arms" not in found:
        return None
    judged = list(found["judged"])
    names = sorted(found["base"]["held_out"], key=lambda name: name not in judged)
    return ClosedLoop(
        tokens=found["tokens"],
        seeds=found["seeds"],
        verdicts=[(each["held_out"], each["text"]) for each in found["verdict"]],
        held_out=[_held_out(found, name, is_judged=name in judged) for name in names],
        choices=[_choices(found, name) for name in ("acc", "acc_norm") if found["base"]["choices"]],
    )


def _held_out(found: Json, name: str, *, is_judged: bool) -> TextSet:
    rows = sorted(
        (_row(arm, line, line["held_out"][name]) for arm, line in found["arms"].items()), key=lambda row: row.figure
    )
    values = {arm: line["held_out"][name]["change"]["values"] for arm, line in found["arms"].items()}
    items = [
        charts.Interval(f"{row.arm}: {row.meaning}", signed(row.change.mean), row.change.mean, row.change.span,
                        values[row.arm])
        for row in rows
    ]  # fmt: skip
    told = "; ".join(f"{row.arm} {signed(row.change.mean)}{_span(row.change)}" for row in rows)
    words = charts.Words(
        f"Change of the loss on {name} by arm",
        f"Against the untrained model's {found['base']['held_out'][name]:.3f}, in nats a token, mean of "
        f"{count(found['seeds'])} seeds: {told}.",
    )
    chart = charts.intervals(items, unit=f"change of the loss on {name}, nats a token", words=words)
    return TextSet(name, found["base"]["held_out"][name], is_judged, rows, chart)


def _choices(found: Json, name: str) -> TextSet:
    rows = [_row(arm, line, line["choices"][name]) for arm, line in found["arms"].items()]
    return TextSet(name, found["base"]["choices"][name], False, sorted(rows, key=lambda row: -row.figure), None)


def _row(arm: str, line: Json, own: Json) -> Row:
    against, texts = own["against_random"], own.get("over_texts")
    return Row(
        arm=arm,
        meaning=ARMS[arm],
        tokens=line["tokens"],
        figure=own["loss"] if "loss" in own else own["accuracy"],
        change=_difference(own["change"]),
        against_random=None if against is None else _difference(against),
        over_texts=None if texts is None else _difference(texts),
        lower="" if texts is None else f"lower on {count(texts['lower'])} of {count(texts['texts'])}",
    )


def _difference(found: Json) -> Difference:
    return Difference(found["mean"], None if found["low"] is None else (found["low"], found["high"]))


def _span(found: Difference) -> str:
    return "" if found.span is None else f" ({signed(found.span[0])} to {signed(found.span[1])})"
