"""Charts: well-formed drawings whose marks are where the numbers say."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from rise_ops.charts import (
    NARROW,
    WIDE,
    Ridge,
    Words,
    brief,
    curve,
    histogram,
    ridges,
    scatter,
    shortened,
    ticks,
    whiskers,
)

WORDS = Words("A </title> & title", "What it \x00 shows")
HOSTILE = "</text></svg><script>alert(1)</script>\u202e"


def drawings(chart: Markup) -> list[ElementTree.Element]:
    found = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", chart, flags=re.DOTALL)]
    for svg in found:
        title, desc = svg.findall("title") + svg.findall("desc")
        assert title.text == WORDS.title and desc.text == "What it ␀ shows"
        assert svg.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        width, height = (float(number) for number in svg.get("viewBox", "").split()[2:])
        for text in svg.iter("text"):
            assert 0 <= float(text.get("x", -1)) <= width and 0 <= float(text.get("y", -1)) <= height
    assert len({svg.findall("title")[0].get("id") for svg in found}) == len(found)
    return found


def paths(svg: ElementTree.Element, look: str) -> list[str]:
    return [path.get("d", "") for path in svg.iter("path") if path.get("class") == look]


def test_a_histogram_stacks_kept_rows_on_dropped_ones() -> None:
    wide, narrow = drawings(histogram([0, 1, 2], [4, 0], [2, 8], unit=HOSTILE, words=WORDS, cut=0.5))
    assert (wide.get("viewBox"), narrow.get("viewBox")) == (f"0 0 {WIDE} 240", f"0 0 {NARROW} 240")
    dropped, kept = (re.findall(r"V([\d.]+)", paths(wide, f"area {name}")[0]) for name in ("dropped", "kept"))
    foot = float(dropped[-1])
    heights = [foot - float(y) for y in dropped[:2]]
    assert heights[1] == pytest.approx(4 * heights[0], rel=0.01)
    assert foot - float(kept[0]) == pytest.approx(3 * heights[0], rel=0.01)  # 4 on top of 2
    assert kept[1] == dropped[1]
    assert len(paths(wide, "cut")) == 1
    assert any("<script>" in (text.text or "") for text in wide.iter("text"))


def test_ridges_name_each_group_and_scale_it_to_itself() -> None:
    items = [Ridge("a", "", [1, 2], [0, 0]), Ridge(HOSTILE, "1 %", [1_000, 2_000], [0, 0])]
    wide, _ = drawings(ridges([-1, 0, 1], items, unit="value", words=WORDS, cut=5.0))
    first, second = paths(wide, "area kept")
    rise = [[float(y) for y in re.findall(r"V([\d.]+)", path)] for path in (first, second)]
    assert rise[0][0] - rise[0][1] == pytest.approx(rise[1][0] - rise[1][1], abs=0.2)
    assert not paths(wide, "cut")  # out of sight
    assert len(paths(wide, "zero")) == 1


def test_a_curve_marks_where_the_run_is() -> None:
    wide, _ = drawings(curve([10, 20, 40], [3, 2, 1], [3, 2.5, 1.8], unit="tokens", here=20, mark="kept", words=WORDS))
    x = [float(at) for at in re.findall(r"[ML]([\d.]+)", paths(wide, "line")[0])]
    mark = float(re.findall(r"M([\d.]+)", paths(wide, "cut")[0])[0])
    assert mark == x[1] and x[2] - x[1] == pytest.approx(2 * (x[1] - x[0]), abs=0.2)


def test_a_scatter_tells_fates_by_shape_and_cuts_the_line_at_its_border() -> None:
    chart = scatter([(0, 0), (1, 1)], [(0.5, 0.2)], x="x", y="y", words=WORDS, line=(1, -1, 0))
    wide, narrow = drawings(chart)
    assert paths(wide, "points kept")[0].count("h0") == 2
    assert paths(wide, "points dropped")[0].count("l") == 2
    ends = [float(number) for number in re.findall(r"[\d.]+", paths(narrow, "cut")[0])]
    assert all(0 <= number <= 360 for number in ends)
    assert not paths(drawings(scatter([(0, 0), (1, 1)], [], x="x", y="y", words=WORDS, line=(1, 1, 9)))[0], "cut")


def test_whiskers_reach_one_error_to_either_side() -> None:
    wide, _ = drawings(whiskers([2, 1, 0], [0.5, 0.5, 0.5], [True, True, False], cut=0.5, words=WORDS))
    bars = re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)", paths(wide, "error kept")[0])
    spans = [float(low) - float(high) for low, high in bars]
    assert len(spans) == 2 and spans[0] == pytest.approx(spans[1], abs=0.2)
    assert float(bars[0][1]) < float(bars[1][1])


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0]])
def test_values_that_are_all_alike_can_be_drawn(values: list[float]) -> None:
    drawings(scatter([(value, value) for value in values], [], x="x", y="y", words=WORDS))
    drawings(histogram([-0.5, 0.5], [0], [0], unit="value", words=WORDS))
    drawings(curve([1] * len(values), values, values, unit="rows", here=1, mark="kept", words=WORDS))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 4e-7), (1e9, 3.3e9), (-0.31, -0.3)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 3 <= len(found) <= 9 and low - 1e-9 * abs(low) <= found[0] <= found[-1] <= high + 1e-9 * abs(high)
    assert all(len(brief(at).lstrip("−")) <= 8 for at in found)


def test_a_long_name_keeps_its_ends() -> None:
    assert shortened("abcdefghij", 7) == "ab…ghij" and shortened("abc", 7) == "abc"
