"""The report of a run: one HTML page that stands alone, on which a person decides.

    runs/<run_id>/report.html

Reads only what the run left in the store: `run.json`, `decisions.parquet` (aggregated, never held),
`examples.json` and the rejected rows. What a run does not have (a failed run has no decisions, a run without
targets no attribution) is left out, and the page says so.

The page opens offline, holds no script and loads nothing: its content security policy forbids both. All text
goes through `visible` and Jinja2's escaping; charts are SVG from `rise_ops.charts`. Each section is a template
of its own in `templates/sections`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import polars as pl
import yaml
from markupsafe import Markup

from rise_ops import report_charts as drawn
from rise_ops.report_budgets import Budgets, Unit, other_budgets
from rise_ops.report_closed_loop import closed_loop_view
from rise_ops.report_comparison import FIGURES, comparison_view
from rise_ops.report_data import NO_LABEL, DecisionFigures, decision_figures
from rise_ops.report_notices import notices
from rise_ops.report_rows import (
    Beside,
    NearDuplicateGroups,
    Plane,
    beside_the_cut,
    contrast,
    near_duplicate_groups,
    plane,
)
from rise_ops.report_steps import REASONS, Step, selection_steps
from rise_ops.report_text import FILTERS
from rise_ops.row_groups import source_name
from rise_ops.runs import read_run
from rise_ops.store import Store
from rise_ops.visible import visible

REJECTED_SHOWN = 50
QUERIES_SHOWN = 15
"""Attributed queries on the page, as many of each target; the run's `examples.json` holds more."""
REFERENCES_SHOWN = 20
"""Inputs or outputs listed of one stage."""
TEXT_SHOWN = 1_000
"""Characters of a row's text."""
HIT_SHOWN = 600
"""Characters of the text of a query's hit: there are many."""
SHARES_SHOWN = 4
"""Sources and labels whose shares are shown at other budgets."""
_TEMPLATES = Path(__file__).parent / "templates"

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decided:
    """All that the page shows of a run's decisions."""

    figures: DecisionFigures
    budgets: Budgets | None
    plane: Plane | None
    beside: Beside | None
    duplicates: NearDuplicateGroups | None


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
    decided = _decisions(store, run)
    figures = decided.figures if decided else None
    examples = _optional_json(store, f"runs/{run_id}/examples.json")
    rejected = _rejected(store, run_id)
    prefix = _common_folder(figures.sources.names) if figures else ""
    shown = {
        "run": run,
        "store_uri": store.uri,
        "decided": decided,
        "figures": figures,
        "by_value": _by_value(run),
        "prefix": prefix,
        "charts": _charts(run, decided, prefix) if decided else {},
        "steps": _steps(run, figures) if figures else [],
        "notices": notices(run, figures, rejected["total"] if rejected else 0),
        "reasons": REASONS,
        "sketch": _sketch(run),
        "stability": (run.get("selection") or {}).get("stability"),
        "examples": examples,
        "queries": _queries(examples.get("queries") or []),
        "evaluations": _evaluations(examples.get("evaluation")),
        "rejected": rejected,
        "comparison": comparison_view(run.get("comparison")),
        "comparison_figures": FIGURES,
        "closed_loop": closed_loop_view(run.get("closed_loop")),
        "stage_shares": drawn.stage_shares(run.get("stages") or []),
        "config": yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True),
        "limits": {"text": TEXT_SHOWN, "hit": HIT_SHOWN, "rejected": REJECTED_SHOWN, "references": REFERENCES_SHOWN},
    }
    return _environment().get_template("report.html.j2").render(**shown, contents=_contents(shown))


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
    environment.filters |= FILTERS
    return environment


def _readable(value: Any) -> Any:
    """Applied to everything that a template prints; escaping follows."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _contents(shown: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Sections of the page, each with its title in the list of contents."""
    decided, examples = shown["decided"], shown["examples"]
    sections = [
        ("verdict", "Verdict", decided or not shown["comparison"]),
        ("comparison", "Comparison", shown["comparison"]),
        ("closed_loop", "Closed loop", shown["closed_loop"]),
        ("steps", "What decided", decided),
        ("budgets", "Other budgets", decided and decided.budgets),
        ("values", "Values and scores", shown["charts"].get("value")),
        ("groups", "Sources and labels", decided),
        ("stability", "Stability", shown["stability"] or (decided and decided.beside)),
        ("cut", "Next to the cut", (examples.get("cut") or {}).get("dropped")),
        ("rows", "Best and worst", examples.get("best") or examples.get("worst")),
        ("rules", "What rules took", examples.get("dropped")),
        ("duplicates", "Near-duplicates", decided and decided.duplicates),
        ("attribution", "Attribution", shown["queries"]),
        ("evaluation", "Evaluation", shown["evaluations"]),
        ("rejected", "Rejected rows", shown["rejected"]),
        ("run", "The run", True),
        ("lineage", "Lineage", True),
        ("reading", "How to read", True),
    ]
    return [(name, title) for name, title, there in sections if there]


def _by_value(run: Json) -> bool:
    """Whether rows were taken by falling value, not by chance or distance."""
    selection = (run.get("config") or {}).get("selection") or {}
    return not (selection.get("sample") or selection.get("diversity"))


def _weights(run: Json) -> dict[str, float]:
    config = run.get("config") or {}
    return config.get("value") or dict.fromkeys(config.get("targets") or {}, 1.0)


def _decisions(store: Store, run: Json) -> Decided | None:
    key = f"runs/{run['run_id']}/decisions.parquet"
    if not store.exists(key):
        return None
    return store.collected(key, lambda: _decided(store.scan_parquet([key]), run))


def _decided(decisions: pl.LazyFrame, run: Json) -> Decided:
    selection = (run.get("config") or {}).get("selection") or {}
    source = _source(decisions, run.get("config") or {})
    figures = decision_figures(decisions, source=source)
    keep = selection.get("keep") or {}
    unit: Unit = "rows" if keep.get("rows") or keep.get("fraction") else "tokens"
    groups = {"sources": (source, figures.sources.names[:SHARES_SHOWN])}
    if figures.labels:
        groups["labels"] = (pl.col("label").fill_null(NO_LABEL), figures.labels.names[:SHARES_SHOWN])
    pair = contrast(_weights(run), [found.column for found in figures.targets])
    return Decided(
        figures,
        other_budgets(decisions, figures.cut, unit=unit, groups=groups) if figures.value else None,
        plane(decisions, *pair) if pair else None,
        beside_the_cut(decisions, figures.cut) if _by_value(run) else None,
        near_duplicate_groups(decisions),
    )


def _source(decisions: pl.LazyFrame, config: Json) -> pl.Expr:
    """What the selection's quotas take for a source."""
    uri, by = pl.col("source_uri"), ((config.get("selection") or {}).get("per_source") or {}).get("by", "object")
    if by == "object":
        return uri
    uris = decisions.select(uri.unique()).collect(engine="streaming")["source_uri"].to_list()
    patterns = (config.get("corpus") or {}).get("sources") or []
    return uri.replace_strict(uris, [source_name(each, by, patterns) for each in uris], return_dtype=pl.String)


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


def _sketch(run: Json) -> Json:
    """What the index was made with: what was chosen takes the place of what was configured."""
    chosen = (run.get("tuning") or {}).get("chosen") or {}
    return {**((run.get("config") or {}).get("sketch") or {}), **chosen}


def _steps(run: Json, figures: DecisionFigures) -> list[Step]:
    recorded = (run.get("selection") or {}).get("steps") or ()
    return selection_steps(run.get("config") or {}, figures, recorded)


def _queries(queries: Sequence[Json]) -> list[Json]:
    """As many of each target, in order."""
    targets = list(dict.fromkeys(query["target"] for query in queries))
    each = max(1, QUERIES_SHOWN // max(1, len(targets)))
    return [query for name in targets for query in [one for one in queries if one["target"] == name][:each]]


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


def _charts(run: Json, decided: Decided, prefix: str) -> Json:
    figures = decided.figures
    found: Json = {}
    if figures.value:
        found["value"] = drawn.value_chart(figures.value, figures.cut)
        found["targets"] = [(target, drawn.target_chart(target)) for target in figures.targets]
        found["sources"] = drawn.group_chart(figures.sources, figures.value, figures.cut, kind="source", prefix=prefix)
        if figures.labels:
            found["labels"] = drawn.group_chart(figures.labels, figures.value, figures.cut, kind="label")
    if decided.budgets:
        found["budgets"] = drawn.budget_chart(decided.budgets, figures)
    if decided.plane:
        found["plane"] = drawn.plane_chart(decided.plane, _weights(run), figures.cut, by_value=_by_value(run))
    if decided.beside and figures.cut.value is not None:
        found["beside"] = drawn.beside_chart(decided.beside, figures.cut.value)
    return found


def _common_folder(uris: list[str]) -> str:
    """The longest folder that all URIs begin with, or nothing for a single one."""
    if len(uris) < 2:
        return ""
    shared = next((n for n, letters in enumerate(zip(*uris, strict=False)) if len(set(letters)) > 1), 0)
    return uris[0][: uris[0].rfind("/", 0, shared) + 1]
