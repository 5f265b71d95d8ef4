"""The dataset card: what it says, and that no name can make it say something else."""

from __future__ import annotations

import re
from typing import Any

import polars as pl
import pytest
import yaml
from markdown_it import MarkdownIt

from rise_ops.card import dataset_card, escaped, size_category
from rise_ops.report_data import decision_figures
from tests.report_runs import run_record, synthetic_decisions

HOSTILE = "a|b *c* [d](http://e.example) <img src=x onerror=f()> `g` www.h.example \\ # &amp; i@j.example\n\n## k\u202e"


def lineage(frame: pl.DataFrame, **changes: Any) -> dict[str, Any]:
    record = run_record(frame)
    config = record["config"]
    return {
        "corpus": record["corpus"],
        "model": record["model"],
        "index_id": record["index_id"],
        "weights": config["value"],
        "aggregate": config["aggregate"],
        "keep": config["selection"]["keep"],
        "selection": config["selection"],
        "stability": record["selection"]["stability"],
        "sketch": config["sketch"],
        "code": record["code"],
        **changes,
    }


def card(frame: pl.DataFrame, recorded: dict[str, Any]) -> str:
    figures = decision_figures(frame.lazy())
    return dataset_card("support-v2", "0003", figures=figures, format="parquet", lineage=recorded, run_id="run-7")


def rendered(text: str) -> str:
    return str(MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2]))


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return synthetic_decisions(2_000)


def test_the_front_matter_is_what_loaders_read(frame: pl.DataFrame) -> None:
    text = card(frame, lineage(frame))
    assert text.startswith("---\n")
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "pretty_name": "support-v2, version 0003",
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
        "size_categories": ["n<1K"],
        "tags": ["data-curation", "data-attribution", "influence"],
    }
    assert [size_category(rows) for rows in (999, 1_000, 1_000_000)] == ["n<1K", "1K<n<10K", "1M<n<10M"]


def test_the_card_has_the_essentials(frame: pl.DataFrame) -> None:
    page = rendered(card(frame, lineage(frame, tuning={"why": ["temperature 1.5 agrees best"]})))
    plain = re.sub(r"<[^>]+>", " ", page)
    kept = frame.filter("kept")
    for told in (
        f"{kept.height:,} of 2,000 rows", f"{kept['tokens'].sum():,} of {frame['tokens'].sum():,} tokens",
        "+1 × helpful, −0.5 × junk", "aggregate top-5", "value at the cut", "± 0.0072",
        "selection.exclude[1] (target backdoor, top_rows 10)", "selection.near_duplicates (cosine 0.98, recall 0.99)",
        "would keep 94.1 % of these rows", "Reliability of the values: 0.985", "neox-3m", "e" * 64, "a" * 64, "run-7",
        "temperature 1", "temperature 1.5 agrees best",
    ):  # fmt: skip
        assert told in plain, told
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Load", "How rows were chosen", "By source", "By label", "How sure the choice is", "Lineage"]
    largest = frame.group_by("label").len().sort("len", descending=True)["label"][0]
    (row,) = re.findall(rf"<tr>\s*<td>{largest}</td>(.*?)</tr>", page, flags=re.DOTALL)
    cells = re.findall(r">([^<]*)</td>", row)
    assert cells[:2] == [f"{(frame['label'] == largest).sum():,}", f"{(kept['label'] == largest).sum():,}"]


def test_hostile_names_stay_text_in_their_cells(frame: pl.DataFrame) -> None:
    hostile = frame.with_columns(label=pl.lit(HOSTILE), source_uri=pl.lit(f"/data/{HOSTILE}.jsonl"))
    changes = {"corpus": {"name": HOSTILE, "version": 1, "snapshot_id": "e" * 64},
               "selection": {"exclude": [{"pattern": HOSTILE}]}}  # fmt: skip
    page = rendered(card(hostile, lineage(frame, **changes)))
    assert not re.search(r"<(img|a|em|strong|h[3-6])\b", page)
    assert page.count("<h2>") == 6
    for body in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        rows = [len(re.findall(r"<t[hd][ >]", row)) for row in re.findall(r"<tr>(.*?)</tr>", body, flags=re.DOTALL)]
        assert len(set(rows)) == 1
    shown = HOSTILE.replace("\u202e", "‹U+202E›").replace("\n\n", " ")
    expected = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{expected}</td>" in page


def test_bare_addresses_become_no_links() -> None:
    assert escaped("https://x.example www.x.example a@b.example") == (
        "https\\://x.example www\\.x.example a\\@b.example"
    )


def test_a_run_without_the_newer_figures_has_a_card(frame: pl.DataFrame) -> None:
    old = frame.select("doc_id", "source_uri", "tokens", "score_helpful", "value", "kept", "reason").filter("kept")
    few = {"selection": None, "stability": None, "sketch": None, "code": None}
    page = rendered(card(old, lineage(frame, **few)))
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Load", "How rows were chosen", "By source", "Lineage"]
