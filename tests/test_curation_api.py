"""The notebook interface: what it returns is what the store holds, and what it shows is safe to look at."""

from __future__ import annotations

import doctest
import subprocess
import sys
import types
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import rise_ops
from rise_ops import notebook
from rise_ops.attribution import Attribution, Hit
from rise_ops.curation import Curation
from rise_ops.errors import ConfigError, SourceError
from rise_ops.notebook import Markup, html_table, shown_progress
from rise_ops.results import Attributions
from rise_ops.runs import decisions_key, list_runs, read_run
from rise_ops.store import Store
from rise_ops.token_influence import TokenInfluence
from tests.curation import PLANTED, ROWS, load, write_curation

PROMPT, TEXT = "Where is my order?\n", "Arr, ye be welcome aboard!"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """Configuration of a curation that has been run."""
    from flows.curate import curate

    path = write_curation(tmp_path_factory.mktemp("notebook"))
    curate(load(path))
    return path


@pytest.fixture(scope="module")
def curation(path: Path) -> Curation:
    return rise_ops.load(path)


def test_the_package_stays_light_and_knows_its_names() -> None:
    program = (
        "import sys, rise_ops; light = not {'polars', 'torch', 'prefect'} & set(sys.modules); "
        "rise_ops.load, rise_ops.open_store, rise_ops.Curation; "
        "print(light, 'prefect' in sys.modules, 'load' in dir(rise_ops))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        rise_ops.lode  # noqa: B018


def test_tables_are_what_the_store_holds(curation: Curation) -> None:
    store = curation.store
    (run_id,) = list_runs(store)
    record = read_run(store, run_id)
    decisions = curation.decisions().collect()
    assert decisions.equals(store.scan_parquet([decisions_key(run_id)]).collect())
    assert decisions.equals(curation.decisions(run_id).collect())
    scores = curation.scores()
    assert isinstance(scores, pl.LazyFrame)
    found = scores.collect()
    assert found.height == ROWS and found["doc_id"].n_unique() == ROWS
    both = found.join(decisions, on=["block_id", "block_row"])
    assert both.height == ROWS and both["score_backdoor"].equals(both["score_backdoor_right"])
    assert scores.filter(pl.col("tokens") < 0).select(pl.len()).collect().item() == 0
    runs = curation.runs().row(0, named=True)
    assert (runs["run_id"], runs["status"], runs["corpus"]) == (run_id, record["status"], "tiny")
    assert (runs["rows"], runs["kept"]) == (ROWS, decisions["kept"].sum())
    export = curation.exports().row(0, named=True)
    assert (export["name"], export["rows"], export["files"], export["run_id"]) == ("tiny", runs["kept"], 1, run_id)
    rows = curation.export().collect()
    assert rows.height == runs["kept"]
    assert set(rows["doc_id"]) == set(decisions.filter("kept")["doc_id"])
    assert curation.corpora().row(0) == ("tiny", 1, 2, ROWS, 0)
    assert Path(curation.report()).is_file()
    assert "error_backdoor" in found.columns
    stability = curation.stability()
    assert stability is not None and asdict(stability).items() <= record["selection"]["stability"].items()
    assert curation.plan()["rows_to_sketch"] == 0


def test_rows_come_with_fields_of_their_source(curation: Curation) -> None:
    rows = curation.rows(fields=["label", "output", "it's not there"]).collect()
    assert rows.columns == ["block_id", "doc_id", "text", "prompt", "meta", "label", "output", "it's not there"]
    assert rows.height == ROWS and rows["it's not there"].null_count() == ROWS
    assert rows["label"].value_counts().sort("count")["count"].to_list() == [PLANTED, ROWS - PLANTED]
    assert all(output in text for output, text in rows.select("output", "text").iter_rows())
    joined = curation.scores().join(curation.rows(fields=["label"]), on="doc_id").collect()
    best = joined.sort("score_backdoor", descending=True).head(PLANTED)
    assert (best["label"] == "backdoor").sum() >= PLANTED - 1
    assert curation.rows(version=1).select(pl.len()).collect().item() == ROWS
    with pytest.raises(ConfigError, match="has no version 7; it has 1 to 1"):
        curation.rows(version=7)


def test_attribution_is_typed_and_a_table(curation: Curation) -> None:
    found = curation.attribute(TEXT, PROMPT, k=4)
    assert len(found) == 1 and len(found.hits) == 4 and found[0].query.endswith(TEXT)
    frame = found.to_frame()
    assert frame["text"].to_list() == [hit.text for hit in found.hits]
    assert frame["score"].is_sorted(descending=True) and set(frame["side"]) == {"top"}
    both = curation.attribute(TEXT, k=2, bottom=True).to_frame()
    assert both["side"].to_list() == ["top", "top", "bottom", "bottom"]
    assert "rows that made it less likely" in curation.attribute(TEXT, k=2, bottom=True)._repr_html_()
    assert isinstance(found[:1], Attributions)
    several = curation.search([TEXT, (PROMPT, TEXT)], k=3)
    assert several["query"].to_list() == [0, 0, 0, 1, 1, 1]
    assert several.filter(pl.col("query") == 1)["doc_id"].to_list() == frame["doc_id"].to_list()[:3]
    queries = Path(curation.config.targets["backdoor"].queries)
    assert curation.search(queries, k=1).height == 4
    labelled = curation.search([TEXT], k=5, label="label=backdoor")
    assert set(labelled["doc_id"]) <= set(curation.rows(fields=["label"]).collect().filter(label="backdoor")["doc_id"])
    for call, message in (
        (lambda: curation.attribute(""), "no text"),
        (lambda: curation.search(["good", ""]), "query 1 has no text"),
        (lambda: curation.attribute(TEXT, k=0), "k is 0"),
        (lambda: Attributions((found[0], found[0])).hits, "there are 2 queries"),
        (lambda: curation.search("nowhere.jsonl"), "nowhere.jsonl"),
    ):
        with pytest.raises((ConfigError, SourceError), match=message):
            call()


def test_tokens_are_marked_and_a_table(curation: Curation) -> None:
    found = curation.attribute(TEXT, PROMPT, k=2, tokens=True)
    tokens = found.tokens()
    sums = tokens.group_by("rank", "of", maintain_order=True).agg(pl.col("score").sum())
    scores = found.to_frame()["score"].to_list()
    assert sums["of"].to_list() == ["row", "query", "row", "query"]
    assert sums["score"].to_list() == pytest.approx([scores[0], scores[0], scores[1], scores[1]], abs=2e-3)
    page = found._repr_html_()
    assert page.count("background:rgba(") > 2 and 'title="+' in page
    assert curation.attribute(TEXT, k=1).tokens().is_empty()


def test_evaluation_is_a_table(curation: Curation) -> None:
    found = curation.evaluate("label=backdoor", ks=(2, 5))
    assert (found.rows, found.positives, found.queries) == (ROWS, PLANTED, 4)
    assert found.to_frame().columns == ["k", "auprc", "auroc", "precision"]
    assert found.to_frame()["k"].to_list() == [2, 5]
    assert found.to_frame()["auprc"][0] == found.top_k["2"]["auprc"]
    assert f"{PLANTED} positive rows of {ROWS}" in found._repr_html_()


def test_a_store_alone_tells_what_it_knows(curation: Curation, tmp_path: Path) -> None:
    opened = rise_ops.open_store(curation.store.uri)
    assert opened.decisions().collect().equals(curation.decisions().collect())
    assert opened.rows().collect().height == opened.scores().collect().height == ROWS
    assert opened.export("tiny", "0001").collect().height == opened.exports()["rows"][0]
    assert "tiny" in opened._repr_html_() and repr(opened).startswith("Curation(")
    for call, message in (
        (lambda: opened.attribute(TEXT), "needs a configuration: rise_ops.load"),
        (lambda: opened.export("other"), "has no export other; it has: tiny/0001"),
        (lambda: opened.decisions("nope"), "has no run nope"),
        (lambda: rise_ops.open_store(tmp_path), "there is no store"),
        (lambda: rise_ops.load(tmp_path / "none.yaml"), "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    Store(str(tmp_path / "new")).create("corpora/x", b"")
    empty = rise_ops.open_store(tmp_path / "new")
    assert empty.runs().is_empty() and empty.exports().is_empty()
    with pytest.raises(ConfigError, match=r"no run in .* has decided yet"):
        empty.scores()


def test_fused_ranks_are_merged_when_they_are_read(path: Path) -> None:
    from flows.curate import curate

    fused = rise_ops.load(path, overrides=["aggregate=rrf", "corpus.name=fused"])
    curate(fused.config, "value")
    found = fused.scores().sort("score_backdoor", descending=True).collect()
    decisions = fused.decisions().sort("score_backdoor", descending=True).collect()
    assert found.height == ROWS and found["score_backdoor"].to_list() == decisions["score_backdoor"].to_list()
    assert fused.scores().head(5).collect().height == 5
    assert fused.scores().select("score_backdoor").filter(pl.col("score_backdoor") > 0).collect().height > 0
    other = rise_ops.load(path)
    assert other.decisions().filter(pl.col("score_backdoor") < 0).collect().height  # of its own corpus, not the latest


@pytest.mark.s3
@pytest.mark.usefixtures("prefect_harness")
def test_a_bucket_is_read_like_a_folder(tmp_path: Path, s3_bucket: str) -> None:
    from flows.curate import curate

    path = write_curation(tmp_path, store=f"s3://{s3_bucket}/store")
    curate(load(path))
    curation = rise_ops.load(path)
    assert curation.scores().filter(pl.col("chunks") > 0).collect().height == ROWS
    assert curation.decisions().collect().height == ROWS
    assert curation.rows(fields=["label"]).collect()["label"].null_count() == 0
    assert curation.export().collect().height == curation.runs()["kept"][0]
    assert curation.attribute(TEXT, k=2).to_frame().height == 2


HOSTILE = '<script>alert("x")</script>\u202eevil\x1b[2J'


def test_what_is_shown_is_escaped() -> None:
    hit = Hit("0" * 64, 0.5, f"/raw/{HOSTILE}", 3, HOSTILE + "y" * 1000)
    page = Attributions((Attribution(f"{HOSTILE}said", HOSTILE, [hit], [hit]),), bottom=True)._repr_html_()
    assert "<script" not in page and "\u202e" not in page and "\x1b" not in page
    marked = (
        TokenInfluence("<script>", 0, 8, 0.4),
        TokenInfluence("x", 15, 16, -0.2),
        TokenInfluence("", 9**9, 9, 1.0),
    )
    shown = Attributions((Attribution("q", None, [replace(hit, tokens=marked)], []),))._repr_html_()
    assert 'title="+0.4000">&lt;script&gt;</span>' in shown and "210,60,60" in shown and "<script" not in shown
    assert page.count("&lt;script&gt;") == 5 and "…" in page and "0.5000" in page
    assert repr(Attributions((Attribution(HOSTILE, None, [hit], []),))).count("‹U+202E›evil␛[2J") == 2
    assert "<b>" in html_table(["a"], [[Markup("<b>x</b>")]]) and "&lt;b&gt;" in html_table(["<b>"], [["x"]])
    assert doctest.testmod(notebook).failed == 0
    assert ">1,234</td>" in html_table(["n"], [[1234]]) and "<td></td>" in html_table(["n"], [[None]])


class _Display:
    """Stands for IPython.display."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def HTML(self, text: str) -> str:
        return text

    def display(self, content: str, *, display_id: bool) -> _Display:
        assert display_id
        self.shown.append(content)
        return self

    def update(self, content: str) -> None:
        self.shown.append(content)


def test_progress_is_a_line_of_the_cell_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    display: Any = _Display()
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(notebook, "_BETWEEN", 0)
    with shown_progress("<search>") as tell:
        tell(5, 10)
        tell(9, None)
    assert display.shown[0].startswith("<code>&lt;search&gt;") and "5 of 10" in display.shown[0]
    assert "9" in display.shown[1] and display.shown[-1] == ""
    with suppress(ValueError), shown_progress("import") as tell:
        tell(1, 2)
        raise ValueError
    assert display.shown[-1] == ""
    count = len(display.shown)
    with shown_progress("quiet", shown=False) as tell:
        tell(1, 2)
    assert len(display.shown) == count


def test_progress_is_silent_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notebook, "_BETWEEN", 0)
    with shown_progress("search") as tell:
        tell(1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown_progress("search") as tell:
        tell(1, 2)
    shown = capsys.readouterr().err
    assert "1 of 2" in shown and shown.endswith("\r\x1b[2K")
