"""The report of a run: one HTML page that stands alone.

    runs/<run_id>/report.html

Reads only what the run left in the store: `run.json`, `decisions.parquet` (aggregated, never held),
`examples.json` and the rejected rows. What a run does not have (a failed run has no decisions, a run without
targets no attribution) is left out, and the page says so.

The page opens offline, holds no script and loads nothing: its content security policy forbids both. All text
goes through `visible` and Jinja2's escaping; charts are SVG from `rise_ops.charts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from rise_ops import charts
from rise_ops.report_data import DecisionFigures, Histogram, SourceFigures, decision_figures
from rise_ops.runs import read_run
from rise_ops.store import Store
from rise_ops.visible import visible

REJECTED_SHOWN = 50
QUERIES_SHOWN = 40
"""Attributed queries on the page; the run's `examples.json` holds a few of each target."""
REFERENCES_SHOWN = 20
"""Inputs or outputs listed of one stage."""
TEXT_SHOWN = 1_200
"""Characters of a row's text."""

_TEMPLATES = Path(__file__).parent / "templates"

Json = dict[str, Any]


def report_key(run_id: str) -> str:
    """Key of a run's report."""
    return f"runs/{run_id}/report.html"


def render_report(store: Store, run_id: str) -> str:
    """The report of a run as an HTML page.

    Raises
    ------
    ConfigError
        The store has no such run.
    """
    run = read_run(store, run_id)
    figures = _decisions(store, run_id)
    examples = _optional_json(store, f"runs/{run_id}/examples.json")
    prefix = _common_folder([item.uri for item in figures.sources]) if figures else ""
    page = _environment().get_template("report.html.j2")
    return page.render(
        run=run,
        store_uri=store.uri,
        figures=figures,
        prefix=prefix,
        charts=_charts(run, figures, prefix),
        examples=examples,
        queries=examples.get("queries", [])[:QUERIES_SHOWN],
        evaluations=_evaluations(examples.get("evaluation")),
        rejected=_rejected(store, run_id),
        config=yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True),
        limits={"text": TEXT_SHOWN, "rejected": REJECTED_SHOWN, "references": REFERENCES_SHOWN},
    )


def write_report(store: Store, run_id: str) -> str:
    """Render the report and put it into the store. Returns its URI.

    A report that is already there stays as it is: nothing in the store is overwritten.
    """
    key = report_key(run_id)
    if not store.exists(key):
        store.create(key, render_report(store, run_id).encode("utf-8"))
    return store.url(key)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # a failed run's record lacks what it did not reach
        finalize=_readable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": _count,
        "signed": _signed,
        "weight": lambda number: f"{number:+g}".replace("-", "−"),
        "percent": _percent,
        "duration": _duration,
        "moment": _moment,
        "short": _short,
        "clip": _clip,
        "unprefixed": lambda uri, prefix: str(uri).removeprefix(prefix) or str(uri),
    }
    return environment


def _readable(value: Any) -> Any:
    """Applied to everything that a template prints; escaping follows."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _decisions(store: Store, run_id: str) -> DecisionFigures | None:
    key = f"runs/{run_id}/decisions.parquet"
    if not store.exists(key):
        return None
    return store.collected(key, lambda: decision_figures(store.scan_parquet([key])))


def _optional_json(store: Store, key: str) -> Json:
    return store.get_json(key) if store.exists(key) else {}


def _rejected(store: Store, run_id: str) -> Json | None:
    """Counts by error class and the first rejected rows."""
    key = f"quarantine/{run_id}/rejected.parquet"
    if not store.exists(key):
        return None
    rows = store.scan_parquet([key])
    classes = rows.group_by("error").len().sort("len", "error", descending=[True, False])
    counted = store.collected(key, lambda: classes.collect(engine="streaming"))
    first = store.collected(key, lambda: rows.head(REJECTED_SHOWN).collect(engine="streaming"))
    return {
        "total": int(counted["len"].sum()),
        "classes": list(counted.iter_rows()),
        "rows": list(first.iter_rows(named=True)),
    }


def _evaluations(evaluation: Any) -> list[tuple[str, Json]]:
    """One evaluation, or one for each target, as pairs of title and figures."""
    if not isinstance(evaluation, Mapping) or not evaluation:
        return []
    if "top_k" in evaluation:
        evaluation = {str(evaluation.get("target") or ""): evaluation}
    return [(name, {**found, "top_k": _by_k(found)}) for name, found in evaluation.items() if "top_k" in found]


def _by_k(found: Mapping[str, Any]) -> dict[str, Json]:
    """JSON sorts K as text; people read it as a number."""
    return dict(sorted(found["top_k"].items(), key=lambda item: int(item[0])))


def _charts(run: Json, figures: DecisionFigures | None, prefix: str) -> dict[str, Any]:
    drawn: dict[str, Any] = {"targets": []}
    if figures and figures.value:
        drawn["value"] = _value_chart(figures.value, unit="value")
        drawn["targets"] = [
            (target, _value_chart(target, unit=f"score on {target.column}", height=200, wide=charts.HALF))
            for target in figures.targets
        ]
    if figures and figures.sources:
        drawn["sources"] = _source_chart(figures.sources, prefix)
        spread = [item for item in figures.sources if item.quantiles]
        drawn["spreads"] = _spread_chart(spread, prefix) if spread else None
    if run.get("stages"):
        drawn["stages"] = _stage_chart(run["stages"])
    return drawn


def _value_chart(histogram: Histogram, *, unit: str, height: int = 240, wide: int = charts.WIDE) -> Markup:
    summary = (
        f"Histogram of {unit} over {sum(histogram.kept):,} kept and {sum(histogram.dropped):,} dropped rows, "
        f"from {_signed(histogram.low)} to {_signed(histogram.high)}"
    )
    return charts.histogram(
        histogram.edges, histogram.kept, histogram.dropped, unit=unit, summary=summary, height=height, wide=wide
    )


def _source_chart(sources: tuple[SourceFigures, ...], prefix: str) -> Markup:
    items = [
        charts.Bar(
            item.uri.removeprefix(prefix) or item.uri,
            f"{item.kept:,} of {item.rows:,} kept",
            item.kept,
            item.rows - item.kept,
        )
        for item in sources
    ]
    return charts.bars(items, summary="Rows kept and dropped of each source; the table below has the figures")


def _spread_chart(sources: list[SourceFigures], prefix: str) -> Markup:
    items = [
        charts.Spread(item.uri.removeprefix(prefix) or item.uri, f"median {_signed(item.quantiles[2])}", item.quantiles)
        for item in sources
        if item.quantiles
    ]
    return charts.spreads(items, unit="value", summary="Spread of the value in each source, 5 % to 95 % of its rows")


def _stage_chart(stages: list[Json]) -> Markup:
    items = [
        charts.Bar(
            str(stage.get("name")),
            _duration(stage.get("seconds")) + (" · from cache" if stage.get("cached") else ""),
            float(stage.get("seconds") or 0.0),
            muted=bool(stage.get("cached")),
        )
        for stage in stages
    ]
    return charts.bars(items, summary="Time of each stage; the table below has the figures")


def _common_folder(uris: list[str]) -> str:
    """The longest folder that all URIs begin with, or nothing for a single one."""
    if len(uris) < 2:
        return ""
    shared = next((n for n, letters in enumerate(zip(*uris, strict=False)) if len(set(letters)) > 1), 0)
    return uris[0][: uris[0].rfind("/", 0, shared) + 1]


def _count(value: Any) -> str:
    return "–" if not isinstance(value, int | float) else f"{value:,.0f}"


def _signed(value: Any) -> str:
    """A score with its sign and three digits that matter."""
    if not isinstance(value, int | float) or value != value:
        return "–"
    if value == 0:
        return "0"
    text = f"{abs(value):.3f}" if abs(value) >= 0.1 else f"{abs(value):.3g}"
    return f"{'−' if value < 0 else '+'}{text}"


def _percent(part: Any, whole: Any = 1) -> str:
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "–"
    share = 100 * part / whole
    return f"{share:.1f} %" if 0 < share < 99.95 and round(share, 1) != round(share) else f"{share:.0f} %"


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _moment(text: Any) -> str:
    try:
        return f"{datetime.fromisoformat(str(text)):%d %B %Y, %H:%M:%S} UTC"
    except ValueError:
        return "–"


def _short(identity: Any) -> str:
    return str(identity)[:12] if isinstance(identity, str) else "–"


def _clip(text: Any, characters: int) -> str:
    whole = str(text)
    if len(whole) <= characters:
        return whole
    return f"{whole[:characters]} … ({len(whole) - characters:,} more characters)"
