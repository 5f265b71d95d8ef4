"""Charts of the report: SVG that lives inside a page.

A chart is drawn twice, for wide and for narrow screens, and the page's style sheet shows the one that fits and
gives it its colours, so a chart follows the reader's light or dark preference. Text stays text, in the page's
font. What colour tells, shape tells too. All marks of a kind are one path: 1,500 points take 25 KB.

Each drawing is an image with a title and a description for those who do not see it; the figures themselves
stand in tables beside it. Labels may hold any text: it is made visible and escaped.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from rise_ops.visible import visible

WIDE, NARROW = 960, 340
"""Widths of drawings in CSS pixels: across the page, and on a phone or in a column."""
_LETTER = 7.2
"""Width of a character, about; text is 12.5 pixels high."""
_RIDGE = 56
"""Height of one group's histogram with its label."""
_STRIP = 46
"""Height of one mean with its interval and its label."""
_ARM = 2.8
"""Half a cross."""

Span = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Anchor = Literal["start", "middle", "end"]


@dataclass(frozen=True, slots=True)
class Words:
    """What a chart shows, for those who do not see it: its name and its content."""

    title: str
    description: str


@dataclass(frozen=True, slots=True)
class Ridge:
    """The histogram of one group among others."""

    label: str
    note: str
    kept: Sequence[int]
    dropped: Sequence[int]


@dataclass(frozen=True, slots=True)
class Place:
    """A named point among others."""

    number: int
    """Written where the name finds no room; a table beside the chart has it, too."""
    label: str
    x: float | None
    """Above 0; None: it has no place on the axis and stands at its left edge."""
    y: float
    strong: bool
    """A dot; otherwise a cross."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean among others, with where it may be."""

    label: str
    note: str
    mean: float
    span: Span | None
    """From where to where; None: not known."""
    values: Sequence[float]
    """Of which it is the mean."""


def histogram(edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int], *, unit: str, words: Words,
              cut: float | None = None, height: int = 240, wide: int = WIDE) -> Markup:  # fmt: skip
    """Counts of kept rows stacked on dropped ones.

    Parameters
    ----------
    edges
        Ascending bin edges, one more than bins.
    kept, dropped
        Rows in each bin.
    unit
        What the horizontal axis shows.
    cut
        Where a line is drawn.
    height, wide
        Of the wide drawing, in CSS pixels; `wide` may be NARROW.
    """
    total = [above + below for above, below in zip(kept, dropped, strict=True)]

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, height, x=(edges[0], edges[-1]), y=(0, 1.08 * max(total, default=0) or 1))
        to.rows_axis("rows", whole=True)
        to.columns_axis(unit)
        to.stairs(edges, [0] * len(total), dropped, "dropped")
        to.stairs(edges, dropped, total, "kept")
        to.zero_line()
        if cut is not None:
            to.mark(cut, "cut")
        return to

    return _responsive(draw, words, wide)


def ridges(edges: Sequence[float], items: Sequence[Ridge], *, unit: str, words: Words,
           cut: float | None = None) -> Markup:  # fmt: skip
    """Histograms of groups over one axis, each to its own scale: shapes and places compare, heights do not."""
    height = _RIDGE * len(items) + 52

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, height, x=(edges[0], edges[-1]), y=(len(items), 0), left=2)
        for number, item in enumerate(items):
            total = [above + below for above, below in zip(item.kept, item.dropped, strict=True)]
            foot, scale = number + 1.0, 0.6 / (max(total, default=0) or 1)
            middle = [foot - scale * rows for rows in item.dropped]
            to.stairs(edges, [foot] * len(total), middle, "dropped")
            to.stairs(edges, middle, [foot - scale * rows for rows in total], "kept")
            to.path(f"M{to.left} {to.down(foot):.1f}H{to.right}", "grid")
            room = int((width - 12) / _LETTER) - len(item.note) - 2
            to.text(to.left, to.down(number + 0.3), shortened(visible(item.label), max(room, 8)), "start", "name")
            to.text(to.right, to.down(number + 0.3), item.note, "end")
        to.columns_axis(unit)
        to.zero_line()
        if cut is not None:
            to.mark(cut)
        return to

    return _responsive(draw, words)


def curve(amounts: Sequence[float], value: Sequence[float], mean: Sequence[float], *, unit: str, here: float,
          mark: str, words: Words) -> Markup:  # fmt: skip
    """Value of the rows taken at each amount, and, dashed, the mean of all taken up to there.

    Parameters
    ----------
    amounts
        Taken so far, ascending.
    unit
        What they are.
    here, mark
        The amount at which a line is drawn, and what is written there.
    """

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, 290, x=(0, amounts[-1]), y=_padded([*value, *mean], 0.06))
        to.rows_axis("value")
        to.columns_axis(unit)
        to.line(amounts, mean, "mean")
        to.line(amounts, value, "line")
        to.mark(here, mark)
        return to

    return _responsive(draw, words)


def scatter(kept: Sequence[tuple[float, float]], dropped: Sequence[tuple[float, float]], *, x: str, y: str,
            words: Words, line: tuple[float, float, float] | None = None) -> Markup:  # fmt: skip
    """Rows by two scores: dots for kept ones, crosses for dropped ones.

    Parameters
    ----------
    line
        `(a, b, c)`: a line is drawn where a·x + b·y = c, as far as it is in sight.
    """
    points = [*kept, *dropped]

    def draw(width: int) -> _Drawing:
        across, up = (_padded([point[axis] for point in points], 0.03) for axis in (0, 1))
        to = _Drawing(width, 440 if width == WIDE else 360, x=across, y=up)
        to.rows_axis(y)
        to.columns_axis(x, grid=True)
        to.zero_line()
        to.points(dropped, "dropped")
        to.points(kept, "kept")
        if line is not None:
            to.straight(*line)
        return to

    return _responsive(draw, words)


def whiskers(values: Sequence[float], errors: Sequence[float], kept: Sequence[bool], *, cut: float,
             words: Words) -> Markup:  # fmt: skip
    """Values in order, each with one standard error to either side: dots kept, crosses dropped."""
    ends = [value + sign * error for value, error in zip(values, errors, strict=True) for sign in (-1, 1)]

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, 270, x=(-0.7, len(values) - 0.3), y=_padded(ends, 0.05))
        to.rows_axis("value")
        to.text((to.left + to.right) / 2, to.height - 8, "rows by falling value", "middle")
        step = 1 if width > NARROW else 2  # where there is no room, every second row
        for name, fate in (("dropped", False), ("kept", True)):
            places = [place for place in range(0, len(values), step) if kept[place] is fate]
            bars = [(to.across(p), to.down(values[p] - errors[p]), to.down(values[p] + errors[p])) for p in places]
            to.path("".join(f"M{at:.1f} {low:.1f}V{high:.1f}" for at, low, high in bars), f"error {name}")
            to.points([(place, values[place]) for place in places], name)
        to.path(f"M{to.left} {to.down(cut):.1f}H{to.right}", "cut")
        to.text(to.right, to.down(cut) - 5, "cut", "end", "name")
        return to

    return _responsive(draw, words)


def named(places: Sequence[Place], *, x: str, y: str, aside: str, words: Words) -> Markup:
    """Points with their names over a logarithmic axis.

    Parameters
    ----------
    aside
        What the left edge stands for.
    """
    powers = [math.log10(each.x) for each in places if each.x is not None] or [0.0]
    low, high = min(powers) - 0.3, max(powers) + 0.6
    edge = low - 0.16 * (high - low) if any(each.x is None for each in places) else low

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, 400 if width == WIDE else 340, x=(edge, high), y=_padded([each.y for each in places], 0.1))
        to.rows_axis(y)
        to.powers_axis(x, low, aside if edge < low else "")
        spots = [((edge + low) / 2 if each.x is None else math.log10(each.x), each.y) for each in places]
        for look, strong in (("dropped", False), ("kept", True)):
            to.points([spot for each, spot in zip(places, spots, strict=True) if each.strong is strong], look)
        to.names(places, spots, whole=width == WIDE)
        return to

    return _responsive(draw, words)


def intervals(items: Sequence[Interval], *, unit: str, words: Words) -> Markup:
    """Means over one axis, each with its interval and a tick for each value: dots below 0, crosses elsewhere."""
    height = _STRIP * len(items) + 52
    ends = [0.0, *(end for item in items for end in (*item.values, *(item.span or ())))]

    def draw(width: int) -> _Drawing:
        to = _Drawing(width, height, x=_padded(ends, 0.04), y=(len(items), 0), left=2)
        for number, item in enumerate(items):
            foot, look = to.down(number + 0.72), "kept" if item.mean < 0 else "dropped"
            to.path(f"M{to.left} {to.down(number + 1):.1f}H{to.right}", "grid")
            to.path(f"M{to.across(0):.1f} {foot - 8:.1f}v16", "zero")
            if item.span is not None:
                low, high = (to.across(end) for end in item.span)
                to.path(f"M{low:.1f} {foot - 5:.1f}v10m0-5H{high:.1f}m0-5v10", f"error {look}")
            ticks_ = (f"M{to.across(value):.1f} {foot - 3:.1f}v6" for value in item.values)
            to.path("".join(ticks_), f"error {look}")
            to.points([(item.mean, number + 0.72)], look)
            room = int((width - 12) / _LETTER) - len(item.note) - 2
            to.text(to.left, to.down(number + 0.38), shortened(visible(item.label), room), "start", "name")
            to.text(to.right, to.down(number + 0.38), item.note, "end")
        to.columns_axis(unit)
        return to

    return _responsive(draw, words)


def shortened(text: str, characters: int) -> str:
    """`text` with its middle left out where it is longer; the ends tell names apart."""
    if len(text) <= characters:
        return text
    head = (characters - 1) // 3
    return f"{text[:head]}…{text[len(text) - (characters - 1 - head) :]}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 (Heckbert, 1990).

    Examples
    --------
    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(-3, 47, 4)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(times for times, most in ((1, 1.5), (2, 3.5), (5, 7.5), (10, 10.1)) if rough < power * most)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) + 0.0 for number in range(first, last + 1)]


def brief(amount: float) -> str:
    """A number in few characters.

    Examples
    --------
    >>> [brief(amount) for amount in (0, -0.25, 950, 12_500, 3_000_000)]
    ['0', '−0.25', '950', '12.5k', '3M']
    """
    power, letter = next((pair for pair in _POWERS if abs(amount) >= pair[0]), (1.0, ""))
    return f"{amount / power:.4g}{letter}".replace("-", "−")


_POWERS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _padded(values: Sequence[float], share: float) -> Span:
    low, high = min(values), max(values)
    margin = (high - low) * share or abs(high) * share or 1.0
    return low - margin, high + margin


@dataclass(slots=True)
class _Drawing:
    """Marks on a plane of `x` and `y` (each from where to where), in a picture of `width` and `height` pixels."""

    width: int
    height: int
    x: Span
    y: Span
    left: int = 0
    """Of the plane, in pixels; 0: room for the labels of the rows' axis."""
    parts: list[Markup] = field(default_factory=list)

    @property
    def right(self) -> int:
        return self.width - 6

    @property
    def bottom(self) -> int:
        return self.height - 44

    def across(self, x: float) -> float:
        return self.left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (self.right - self.left)

    def down(self, y: float) -> float:
        top = 26 if self.y[1] > self.y[0] else 0
        return self.bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (self.bottom - top)

    def path(self, steps: str, look: str) -> None:
        if steps:
            self.parts.append(Markup('<path class="{}" d="{}"/>').format(look, steps))

    def text(self, x: float, y: float, words: str, anchor: Anchor, look: str = "") -> None:
        form = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
        self.parts.append(form.format(x, y, anchor, Markup(' class="{}"').format(look) if look else "", visible(words)))

    def rows_axis(self, name: str, *, whole: bool = False) -> None:
        """Lines and labels at round numbers of `y`; the axis' name above them."""
        numbers = [at for at in ticks(*self.y, max(2, self.height // 55)) if not whole or at == int(at)]
        labels = [brief(at) for at in numbers]
        self.left = round(max((len(label) for label in labels), default=0) * _LETTER) + 12
        for at, label in zip(numbers, labels, strict=True):
            self.path(f"M{self.left} {self.down(at):.1f}H{self.right}", "grid")
            self.text(self.left - 8, self.down(at) + 4, label, "end")
        self.text(0, 12, name, "start")

    def columns_axis(self, name: str, *, grid: bool = False) -> None:
        """Labels at round numbers of `x`; the axis' name below them."""
        for at in ticks(*self.x, max(3, (self.right - self.left) // (75 if self.width == NARROW else 105))):
            if grid:
                self.path(f"M{self.across(at):.1f} {self.bottom}V26", "grid")
            # a label in the middle of the picture's edge would be cut off
            room, here = len(brief(at)) * _LETTER / 2, self.across(at)
            self.text(min(max(here, room), self.width - room), self.bottom + 17, brief(at), "middle")
        self.text((self.left + self.right) / 2, self.height - 8, name, "middle")

    def powers_axis(self, name: str, low: float, aside: str) -> None:
        """Labels at powers of ten from 10^low on; what is left of it is called `aside`."""
        for power in range(math.ceil(low), math.floor(self.x[1]) + 1):
            self.path(f"M{self.across(power):.1f} {self.bottom}V26", "grid")
            self.text(self.across(power), self.bottom + 17, brief(10.0**power), "middle")
        self.text((self.left + self.right) / 2, self.height - 8, name, "middle")
        if aside:
            self.path(f"M{self.across(low):.1f} {self.bottom}V26", "zero")
            self.text(self.across((self.x[0] + low) / 2), self.bottom + 17, aside, "middle")

    def names(self, places: Sequence[Place], spots: Sequence[tuple[float, float]], *, whole: bool) -> None:
        """The name of each point beside it, or its number where a name would lie on another or on a point."""
        at = [(self.across(a), self.down(b)) for a, b in spots]
        taken = [(a - 5, b - 5, a + 5, b + 5) for a, b in at]
        for each, (a, b) in zip(places, at, strict=True):
            texts = [f"{each.number} {shortened(visible(each.label), 26)}"] if whole else []
            tried = [(text, box) for text in (*texts, str(each.number)) for box in _around(a, b, text)]
            free = (one for one in tried if self._inside(one[1]) and not any(_meet(one[1], other) for other in taken))
            text, box = next(free, tried[-4])
            taken.append(box)
            self.text(box[0], box[3] - 2, text, "start", "name" if each.strong else "")

    def _inside(self, box: Box) -> bool:
        return self.left <= box[0] and box[2] <= self.width and box[1] >= 14 and box[3] <= self.bottom

    def zero_line(self) -> None:
        if self.x[0] < 0 < self.x[1]:
            self.path(f"M{self.across(0):.1f} {self.bottom}V{self.down(self.y[1]):.1f}", "zero")
        if self.y[0] < 0 < self.y[1]:
            self.path(f"M{self.left} {self.down(0):.1f}H{self.right}", "zero")

    def mark(self, x: float, words: str = "") -> None:
        """A line from top to bottom where `x` is in sight, and what is written at its top."""
        if not self.x[0] <= x <= self.x[1]:
            return
        here, end = self.across(x), x > (self.x[0] + self.x[1]) / 2
        self.path(f"M{here:.1f} {self.bottom}V{min(self.down(self.y[0]), self.down(self.y[1])) - 12:.1f}", "cut")
        if words:
            self.text(here + (-6 if end else 6), 22, words, "end" if end else "start", "name")

    def stairs(self, edges: Sequence[float], low: Sequence[float], high: Sequence[float], look: str) -> None:
        """The area between two stairs."""
        there = [f"V{self.down(y):.1f}H{self.across(end):.1f}" for y, end in zip(high, edges[1:], strict=True)]
        back = [f"V{self.down(y):.1f}H{self.across(end):.1f}" for y, end in zip(low, edges[:-1], strict=True)]
        start = f"M{self.across(edges[0]):.1f} {self.down(low[0]):.1f}"
        self.path(f"{start}{''.join(there)}{''.join(reversed(back))}z", f"area {look}")

    def line(self, x: Sequence[float], y: Sequence[float], look: str) -> None:
        places = (f"{self.across(a):.1f} {self.down(b):.1f}" for a, b in zip(x, y, strict=True))
        self.path("M" + "L".join(places), look)

    def points(self, places: Iterable[tuple[float, float]], look: str) -> None:
        """Dots (strokes of no length with round ends) for what is kept, crosses for the rest."""
        arm, back = f"{_ARM}", f"{2 * _ARM}"
        shape = "h0" if look == "kept" else f"m-{arm}-{arm}l{back} {back}m0-{back}l-{back} {back}"
        steps = (f"M{self.across(a):.1f} {self.down(b):.1f}{shape}" for a, b in places)
        self.path("".join(steps), f"points {look}")

    def straight(self, a: float, b: float, c: float) -> None:
        """Where a·x + b·y = c, cut at the plane's borders."""
        ends = [(x, (c - a * x) / b) for x in self.x if b] + [((c - b * y) / a, y) for y in self.y if a]
        slack = 1e-9
        inside = sorted(
            {
                (round(x, 12), round(y, 12))
                for x, y in ends
                if all(low - slack <= at <= high + slack for at, (low, high) in ((x, self.x), (y, self.y)))
            }
        )
        if len(inside) > 1:
            self.line([inside[0][0], inside[-1][0]], [inside[0][1], inside[-1][1]], "cut")

    def svg(self, words: Words) -> Markup:
        body = Markup("").join(self.parts)
        name = f"c{zlib.crc32(f'{words.title}{self.width}{body}'.encode()):08x}"
        return Markup(
            '<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{name}t {name}d">'
            '<title id="{name}t">{}</title><desc id="{name}d">{}</desc>{}</svg>'
        ).format(self.width, self.height, visible(words.title), visible(words.description), body, name=name)


def _around(x: float, y: float, text: str) -> list[Box]:
    """Where a text can stand: right of a point, left of it, above, below."""
    long = _LETTER * len(text)
    starts = ((x + 8, y + 4), (x - 8 - long, y + 4), (x - long / 2, y - 9), (x - long / 2, y + 18))
    return [(left, foot - 11, left + long, foot + 2) for left, foot in starts]


def _meet(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def _responsive(draw: Callable[[int], _Drawing], words: Words, wide: int = WIDE) -> Markup:
    """For both widths, unless one is enough."""
    if wide == NARROW:
        return Markup('<div class="chart">{}</div>').format(draw(NARROW).svg(words))
    drawings = [draw(width).svg(words) for width in (wide, NARROW)]
    return Markup('<div class="chart"><div class="wide">{}</div><div class="narrow">{}</div></div>').format(*drawings)
