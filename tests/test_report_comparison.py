"""The report's section on a comparison: order, marks, what beats RISE, costs, and names that are no markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rise_ops.charts import Place, named
from rise_ops.report import render_report
from rise_ops.report_comparison import Comparison, comparison_view
from rise_ops.store import Store
from tests.test_charts import HOSTILE, WORDS, drawings, paths
from tests.test_report import RUN, Page, run_record

KS = (5, 10, 50)


def figures(auprc: tuple[float, float, float], *, auroc: float | None = 0.5, precision: float = 0.4) -> dict[str, Any]:
    top = {str(k): {"auprc": each, "auroc": auroc, "precision": precision} for k, each in zip(KS, auprc, strict=True)}
    return {"rows": 5_000, "positives": 438, "top_k": top}


def outcome(name: str, auprc: tuple[float, float, float] | None, **changes: Any) -> dict[str, Any]:
    """One run of a method, under two dilutions; the second halves its precision."""
    settings = {} if auprc is None else {"1": figures(auprc), "20": {**figures(auprc, precision=0.2), "positives": 22}}
    done = {
        "bytes_per_row": 49_152.0,
        "load_seconds": 1.0,
        "index_seconds": 90.0,
        "tokens_per_second": 1_500.0,
        "query_seconds": 2.0,
        "peak_bytes": 900 * 2**20,
        "loaded_bytes": 600 * 2**20,
        "settings": settings,
    }
    return {
        "name": name,
        "method": "bm25",
        "paper": "arXiv 2604.16197",
        "parameters": {},
        "seed": 0,
        "status": "infeasible" if auprc is None else "completed",
        "reason": None,
        "need": {"bytes": 64 * 2**20, "text": "a table"},
        "cached": False,
        **({} if auprc is None else done),
        **changes,
    }


def comparison(*methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "id": "c" * 64,
        "label": "label=backdoor",
        "k": list(KS),
        "targets": [],
        "rows": 5_000,
        "tokens": 600_000,
        "positives": {"backdoor": 438},
        "queries": 100,
        "dilute": [1.0],
        "memory": 8 * 2**30,
        "methods": list(methods),
        **changes,
    }


def view(*methods: dict[str, Any], **changes: Any) -> Comparison:
    found = comparison_view(comparison(*methods, **changes))
    assert found is not None
    return found


def page(tmp_path: Path, record: dict[str, Any]) -> str:
    store = Store(str(tmp_path))
    store.create_json(f"runs/{RUN}/run.json", run_record(name="compare", comparison=record, export=None))
    return render_report(store, RUN)


RISE = outcome("rise T 1", (0.9, 0.88, 0.8), method="rise")
NARROW = outcome("rise narrow", (0.95, 0.7, 0.6), method="rise", bytes_per_row=704.0)
LEXICAL = outcome("bm25", (0.91, 0.3, 0.2), bytes_per_row=120.0)
LARGE = outcome(
    "rapidin", None, reason="rapidin needs 19,000 MiB of working memory (gradients); limits.memory allows 8,192 MiB"
)


def test_nothing_without_a_comparison() -> None:
    assert comparison_view(None) is None


def test_lines_are_ordered_by_the_middle_k_and_runs_of_a_name_are_one() -> None:
    seeds = [outcome("trackstar", (each, each, each), seed=number) for number, each in enumerate((0.4, 0.5, 0.75))]
    found = view(LARGE, *seeds, LEXICAL, NARROW, RISE)
    lines = found.settings[0].lines
    assert [row.line.name for row in lines] == ["rise T 1", "rise narrow", "trackstar", "bm25", "rapidin"]
    assert [row.number for row in lines] == [1, 2, 3, 4, 5]
    assert [row.is_own for row in lines] == [True, True, False, False, False]
    cell = lines[2].cells[1]
    assert cell.mean == pytest.approx(0.55)
    assert (cell.low, cell.high, cell.has_range) == (0.4, 0.75, True)
    assert not lines[0].cells[0].has_range
    assert lines[4].cells == [] and found.completed == 4 and found.middle == 10


def test_the_best_of_each_column_is_marked_with_its_ties() -> None:
    auroc = outcome("no area", (0.1, 0.1, 0.1))
    for figure in auroc["settings"]["1"]["top_k"].values():
        figure["auroc"] = None
    found = view(RISE, NARROW, outcome("as good", (0.9, 0.8801, 0.1)), auroc).settings[0].lines
    best = {row.line.name: [cell.is_best for cell in row.cells] for row in found}
    assert best["rise T 1"][:3] == [False, True, True]
    assert best["as good"][:3] == [False, True, False]
    assert best["rise narrow"][:3] == [True, False, False]
    assert best["no area"] == [False, False, False, True, True, True, False, False, False]
    assert next(row for row in found if row.line.name == "no area").cells[6].mean is None


def test_what_beats_rise_is_said_at_each_k() -> None:
    found = view(RISE, NARROW, LEXICAL, outcome("loss", (0.95, 0.2, 0.81)))
    assert found.settings[0].verdict == [
        "Held against rise T 1, the best RISE line at K = 10, by auPRC.",
        "At K = 5 (0.900) better: loss by 0.050, bm25 by 0.010.",
        "At K = 50 (0.800) better: loss by 0.010.",
        "At K = 10 no other method is better.",
    ]


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ((RISE, outcome("bm25", (0.1, 0.2, 0.3))), "rise T 1, the best RISE line at K = 10: no other method"),
        ((RISE, outcome("as good", (0.9, 0.8803, 0.8))), "no other method has a higher auPRC"),
        ((RISE, LARGE), "No other method has figures"),
        ((LEXICAL, LARGE), "RISE has no figures here"),
    ],
)
def test_what_cannot_be_said_is_not(methods: tuple[dict[str, Any], ...], told: str) -> None:
    (sentence,) = view(*methods).settings[0].verdict
    assert told in sentence


def test_a_method_that_does_not_fit_stays_with_its_reason(tmp_path: Path) -> None:
    broken = outcome("half", None, status="failed", reason="it fell over")
    text = Page(page(tmp_path, comparison(RISE, LEXICAL, LARGE, outcome("half", (0.1, 0.1, 0.1)), broken))).text
    assert "infeasible rapidin needs 19,000 MiB of working memory" in text
    assert "half : not all seeds completed. it fell over" in text
    assert re.search(r"Compared 4 methods on 5,000 rows and 100 queries\s?; 1 of them could not run", text)
    assert "This run made no decisions" not in text


def test_costs_are_told(tmp_path: Path) -> None:
    stored = outcome("last layer", (0.2, 0.2, 0.2), bytes_per_row=None, tokens_per_second=None, cached=True)
    html = page(tmp_path, comparison(RISE, stored))
    costs = html.split('aria-label="Costs of each method"')[1].split("</table>")[0]
    cells = [[re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
             for row in costs.split("<tr")[2:]]  # fmt: skip
    assert cells[0] == ["1", "rise T 1 RISE", "arXiv 2604.16197", "49,152", "1 min 30 s", "1,500", "2.00 s", "900",
                        "300", "64"]  # fmt: skip
    assert cells[1][3] == "0" and cells[1][5] == "–"
    assert "Measured by an earlier run: <bdi>last layer</bdi>." in html


def test_the_chart_has_every_completed_method_and_none_else(tmp_path: Path) -> None:
    chart = view(RISE, NARROW, LEXICAL, LARGE, outcome("random", (0.1, 0.1, 0.1), bytes_per_row=None)).chart
    assert chart is not None
    assert "rise T 1: 0.880, 49,152 bytes" in chart and "random: 0.100, nothing stored" in chart
    assert "rapidin" not in chart
    wide, narrow = re.findall(r"<svg.*?</svg>", chart, flags=re.DOTALL)
    assert ">2 rise narrow<" in wide and ">2<" in narrow and ">2 rise narrow<" not in narrow
    assert len(re.findall(r"h0", re.findall(r'class="points kept" d="([^"]*)"', wide)[0])) == 2
    assert view(LARGE).chart is None


def test_places_are_logarithmic_and_names_stay_apart() -> None:
    places = [Place(number, f"method {number}", 10.0**number, 0.5, strong=True) for number in (2, 3, 4)]
    crowd = [Place(number, HOSTILE, None, 0.1, strong=False) for number in (5, 6)]
    for svg in drawings(named([*places, *crowd], x="bytes", y="auPRC", aside="0", words=WORDS)):
        spots = re.findall(r"M([\d.]+) ([\d.]+)h0", paths(svg, "points kept")[0])
        across = [float(x) for x, _ in spots]
        assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)
        labels = {text.text: text for text in svg.iter("text")}
        for power, name in enumerate(("100", "1k", "10k")):
            assert float(labels[name].get("x", 0)) == pytest.approx(across[power], abs=0.1)
        crosses = re.findall(r"M([\d.]+) ", paths(svg, "points dropped")[0])
        assert all(float(x) < across[0] for x in crosses)
    wide, _ = drawings(named(places, x="bytes", y="auPRC", aside="0", words=WORDS))
    assert [text.text for text in wide.iter("text") if text.get("class") == "name"] == [
        "2 method 2", "3 method 3", "4 method 4",
    ]  # fmt: skip


def test_dilutions_have_a_table_and_their_own_figures(tmp_path: Path) -> None:
    found = view(RISE, LEXICAL, LARGE, dilute=[20.0, 1.0])
    assert [setting.dilution for setting in found.settings] == [1.0, 20.0]
    assert [setting.positives for setting in found.settings] == [438, 22]
    assert [(row.line.name, [cell.mean for cell in cells]) for row, cells in found.diluted] == [
        ("rise T 1", [0.4, 0.2]),
        ("bm25", [0.4, 0.2]),
    ]
    text = Page(page(tmp_path, comparison(RISE, LEXICAL, LARGE, dilute=[1.0, 20.0]))).text
    assert "20 times fewer" in text and "22 of 5,000" in text
    assert view(RISE, LEXICAL).diluted == []


def test_names_and_reasons_are_no_markup(tmp_path: Path) -> None:
    hostile = outcome(HOSTILE, (0.95, 0.95, 0.95), paper=HOSTILE)
    failed = outcome(f"x{HOSTILE}", None, status="failed", reason=f"met {HOSTILE} {{{{ 7*7 }}}}")
    html = page(tmp_path, comparison(hostile, failed, RISE, label=HOSTILE, dilute=[1.0, 20.0]))
    found = Page(html)
    assert found.open == []
    assert not [tag for tag, _ in found.tags if tag == "script"]
    assert "\u202e" not in html and "{{ 7*7 }}" in found.text
    headings = [attributes for tag, attributes in found.tags if tag == "section"]
    assert [each["id"] for each in headings] == ["comparison", "run", "lineage", "reading"]
