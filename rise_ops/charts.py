"""Charts of the report: Matplotlib figures as SVG that lives inside a page.

A chart is drawn twice, for wide and for narrow screens, and the page's style sheet shows the one that fits.
Text stays text (searchable, in the page's font). Colours are placeholders that become CSS variables, so a
chart follows the reader's light or dark preference. Nothing in the result refers to anything outside it.

Labels may hold any text: Matplotlib's formula syntax is off, control characters are made visible, and
Matplotlib escapes markup.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from rise_ops.visible import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, HALF, NARROW = 960, 460, 340
"""Widths of drawings in CSS pixels: across the page, in two columns, on a phone."""

_KEPT, _DROPPED, _TEXT, _FAINT, _GRID = "#01a001", "#02a002", "#03a003", "#04a004", "#05a005"
_VARIABLES = {
    _KEPT: "var(--kept)",
    _DROPPED: "var(--dropped)",
    _TEXT: "var(--text)",
    _FAINT: "var(--faint)",
    _GRID: "var(--line)",
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 13.0,
    "axes.edgecolor": _GRID,
    "axes.unicode_minus": True,
}
_ROW = 38
"""Height of a labelled bar."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One labelled bar: a part that counts and a rest."""

    label: str
    note: str
    part: float
    rest: float = 0.0
    muted: bool = False


@dataclass(frozen=True, slots=True)
class Spread:
    """Five quantiles of a group: 5 %, 25 %, 50 %, 75 %, 95 %."""

    label: str
    note: str
    quantiles: tuple[float, float, float, float, float]


def histogram(edges: Sequence[float], kept: Sequence[int], dropped: Sequence[int], *, unit: str, summary: str,
              height: int = 230, wide: int = WIDE) -> Markup:  # fmt: skip
    """Counts of kept rows stacked on dropped ones.

    Parameters
    ----------
    edges
        Ascending bin edges, one more than bins.
    kept, dropped
        Rows in each bin.
    unit
        What the horizontal axis shows.
    summary
        The chart in words, for those who do not see it.
    height, wide
        Of the wide drawing, in CSS pixels.
    """

    def draw(axes: Axes, width: int) -> None:
        total = [above + below for above, below in zip(kept, dropped, strict=True)]
        axes.stairs(total, edges, baseline=dropped, fill=True, color=_KEPT, linewidth=0)
        axes.stairs(dropped, edges, fill=True, color=_DROPPED, linewidth=0)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(0, max(total, default=1) * 1.05 or 1)
        if edges[0] < 0 < edges[-1]:
            axes.axvline(0, color=_FAINT, linewidth=1, linestyle=(0, (3, 3)))
        axes.set_xlabel(visible(unit), color=_FAINT)
        axes.set_ylabel("rows", color=_FAINT)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value == int(value) else "")
        axes.locator_params(axis="x", nbins=9 if width == WIDE else 5)
        axes.locator_params(axis="y", nbins=4)
        axes.grid(axis="y", color=_GRID, linewidth=1)

    return _responsive(draw, height, summary, wide=wide)


def bars(items: Sequence[Bar], *, summary: str) -> Markup:
    """Horizontal bars, the label above each, the note at its right."""

    def draw(axes: Axes, width: int) -> None:
        total = max((item.part + item.rest for item in items), default=0.0) or 1.0
        axes.set_xlim(0, total)
        for number, item in enumerate(items):
            colour = _FAINT if item.muted else _KEPT
            axes.barh(number, item.part, height=0.3, color=colour, linewidth=0)
            axes.barh(number, item.rest, left=item.part, height=0.3, color=_DROPPED, linewidth=0)
            _label(axes, number, item.label, item.note, width)
        _rows(axes, len(items))
        axes.get_xaxis().set_visible(False)

    return _responsive(draw, _ROW * max(len(items), 1) + 8, summary)


def spreads(items: Sequence[Spread], *, unit: str, summary: str) -> Markup:
    """Quantiles of groups: thin line 5-95 %, thick line 25-75 %, dot at the median."""

    def draw(axes: Axes, width: int) -> None:
        low = min(item.quantiles[0] for item in items)
        high = max(item.quantiles[4] for item in items)
        margin = (high - low) * 0.03 or 0.01
        axes.set_xlim(low - margin, high + margin)
        for number, item in enumerate(items):
            first, lower, middle, upper, last = item.quantiles
            axes.hlines(number, first, last, color=_FAINT, linewidth=1.2)
            axes.hlines(number, lower, upper, color=_KEPT, linewidth=6)
            axes.plot([middle], [number], "o", color=_TEXT, markersize=5)
            _label(axes, number, item.label, item.note, width)
        if low < 0 < high:
            axes.axvline(0, color=_FAINT, linewidth=1, linestyle=(0, (3, 3)))
        _rows(axes, len(items))
        axes.set_xlabel(visible(unit), color=_FAINT)
        axes.locator_params(axis="x", nbins=9 if width == WIDE else 5)

    return _responsive(draw, _ROW * len(items) + 52, summary)


def shortened(text: str, characters: int) -> str:
    """`text` with its middle left out where it is longer; the ends tell names apart."""
    if len(text) <= characters:
        return text
    head = (characters - 1) // 3
    return f"{text[:head]}…{text[len(text) - (characters - 1 - head) :]}"


def _label(axes: Axes, row: int, label: str, note: str, width: int) -> None:
    room = (width - 20) // 8 - len(note) - 2
    texts = ((shortened(visible(label), max(room, 8)), 0, "left", _TEXT), (visible(note), 1, "right", _FAINT))
    for text, side, align, colour in texts:
        axes.annotate(
            text,
            (side, row),
            (0, 7),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha=align,
            va="bottom",
            color=colour,
        )


def _rows(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.6, -0.75)
    axes.get_yaxis().set_visible(False)
    axes.spines["bottom"].set_visible(False)


def _responsive(draw: Callable[[Axes, int], None], height: int, summary: str, *, wide: int = WIDE) -> Markup:
    drawings = [_drawing(draw, width, height, summary) for width in (wide, NARROW)]
    return Markup('<div class="chart"><div class="wide">{}</div><div class="narrow">{}</div></div>').format(*drawings)


def _drawing(draw: Callable[[Axes, int], None], width: int, height: int, summary: str) -> Markup:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelcolor=_FAINT)
        draw(axes, width)
        return _inline(figure, width, height, summary)


def _inline(figure: Figure, width: int, height: int, summary: str) -> Markup:
    """The figure's SVG element alone, without ids, namespaces, metadata and global styles."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = buffer.getvalue()
    body = body[body.index(">", body.index("<svg")) + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = _unique_ids(body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(visible(summary))}">'
    return Markup(head + re.sub(r"\s*\n\s*", "\n", body) + "</svg>")


def _unique_ids(body: str) -> str:
    """Keep only ids that something refers to, and make those differ from chart to chart."""
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    prefix = f"c{zlib.crc32(body.encode('utf-8')):08x}"
    names = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    body = re.sub(r' id="([^"]*)"', lambda match: f' id="{names[match[1]]}"' if match[1] in names else "", body)
    return re.sub(r'(url\(#|href="#)([^")]+)', lambda match: match[1] + names[match[2]], body)
