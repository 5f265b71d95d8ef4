"""The dataset card of an export: its README.md.

Front matter that `datasets.load_dataset` and the Hugging Face hub read, then what a reader needs before using the
data: how to load it, how rows were chosen and by how much, where they come from, how sure the choice is, and how to
walk a row back. Names and settings come from a corpus and its configuration: they are escaped for Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from rise_ops.report_data import DecisionFigures, Groups
from rise_ops.report_steps import Step, selection_steps
from rise_ops.report_text import brief_yaml, clip, count, percent, plain, short, signed, weight, words
from rise_ops.visible import visible

GROUPS = 10
"""Sources and labels in the card, the largest ones."""
_NAME = 120
"""Characters of a name or setting."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&:@]|(?<=www)\.)")
_LOADING = {
    "parquet": 'load_dataset("parquet", data_files="data/*.parquet", split="train")',
    "jsonl.zst": 'load_dataset("json", data_files="data/*.jsonl.zst", split="train")',
}
"""In the export's own folder, by its format."""


def dataset_card(name: str, number: str, *, figures: DecisionFigures, format: str, lineage: Mapping[str, Any],
                 run_id: str) -> str:  # fmt: skip
    """The card of one version of an export.

    Parameters
    ----------
    figures
        Of the run's decisions.
    format
        Of the data files.
    lineage
        What the export records beside the data: corpus, model, index, weights, and, where the run has them, the
        selection, the sketch and the figures of its stability.
    """
    corpus = lineage["corpus"]
    title = f"{name}, version {number}"
    kept = (
        f"{count(figures.kept)} of {count(figures.rows)} rows ({percent(figures.kept, figures.rows)}) and "
        f"{count(figures.tokens_kept)} of {count(figures.tokens)} tokens of the corpus {escaped(corpus['name'])} "
        f"(version {corpus['version']}), chosen by their influence on what a model is meant to say."
    )
    parts = [
        _front_matter(title, format, figures.kept),
        f"# {escaped(title)}\n\n{kept}",
        f"## Load\n\n```python\nfrom datasets import load_dataset\n\nrows = {_LOADING[format]}\n```\n\n{_COLUMNS}",
        _choice(figures, lineage),
        _origin("source", figures.sources, figures),
        _origin("label", figures.labels, figures) if figures.labels else "",
        _sureness(lineage.get("stability") or {}),
        _making(lineage, run_id),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_COLUMNS = (
    "Columns are those of the source rows, then `doc_id` (identity of the text), `value` (weighted influence on the "
    "targets; higher is better), `source_uri` and `source_row` (where the row stood; rows count from 0). "
    "`manifest.json` holds the checksums of the files. The rows keep the licences of their sources."
)


def escaped(text: Any) -> str:
    """Any text as one line of Markdown that shows it as it is.

    Examples
    --------
    >>> escaped("a|b *c* <img>")
    'a\\\\|b \\\\*c\\\\* \\\\<img\\\\>'
    """
    return escaped_whole(clip(text, _NAME))


def _front_matter(title: str, format: str, rows: int) -> str:
    fields = {
        "pretty_name": title,
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": f"data/*.{format}"}]},
        ],
        "size_categories": [size_category(rows)],
        "tags": ["data-curation", "data-attribution", "influence"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _choice(figures: DecisionFigures, lineage: Mapping[str, Any]) -> str:
    formula = ", ".join(f"{weight(number)} × {escaped(name)}" for name, number in lineage["weights"].items())
    config = {"selection": lineage.get("selection") or {"keep": lineage["keep"]}}
    steps = selection_steps(config, figures)
    rows = [(words(step.reason), _rule(step), count(step.rows), count(step.tokens), count(step.left)) for step in steps]
    error = (lineage.get("stability") or {}).get("value_error_median")
    cut = "" if figures.cut.value is None else f", value at the cut {signed(figures.cut.value)}"
    sure = f" ± {plain(error)}" if cut and isinstance(error, int | float) else ""
    return (
        f"## How rows were chosen\n\nValue: {formula or 'none'}; aggregate {escaped(lineage['aggregate'])}. "
        f"Budget: {escaped(brief_yaml(lineage['keep'])) or 'every row'}{cut}{sure}. Steps in their order:\n\n"
        + table(("Reason", "Rule", "Rows", "Tokens", "Rows left"), rows, left=2)
    )


def _rule(step: Step) -> str:
    if not step.rule:
        return ""
    return escaped(step.rule) + (f" ({escaped(step.says)})" if step.says else "")


def _origin(kind: str, groups: Groups, figures: DecisionFigures) -> str:
    shown = groups.shown[:GROUPS]
    rows = [
        (escaped(group.name), count(group.rows), count(group.kept), percent(group.rows, figures.rows),
         percent(group.kept, figures.kept), count(group.tokens_kept), signed(group.mean_value))
        for group in shown
    ]  # fmt: skip
    head = (kind.capitalize(), "Rows", "Kept", "Share before", "Share after", "Tokens kept", "Mean value")
    more = f"\n\nThe largest of {count(groups.count)}." if groups.count > len(shown) else ""
    return f"## By {kind}\n\n{table(head, rows)}{more}"


def _sureness(stability: Mapping[str, Any]) -> str:
    overlap, reliability = stability.get("overlap_expected"), stability.get("reliability")
    told = [
        f"An independent sketch of the same width would keep {percent(overlap)} of these rows." if overlap else "",
        f"Reliability of the values: {reliability:.3f}." if isinstance(reliability, int | float) else "",
        f"**{escaped_whole(stability['warning'])}**" if stability.get("warning") else "",
    ]
    told = [each for each in told if each]
    return "## How sure the choice is\n\n" + " ".join(told) if told else ""


def _making(lineage: Mapping[str, Any], run_id: str) -> str:
    model, corpus = lineage["model"], lineage["corpus"]
    sketch, code = lineage.get("sketch"), lineage.get("code")
    facts = [
        ("run", run_id),
        ("model", f"{escaped(model['name'])} ({short(model['fingerprint'])})"),
        ("sketch", escaped_whole(brief_yaml(sketch)) if sketch else ""),
        ("chosen", escaped_whole(" ".join((lineage.get("tuning") or {}).get("why") or ()))),
        ("snapshot", corpus["snapshot_id"]),
        ("index", lineage["index_id"]),
        ("code", f"rise\\_ops {escaped(code['version'])}, commit {short(code['commit'])}" if code else ""),
    ]
    rows = [(name, text) for name, text in facts if text]
    return (
        f"## Lineage\n\n{table(('', ''), rows, left=2)}\n\n"
        "`curate lineage STORE DOC_ID` walks a row back to its line in the source; `lineage.json` says the same for "
        "programs. A value estimates the effect of training on a row through the model's output layer: it does not say "
        "that a row is true, harmless or well written."
    )


def escaped_whole(text: Any) -> str:
    """Like `escaped`, however long."""
    return _SPECIAL.sub(r"\\\1", " ".join(visible(str(text)).split()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table; columns after the first `left` are aligned to the right. Cells are escaped already."""
    rule = ["---" if number < left else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def size_category(rows: int) -> str:
    """The hub's name for a number of rows."""
    names = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
    return next((name for power, name in enumerate(names, 3) if rows < 10**power), "10B<n<100B")
