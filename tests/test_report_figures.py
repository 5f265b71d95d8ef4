"""The report's figures against plain counting."""

from __future__ import annotations

import polars as pl
import pytest

from rise_ops.report_budgets import FACTORS, other_budgets
from rise_ops.report_data import NO_LABEL, decision_figures
from rise_ops.report_rows import beside_the_cut, contrast, near_duplicate_groups, plane
from rise_ops.report_text import clip, percent, pieces, setting, signed, summed
from tests.report_runs import synthetic_decisions

ROWS = 4_000
LABEL = pl.col("label").fill_null(NO_LABEL)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return synthetic_decisions(ROWS, sources=40)


def test_totals_reasons_and_histograms(frame: pl.DataFrame) -> None:
    found = decision_figures(frame.lazy())
    kept = frame.filter("kept")
    assert (found.rows, found.kept) == (ROWS, kept.height)
    assert (found.tokens, found.tokens_kept) == (frame["tokens"].sum(), kept["tokens"].sum())
    assert found.unvalued == frame["value"].null_count()
    assert found.below_zero == (kept["value"] < 0).sum()
    for reason in found.reasons:
        rows = frame.filter((pl.col("reason") == reason.reason) & pl.col("rule").eq_missing(reason.rule))
        assert (reason.rows, reason.tokens) == (rows.height, rows["tokens"].sum())
    assert sum(reason.rows for reason in found.reasons) == ROWS
    assert found.value is not None
    assert sum(found.value.kept) == kept.height
    assert sum(found.value.dropped) == ROWS - kept.height - found.unvalued
    for bin_, inside in enumerate(found.value.kept[:-1]):
        low, high = found.value.edges[bin_ : bin_ + 2]
        assert inside == pytest.approx(kept["value"].is_between(low, high, closed="left").sum(), abs=1)
    for a, b, r in found.correlations:
        assert r == pytest.approx(frame.select(pl.corr(f"score_{a}", f"score_{b}")).item(), abs=1e-4)


def test_the_cut_leaves_reserved_rows_aside(frame: pl.DataFrame) -> None:
    cut = decision_figures(frame.lazy()).cut
    first = frame.filter(pl.col("reason") == "over_tokens")["rank"].min()
    usual = frame.filter(pl.col("kept") & (pl.col("rank") < first))
    assert (cut.reserved_from, cut.rank) == (first, usual["rank"].max())
    assert cut.value == usual["value"].min()
    assert frame.filter(pl.col("kept") & (pl.col("value") < cut.value)).height


@pytest.mark.parametrize("kind", ["sources", "labels"])
def test_groups(frame: pl.DataFrame, kind: str) -> None:
    found = decision_figures(frame.lazy())
    groups = found.sources if kind == "sources" else found.labels
    key, quota = ("source_uri", "over_source_quota") if kind == "sources" else ("label", "over_label_quota")
    named = frame.with_columns(label=LABEL)
    assert groups is not None and groups.count == named[key].n_unique()
    assert sum(group.rows for group in groups.shown) == ROWS
    if kind == "sources":
        assert groups.rest and groups.shown[-1].name == f"{groups.count - 20} smaller sources"
    for name, group in zip(groups.names, groups.shown, strict=False):
        rows = named.filter(pl.col(key) == name)
        kept = rows.filter("kept")
        assert (group.rows, group.kept, group.tokens_kept) == (rows.height, kept.height, kept["tokens"].sum())
        assert group.over_quota == (rows["reason"] == quota).sum()
        assert group.reserved == (kept["rank"] > found.cut.reserved_from).sum()
        assert group.filtered == rows["reason"].is_in(
            ["no_prediction", "excluded_pattern", "excluded_target", "near_duplicate"]).sum()  # fmt: skip
        assert group.mean_value == pytest.approx(rows["value"].mean(), abs=1e-6)
        if group.bins is not None:
            assert sum(group.bins[0]) == kept.height


@pytest.mark.parametrize("unit", ["rows", "tokens"])
def test_other_budgets_take_rows_in_turns(frame: pl.DataFrame, unit: str) -> None:
    cut = decision_figures(frame.lazy()).cut
    groups = {"labels": (LABEL, ["clean", "rare"])}
    found = other_budgets(frame.lazy(), cut, unit="rows" if unit == "rows" else "tokens", groups=groups)
    assert found is not None
    reserved = frame.filter(pl.col("kept") & (pl.col("rank") > cut.reserved_from)).sort("rank")
    usual = frame.filter(pl.col("kept") & (pl.col("rank") < cut.reserved_from)).sort("rank")
    line = pl.concat([reserved, usual, frame.filter(pl.col("reason") == "over_tokens").sort("rank")])
    amount = line["tokens"].cast(pl.Int64) if unit == "tokens" else pl.Series([1] * line.height)
    kept = int(amount[: reserved.height + usual.height].sum())
    assert [budget.factor for budget in found.budgets] == list(FACTORS)
    for budget in found.budgets:
        taken = line.filter(amount.cum_sum() <= round(budget.factor * kept))
        assert (budget.rows, budget.tokens) == (taken.height, taken["tokens"].sum())
        assert budget.mean == pytest.approx(taken["value"].mean(), abs=1e-6)
        assert budget.lowest == pytest.approx(taken[reserved.height :]["value"].min(), abs=1e-6)
        assert budget.exhausted == (taken.height == line.height)
        inside = taken["tokens"] if unit == "tokens" else pl.Series([1] * taken.height)
        share = int(inside.filter(taken["label"] == "rare").sum()) / int(inside.sum())
        assert budget.shares["labels"]["rare"] == pytest.approx(share)
    assert found.curve.amounts[-1] == amount.sum()
    assert found.curve.mean[-1] == pytest.approx(line["value"].mean(), abs=1e-6)
    assert list(found.curve.value) == sorted(found.curve.value, reverse=True)


def test_samples_are_the_smallest_hashes(frame: pl.DataFrame) -> None:
    small = plane(frame.lazy(), "helpful", "junk")
    assert (small.shown, small.rows) == (1_500, ROWS)
    chosen = frame.sort("doc_id").head(1_500).filter("kept")
    assert len(small.kept) == chosen.height
    assert sorted(x for x, _ in small.kept) == pytest.approx(sorted(chosen["score_helpful"].to_list()), abs=1e-6)
    assert contrast({"a": 1.0, "b": 0.0, "c": -1.0}, ["b", "c", "a"]) == ("a", "c")
    assert contrast({}, ["only"]) is None


def test_rows_beside_the_cut(frame: pl.DataFrame) -> None:
    cut = decision_figures(frame.lazy()).cut
    found = beside_the_cut(frame.lazy(), cut)
    assert found is not None
    off = (frame["value"] - cut.value) / frame["value_error"]
    open_ = frame["kept"] | (frame["reason"] == "over_tokens")
    assert found.rows == (open_ & (off.abs() < 4)).sum()
    assert found.unsure_kept == (frame["kept"] & off.is_between(0, 2)).sum()
    assert found.unsure_dropped == ((frame["reason"] == "over_tokens") & off.is_between(-2, 0)).sum()
    assert len(found.values) == 60 and list(found.values) == sorted(found.values, reverse=True)
    assert beside_the_cut(frame.drop("value_error").lazy(), cut) is None


def test_near_duplicate_groups(frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rise_ops.report_rows._GROUPS_AT_ONCE", 50)  # several passes
    found = near_duplicate_groups(frame.lazy())
    assert found is not None
    sizes = frame.filter(pl.col("duplicate_of").is_not_null()).group_by("duplicate_of").len()["len"] + 1
    assert (found.groups, found.dropped, found.largest) == (len(sizes), (sizes - 1).sum(), sizes.max())
    assert {size: groups for size, groups, _ in found.sizes}["2"] == (sizes == 2).sum()
    assert sum(groups for _, groups, _ in found.sizes) == found.groups
    assert sum(dropped for _, _, dropped in found.sizes) == found.dropped


def test_decisions_of_a_run_without_targets_and_new_columns() -> None:
    frame = synthetic_decisions(300).select(
        "doc_id", "source_uri", "source_row", "tokens", "kept", "reason", pl.lit(None, pl.Float32).alias("value")
    )
    found = decision_figures(frame.lazy())
    assert found.value is None and found.targets == () and found.labels is None
    assert other_budgets(frame.lazy(), found.cut, unit="rows", groups={}) is None
    assert near_duplicate_groups(frame.lazy()) is None


def test_a_column_that_tells_every_row_apart_is_no_label(frame: pl.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rise_ops.report_data.MOST_LABELS", 1_000)
    assert decision_figures(frame.with_columns(label="doc_id").lazy()).labels is None
    assert decision_figures(frame.lazy()).labels is not None


def test_pieces_are_the_text_and_mark_the_strongest() -> None:
    text = "abc def ghi"
    tokens = [{"text": text[at : at + 3], "start": at, "end": at + 3, "score": score} for at, score in
              ((0, 1.0), (4, 0.05), (8, -0.6))]  # fmt: skip
    found = pieces(text, tokens, 100)
    assert [(piece.text, piece.strength) for piece in found] == [("abc", 4), (" def ", 0), ("ghi", -3)]
    assert "".join(piece.text for piece in pieces(text * 40, tokens, 100)).startswith((text * 40)[:100])
    assert pieces(text, None, 100)[0].text == text
    assert [token["score"] for token in summed([{"query_tokens": tokens}, {"query_tokens": tokens}])] == [
        2.0,
        0.1,
        -1.2,
    ]


def test_numbers_and_settings_as_people_write_them() -> None:
    assert [signed(value) for value in (0.1234, -0.00123, 0, None, float("nan"))] == [
        "+0.123",
        "−0.00123",
        "0",
        "–",
        "–",
    ]
    assert [percent(*pair) for pair in ((1, 3), (1, 2), (1, 100_000), (0, 5), (1, 0))] == [
        "33.3 %", "50 %", "< 0.1 %", "0 %", "–"]  # fmt: skip
    config = {"selection": {"exclude": [{"pattern": "a b", "field": "prompt"}, {"target": "x", "top_rows": 5_000}]}}
    assert setting(config, "selection.exclude[0]") == "pattern a b, field prompt"
    assert setting(config, "selection.exclude[1]") == "target x, top_rows 5,000"
    assert setting(config, "selection.exclude[7]") == setting(config, "nothing.here") == ""
    assert clip("abcdef", 4) == "abcd … (2 more characters)"
