"""The whole selection language on a small corpus: each rule, their order, and many of them at random, against a plain
reading of the rules; the same under any memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from rise_ops import quotas, ranking, row_groups, selection
from rise_ops.config import Quota, SelectionConfig
from rise_ops.corpus import read_block
from rise_ops.diversity import k_center_order
from rise_ops.errors import ConfigError, LimitError, SelectionError
from rise_ops.index import write_block
from rise_ops.memory import SelectMemory, StageMemory
from rise_ops.parts import Part
from rise_ops.row_groups import source_name
from rise_ops.runs import decisions_key
from rise_ops.scratch import Scratch
from rise_ops.selection import Scored, Selection, decide, preview
from rise_ops.session import block_rows
from rise_ops.store import Store
from rise_ops.valuation import iter_part_scores
from tests import selection_reference as reference
from tests.corpora import corpus_of, ingest_all, make_rows, write_as
from tests.indexed import DIM, INDEX, Float32Array, Indexed, make_target, score_parts, signed, unit

TARGETS = {name: make_target(3, seed=seed) for seed, name in enumerate(("good", "junk", "backdoor"), 10)}
WEIGHTS = {"good": 1.0, "junk": -0.5}
LABELS = ("chat", "code", "maths", None, 7)


@dataclass(frozen=True)
class World:
    """An indexed and scored corpus."""

    indexed: Indexed
    parts: list[Part]
    sources: list[str]


def _labelled(rows: int, seed: int) -> list[dict[str, Any]]:
    """Rows with labels, of which some have a language and some a secret."""
    r = np.random.default_rng(seed)
    found = []
    for row in make_rows(rows, seed=seed):
        label = LABELS[int(r.choice(len(LABELS), p=[0.4, 0.3, 0.15, 0.1, 0.05]))]
        text = row["text"] + (" SECRET" if r.random() < 0.05 else "")
        found.append({**row, "text": text, "kind": label, "lang": str(r.choice(["en", "de", "fr"]))})
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Five objects in three folders, one of them a copy; a tenth of the rows are nearly the same as others."""
    folder = tmp_path_factory.mktemp("language")
    for number, (name, rows) in enumerate((("web/a", 260), ("web/b", 40), ("books/c", 90), ("forum/d", 50))):
        write_as(folder / f"raw/{name}.jsonl", _labelled(rows, number))
    shutil.copy(folder / "raw/web/b.jsonl", folder / "raw/forum/b again.jsonl")
    sources = [str(folder / "raw/web/*.jsonl"), str(folder / "raw/**/*.jsonl")]
    store = Store(str(folder / "store"))
    version = ingest_all(store, corpus_of(*sources))
    signatures = {}
    for number, (block, rows) in enumerate(block_rows(store, version).items()):
        own = signed(rows, seed=number, silent=[3])
        r = np.random.default_rng(number)
        for row in r.choice(rows, rows // 8, replace=False).tolist():
            if row != 3:
                near = unit(1, seed=int(r.integers(6))) + 0.01 * r.standard_normal(DIM)
                own.signature[row] = near / np.linalg.norm(near)
        signatures[block] = own
        write_block(store, INDEX, block, own, seconds=0.0, producer={})
    indexed = Indexed(store, version, list(signatures), signatures)
    return World(indexed, score_parts(indexed, TARGETS, size=1), sources)


def _select(world: World, name: str, memory: int = 2**30, **config: Any) -> tuple[Selection, pl.DataFrame]:
    found = decide(
        world.indexed.store, world.indexed.version, run_id=name, parts=world.parts, weights=WEIGHTS,
        targets=list(TARGETS), aggregate="mean", selection=SelectionConfig(**config), memory=memory, identity=INDEX,
        sources=world.sources,
    )  # fmt: skip
    return found, world.indexed.store.scan_parquet([decisions_key(name)]).collect()


@pytest.fixture(scope="module")
def facts(world: World) -> pl.DataFrame:
    """What the rules look at: scores, values, places, columns of the sources, numbers in the index."""
    _, frame = _select(world, "facts")
    starts = np.cumsum([0, *(len(world.indexed.signatures[block].tokens) for block in world.indexed.blocks)])
    first = dict(zip(world.indexed.blocks, starts.tolist(), strict=False))
    content = pl.concat(
        read_block(world.indexed.store, block)
        .with_row_index("block_row")
        .with_columns(block_id=pl.lit(block), item=pl.col("block_row").cast(pl.Int64) + first[block])
        for block in world.indexed.blocks
    )
    return frame.drop("label", "rank", "kept", "reason", "rule", "duplicate_of").join(
        content.drop("doc_id"), on=["block_id", "block_row"], maintain_order="left"
    )


def _rows(facts: pl.DataFrame, sources: Mapping[str, str], label: str) -> list[reference.Row]:
    rows = []
    for place, row in enumerate(facts.iter_rows(named=True)):
        meta = json.loads(row["meta"])
        value = meta.get(label)
        rows.append(
            reference.Row(
                place,
                row["item"],
                row["doc_id"],
                row["tokens"],
                row["value"],
                {name: row[f"score_{name}"] for name in TARGETS},
                sources[row["source_uri"]],
                value if value is None or isinstance(value, str) else json.dumps(value),
                {"text": row["text"], "lang": meta["lang"]},
            )
        )
    return rows


def _expected(world: World, facts: pl.DataFrame, config: SelectionConfig) -> list[reference.Row]:
    per_source, per_label = config.per_source, config.per_label
    by = per_source.by if per_source else "object"
    names = {uri: _source(uri, by, world.sources) for uri in facts["source_uri"].unique()}
    groups: dict[str, tuple[str, Quota]] = {}
    labels: dict[str, tuple[str, Quota]] = {}
    rows = _rows(facts, names, per_label.field if per_label else "kind")
    if per_source is not None:
        for name in sorted(set(names.values())):
            glob = next((glob for glob in per_source.groups if Path(name).match(glob)), None)
            text = "selection.per_source" + (f".groups.{glob}" if glob else "")
            groups[name] = (text, per_source.groups[glob] if glob else per_source)
    if per_label is not None:
        for label in dict.fromkeys([*per_label.groups, *(row.label for row in rows)]):
            if label is not None:
                own = per_label.groups.get(label)
                labels[label] = ("selection.per_label" + (f".groups.{label}" if own else ""), own or per_label)
    reference.select(
        rows, config, sources=groups, labels=labels,
        leaders=_leaders(world, config) if config.near_duplicates else None, spread=_spread(world),
    )  # fmt: skip
    return rows


def _source(uri: str, by: str, sources: Sequence[str]) -> str:
    folder = uri.rsplit("/", 1)[0] + "/"
    if by == "pattern":
        return sources[0] if folder.endswith("/web/") else sources[1]
    return folder if by == "folder" else uri


def _leaders(world: World, config: SelectionConfig) -> Callable[[Sequence[reference.Row]], dict[int, reference.Row]]:
    matrix = world.indexed.matrix.astype(np.float64)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-30)
    least = config.near_duplicates.cosine if config.near_duplicates else 1

    def leaders(rows: Sequence[reference.Row]) -> dict[int, reference.Row]:
        kept: list[reference.Row] = []
        found = {}
        for row in rows:
            near = [other for other in kept if other.item == row.item or matrix[other.item] @ matrix[row.item] >= least]
            if near:
                found[row.place] = near[0]
            else:
                kept.append(row)
        return found

    return leaders


def _spread(world: World) -> Callable[[Sequence[reference.Row], int], list[reference.Row]]:
    def spread(rows: Sequence[reference.Row], count: int) -> list[reference.Row]:
        assert len({row.item for row in rows}) == len(rows)
        items = np.array([row.item for row in rows], np.int64)
        order = k_center_order(
            world.indexed.store, INDEX, world.indexed.blocks, items, count, memory=2**30, folder=Path("/tmp")
        )
        by_item = {row.item: row for row in rows}
        return [by_item[item] for item in order.tolist()]

    return spread


def _random(seed: int) -> dict[str, Any]:
    """A configuration in which each rule is there with some chance; fractions of quotas have tests of their own."""
    r = np.random.default_rng(seed)

    def maybe(chance: float, *choices: Any) -> Any:
        return choices[int(r.integers(len(choices)))] if r.random() < chance else None

    exclusions = [
        {"pattern": "SECRET"}, {"pattern": "^fr$", "field": "lang"}, {"pattern": "word1.? .*word7"},
        {"target": "backdoor", "top_rows": 40}, {"target": "junk", "top_fraction": 0.07},
        {"target": "backdoor", "min_score": 0.15}, {"target": "good", "top_rows": 10_000},
    ]  # fmt: skip
    chosen = [exclusions[n] for n in r.permutation(6)[: int(r.integers(0, 4))]]
    keep = {"rows": maybe(0.4, 3, 90, 250), "fraction": maybe(0.2, 0.29, 0.6), "tokens": maybe(0.3, 900, 6_000)}
    if not any(keep.values()):
        keep["rows"] = 200
    keep |= {"min_value": maybe(0.2, -0.1), "min_percentile": maybe(0.2, 12.5, 40)}
    config: dict[str, Any] = {
        "exclude": chosen,
        "near_duplicates": maybe(0.4, 0.95),
        "keep": {name: value for name, value in keep.items() if value is not None},
    }
    order = maybe(0.5, "sample", "sample", "diversity")
    if order == "sample":
        config["sample"] = {"seed": int(r.integers(9)), "temperature": maybe(0.6, 0.05, 1.0)}
    elif order == "diversity":
        config["diversity"] = {"candidates": float(r.choice([1.3, 3.0]))}
        config["near_duplicates"] = 0.95  # so that no row of the index is there twice
    config["per_source"] = maybe(
        0.4, {"max_rows": 60}, {"by": "folder", "max_rows": 100, "min_rows": 1},
        {"by": "pattern", "groups": {"*/**": {"max_rows": 30}}}, {"groups": {"*/c.jsonl": {"min_rows": 2}}},
    )  # fmt: skip
    config["per_label"] = maybe(
        0.4, {"field": "kind", "max_rows": 70}, {"field": "lang", "min_rows": 1},
        {"field": "kind", "groups": {"maths": {"min_rows": 2}, "7": {"max_rows": 1}}},
    )  # fmt: skip
    return {name: value for name, value in config.items() if value is not None}


@pytest.fixture(scope="module")
def counter() -> Iterator[int]:
    """Numbers of runs."""
    return iter(range(10_000))


@pytest.mark.parametrize("seed", range(40))
def test_decisions_are_a_plain_reading_of_the_rules(world: World, facts: pl.DataFrame, seed: int) -> None:
    options = _random(seed)
    config = SelectionConfig(**options)
    try:
        expected = _expected(world, facts, config)
    except reference.Impossible:
        with pytest.raises(SelectionError):
            _select(world, f"random-{seed}", **options)
        return
    found, frame = _select(world, f"random-{seed}", **options)
    assert frame["reason"].to_list() == [row.reason for row in expected]
    assert frame["rule"].to_list() == [row.rule for row in expected]
    assert frame["rank"].to_list() == [row.rank for row in expected]
    assert frame["duplicate_of"].to_list() == [row.duplicate_of for row in expected]
    assert frame["kept"].to_list() == [row.reason == "kept" for row in expected]
    took = {(row.reason, row.rule): [0, 0] for row in expected}
    for row in expected:
        took[row.reason, row.rule][0] += 1
        took[row.reason, row.rule][1] += row.tokens
    steps = {(step["reason"], step["rule"]): [step["rows"], step["tokens"]] for step in found.steps}
    assert {each: counts for each, counts in steps.items() if counts[0]} == {
        each: counts for each, counts in took.items() if each[0] != "kept"
    }
    assert found.rows == sum(step["rows"] for step in found.steps) + found.kept


EVERYTHING: dict[str, Any] = {
    "exclude": [
        {"pattern": "SECRET"}, {"target": "backdoor", "top_rows": 30}, {"target": "junk", "top_fraction": 0.05},
    ],
    "near_duplicates": 0.95,
    "per_source": {"by": "folder", "max_fraction": 0.55},
    "per_label": {"field": "kind", "max_fraction": 0.45, "groups": {"maths": {"min_fraction": 0.1}}},
    "keep": {"rows": 200, "min_percentile": 5},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sample": {"seed": 3}},
        {"sample": {"temperature": 0.1}, "keep": {"tokens": 4_000}},
        {"diversity": {}, "keep": {"rows": 60}},
        {"near_duplicates": None, "diversity": {"candidates": 2}, "keep": {"tokens": 3_000}},
    ],
)
def test_decisions_do_not_depend_on_memory(
    world: World, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """However few rows are joined, sorted, looked at and written at a time, and whether columns are in files."""
    config = {**EVERYTHING, **changes}
    name = fingerprinted(config)
    whole, frame = _select(world, name, **config)
    for sort_rows, slice_rows, piece in ((9, 100, 13), (170, 11, 64)):
        plan = SelectMemory(StageMemory("select", 0, ""), slice_rows=slice_rows, sort_rows=sort_rows)
        monkeypatch.setattr(selection, "select_memory", lambda *_, plan=plan, **__: plan)
        monkeypatch.setattr(selection, "_GROUP_ROWS", 50)
        monkeypatch.setattr(ranking, "PIECE_ROWS", piece)
        monkeypatch.setattr(quotas, "_SMALL", 3)
        monkeypatch.setattr(selection, "Scratch", lambda folder, _: Scratch(folder, 0))
        found, parts = _select(world, f"{name}-{sort_rows}", **config)
        assert found == whole
        assert parts.equals(frame)


def fingerprinted(config: Mapping[str, Any]) -> str:
    """A name for a run."""
    return SelectionConfig(**config).fingerprint[:20]


def test_quotas_hold_of_what_is_kept(world: World) -> None:
    _, frame = _select(world, "hold", **EVERYTHING)
    kept = frame.filter("kept")
    assert 100 < kept.height <= 200
    folders = kept.group_by(pl.col("source_uri").str.replace(r"[^/]*$", "")).len()
    assert folders["len"].max() <= 0.55 * kept.height  # type: ignore[operator]
    labels = dict(kept.drop_nulls("label").group_by("label").len().iter_rows())
    assert max(labels.values()) <= 0.45 * kept.height
    assert labels["maths"] >= 0.1 * kept.height
    assert set(labels) <= {"chat", "code", "maths", "7"}


def test_a_preview_decides_the_same_and_writes_nothing(world: World) -> None:
    found, _ = _select(world, "seen", **EVERYTHING)
    store = world.indexed.store
    before = dict(store.list(""))
    scored = Scored(world.indexed.version, world.parts, list(TARGETS), WEIGHTS, "mean", INDEX, world.sources)
    assert preview(store, scored, SelectionConfig(**EVERYTHING), memory=2**30) == found
    assert dict(store.list("")) == before


def test_exclusion_by_target_counts_all_rows_whatever_else_takes_them(world: World, facts: pl.DataFrame) -> None:
    rule = {"target": "backdoor", "top_rows": 25}
    _, alone = _select(world, "target-alone", exclude=[rule])
    _, after = _select(world, "target-after", exclude=[rule, {"pattern": "SECRET|word7"}])
    gone = alone.filter(reason="excluded_target")
    order = facts.drop_nulls("value").sort("score_backdoor", "doc_id", descending=[True, False]).head(25)
    assert sorted(gone["doc_id"]) == sorted(order["doc_id"])
    places = ["source_uri", "source_row"]
    both = gone.select(places).join(after, on=places)
    assert set(both["reason"]) == {"excluded_target", "excluded_pattern"}
    assert after.filter(reason="excluded_target").height == both.filter(reason="excluded_target").height < 25


def test_a_copied_row_is_a_near_duplicate_of_itself(world: World) -> None:
    _, frame = _select(world, "copies", near_duplicates=1.0)
    copies = frame.filter(pl.col("source_uri").str.contains("b again") | pl.col("source_uri").str.ends_with("b.jsonl"))
    for _, pair in copies.group_by("doc_id"):
        assert pair.height == 2
        if pair["value"].null_count() == 0:
            assert sorted(pair["reason"]) == ["kept", "near_duplicate"]
            assert pair.filter(reason="near_duplicate")["duplicate_of"].item() == pair["doc_id"][0]


def test_errors_of_scores_go_on_and_make_up_that_of_the_value(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frame = _select(world, "errors")
    squares = pl.col("error_good") ** 2 + (0.5 * pl.col("error_junk")) ** 2
    expected = frame.select(squares.sqrt().alias("error"))["error"]
    assert expected.null_count() == frame["value"].null_count()
    np.testing.assert_allclose(frame["value_error"].fill_null(0), expected.fill_null(0), rtol=1e-6)
    names = frame.columns

    def without(*arguments: Any, **options: Any) -> Iterator[pl.DataFrame]:
        for each in iter_part_scores(*arguments, **options):
            yield each.drop("error_junk")

    monkeypatch.setattr(selection, "iter_part_scores", without)
    _, some = _select(world, "errors-of-some")
    assert some["value_error"].null_count() == some.height
    assert "error_junk" not in some.columns
    assert names[names.index("score_backdoor") + 1 : names.index("value")] == [
        "error_good", "error_junk", "error_backdoor"
    ]  # fmt: skip


def test_only_targets_to_exclude_by_leave_all_values_at_nothing(world: World) -> None:
    decide(
        world.indexed.store, world.indexed.version, run_id="weightless", parts=world.parts, weights={},
        targets=list(TARGETS), aggregate="mean", memory=2**30,
        selection=SelectionConfig(exclude=[{"target": "backdoor", "top_rows": 5}]),
    )  # fmt: skip
    frame = world.indexed.store.scan_parquet([decisions_key("weightless")]).collect()
    assert set(frame["value"].to_list()) == {0.0, None}
    assert frame.filter(reason="no_prediction")["value"].null_count() == frame.filter(reason="no_prediction").height > 0
    assert frame.filter(reason="excluded_target").height == 5


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"exclude": [{"pattern": "x", "field": "langs"}]},
            ConfigError,
            r"selection\.exclude\[0\]\.field: corpus corpus has no column 'langs'; it has .*lang",
        ),
        ({"per_label": {"max_rows": 1}}, ConfigError, r"selection\.per_label\.field: .* no column 'label'"),
        (
            {"exclude": [{"pattern": "."}]},
            SelectionError,
            r"keeps none of 480 rows: .*; of all, 2 no_prediction, 478 excluded_pattern \(selection\.exclude\[0\]\)",
        ),
        (
            {"exclude": [{"target": "good", "top_fraction": 0.99}], "keep": {"min_percentile": 99}},
            None,
            "",
        ),
        ({"sample": {}, "keep": {"rows": 5, "min_value": -9}, "exclude": [{"target": "good", "min_score": -0.9}]},
         SelectionError, "478 excluded_target"),
        (
            {"per_label": {"field": "kind", "groups": {"poems": {"min_rows": 3}}}},
            SelectionError,
            r"selection\.per_label\.groups\.poems\.min_rows asks for at least 3 rows of label 'poems'; 0 are left",
        ),
        (
            {"per_source": {"by": "folder", "min_rows": 200}, "keep": {"rows": 300}},
            SelectionError,
            r"selection\.per_source\.min_rows asks for at least 200 rows of source '.*/books/'; 8\d are left",
        ),
        ({"per_source": {"by": "folder", "max_fraction": 0.2}}, SelectionError, r"rows left \(3\) add up to 0\.6"),
        ({"keep": {"fraction": 0.001}, "per_source": {"max_fraction": 0.5}}, SelectionError, "keeps none of 480 rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_with_the_numbers(
    world: World, config: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    name = fingerprinted(config)
    if error is None:
        assert _select(world, name, **config)[0].kept > 0
        return
    with pytest.raises(error, match=message):
        _select(world, name, **config)
    assert not world.indexed.store.exists(decisions_key(name))


def test_too_many_labels_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_groups, "MOST_LABELS", 100)
    with pytest.raises(LimitError, match=r"column 'id' has more than 100 different values"):
        _select(world, "labels", per_label={"field": "id", "max_rows": 1})


def test_labels_are_cut_and_patterns_see_the_whole(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"row {n}", "label": "x" * (150 + n * 10), "tail": None} for n in range(10)]
    rows[7]["tail"] = {"deep": ["é", 1]}
    write_as(tmp_path / "a.jsonl", rows)
    store = Store(str(tmp_path / "store"))
    version = ingest_all(store, corpus_of(tmp_path / "a.jsonl"))
    (block,) = block_rows(store, version)
    own = signed(10)
    write_block(store, INDEX, block, own, seconds=0.0, producer={})
    indexed = Indexed(store, version, [block], {block: own})
    parts = score_parts(indexed, {"good": make_target(2)})
    config = SelectionConfig(
        exclude=[{"pattern": "x{230}", "field": "label"}, {"pattern": r'^\{"deep": \["\\u00e9"', "field": "tail"}],
        per_label={"max_rows": 1},
    )
    decide(store, version, run_id="run", parts=parts, weights={"good": 1.0}, targets=["good"], aggregate="mean",
           selection=config, memory=2**30)  # fmt: skip
    frame = store.scan_parquet([decisions_key("run")]).collect().sort("source_row")
    assert frame["label"].str.len_chars().to_list() == [150, 160, 170, 180, 190, *[200] * 5]
    assert frame["rule"].to_list()[7:] == ["selection.exclude[1]", *["selection.exclude[0]"] * 2]
    assert sorted(frame["reason"].to_list()[:7]) == ["kept"] * 6 + ["over_label_quota"]


@pytest.mark.parametrize(
    ("uri", "by", "patterns", "expected"),
    [
        ("s3://raw/a/b.jsonl", "object", [], "s3://raw/a/b.jsonl"),
        ("s3://raw/a/b.jsonl", "folder", [], "s3://raw/a/"),
        ("/data/x.jsonl", "folder", [], "/data/"),
        ("s3://raw/a/b.jsonl", "pattern", ["s3://raw/*.jsonl", "s3a://raw/*/*.jsonl"], "s3a://raw/*/*.jsonl"),
        ("s3://raw/a/b/c.jsonl", "pattern", ["s3://raw/**/*.jsonl"], "s3://raw/**/*.jsonl"),
        ("s3://raw/c.jsonl", "pattern", ["s3://raw/**/*.jsonl"], "s3://raw/**/*.jsonl"),
        ("s3://raw/a/b/c.jsonl", "pattern", ["s3://raw/**"], "s3://raw/**"),
        ("/raw/a.jsonl", "pattern", ["file:///raw/?.jsonl"], "file:///raw/?.jsonl"),
        ("/raw/a.jsonl", "pattern", ["s3://raw/a.jsonl", "/raw/b.jsonl"], "/raw/a.jsonl"),
        ("/raw/[x].jsonl", "pattern", ["/raw/[x].jsonl"], "/raw/[x].jsonl"),
    ],
)
def test_what_a_source_is_called(uri: str, by: Any, patterns: list[str], expected: str) -> None:
    assert source_name(uri, by, patterns) == expected


def _drawn(values: Float32Array, draws: int, **sample: Any) -> np.ndarray[Any, Any]:
    """How often each of some rows comes first and is among the first two."""
    from rise_ops.config import SampleConfig
    from rise_ops.ordering import RECORD
    from rise_ops.sampling import Draw

    r = np.random.default_rng(0)
    counts = np.zeros((2, len(values)))
    records = np.zeros(len(values), RECORD)
    for seed in range(draws):
        ranking.by_value(records, values, np.ones(len(values), bool), r.integers(0, 2**63, len(values), np.uint64))
        drawn, chances = Draw(SampleConfig(seed=seed, **sample)).keys(records)
        order = np.argsort(drawn["key"][chances])
        counts[0, order[0]] += 1
        counts[1, order[:2]] += 1
    return counts / draws


def test_chances_are_in_proportion_to_values() -> None:
    """The first draw has chance wᵢ/W; the second Σⱼ wⱼ/W · wᵢ/(W − wⱼ)."""
    values = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
    for sample, weights in (({}, values), ({"temperature": 0.2}, np.exp(values / 0.2))):
        chances = weights / weights.sum()
        both = chances + np.array(
            [sum(chances[j] * chances[i] / (1 - chances[j]) for j in range(4) if j != i) for i in range(4)]
        )
        found = _drawn(values, 6_000, **sample)
        np.testing.assert_allclose(found, [chances, both], atol=4 * 0.5 / np.sqrt(6_000))


def test_a_draw_is_the_rows_own(world: World) -> None:
    """Another seed draws others; the same one the same, whatever else is in the corpus."""
    draws = {}
    for seed in (1, 2):
        _, frame = _select(world, f"draw-{seed}", sample={"seed": seed, "temperature": 0.1}, keep={"rows": 100})
        draws[seed] = frame
    assert 20 < draws[1].join(draws[2].filter("kept"), on=["source_uri", "source_row"]).filter("kept").height < 60
    fewer = replace(world, parts=world.parts)
    _, without = _select(fewer, "draw-without", sample={"seed": 1, "temperature": 0.1}, keep={"rows": 50},
                         exclude=[{"pattern": "SECRET"}])  # fmt: skip
    order = draws[1].drop_nulls("rank").sort("rank").filter(
        ~pl.col("doc_id").is_in(without.filter(reason="excluded_pattern")["doc_id"].to_list())
    )  # fmt: skip
    assert without.drop_nulls("rank").sort("rank")["doc_id"].to_list() == order["doc_id"].to_list()


def test_copies_are_drawn_each_for_itself(world: World) -> None:
    _, frame = _select(world, "draw-copies", sample={"temperature": 10.0}, keep={"rows": 100})
    copied = frame.filter(pl.col("doc_id").is_duplicated(), pl.col("value").is_not_null()).group_by("doc_id")
    ranks = [sorted(group["rank"].to_list()) for _, group in copied]
    assert sum(later - earlier == 1 for earlier, later in ranks) < len(ranks) / 4


def test_rows_of_no_chance_say_so(world: World) -> None:
    _, frame = _select(world, "no-chance", sample={}, keep={"rows": 10_000})
    valued = frame.drop_nulls("value")
    assert set(valued.filter(pl.col("value") <= 0)["reason"]) == {"not_sampled"}
    assert set(valued.filter(pl.col("value") > 0)["reason"]) == {"kept"}
    assert re.fullmatch(r"selection\.sample", valued.filter(reason="not_sampled")["rule"].unique().item())
