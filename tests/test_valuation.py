"""Valuation: the three aggregates as brute force computes them, whatever the parts are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest

from rise_ops import valuation
from rise_ops.config import KeepConfig, SelectionConfig
from rise_ops.runs import decisions_key
from rise_ops.selection import decide
from rise_ops.store import Store
from rise_ops.uncertainty import noise_queries, noise_squares, standard_errors
from rise_ops.valuation import Aggregate, iter_part_scores, read_extremes
from tests.corpora import make_rows
from tests.indexed import SKETCH, Indexed, index_rows, make_target, score_parts

SILENT = 2
TARGETS = {"good": make_target(5, seed=1), "bad": make_target(3, seed=2)}
WEIGHTS = {"good": 1.0, "bad": -0.5}


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    folder = tmp_path_factory.mktemp("valuation")
    sizes = {"a": 700, "b": 300, "c": 20, "d": 5}
    files = {f"{name}.jsonl": make_rows(rows, seed=rows) for name, rows in sizes.items()}
    made = index_rows(Store(str(folder / "store")), folder, files, silent=SILENT)
    assert len(made.blocks) >= 3
    return made


def _decide(indexed: Indexed, run_id: str, aggregate: Aggregate, *, size: int, weights: dict[str, float],
            ) -> pl.DataFrame:  # fmt: skip
    parts = score_parts(indexed, TARGETS, aggregate=aggregate, run_id=run_id, size=size)
    decide(
        indexed.store,
        indexed.version,
        run_id=run_id,
        parts=parts,
        weights=weights,
        targets=list(TARGETS),
        aggregate=aggregate,
        selection=SelectionConfig(keep=KeepConfig()),
        memory=2**30,
    )
    return indexed.store.scan_parquet([decisions_key(run_id)]).collect()


def _brute(indexed: Indexed, name: str, aggregate: Aggregate) -> npt.NDArray[np.float64]:
    scores = indexed.matrix @ TARGETS[name].signature.T
    if aggregate == "mean":
        return np.asarray(scores.mean(axis=1, dtype=np.float64))
    if aggregate == "max":
        return np.asarray(scores.max(axis=1), dtype=np.float64)
    usable = np.flatnonzero(indexed.chunks > 0)
    value = np.zeros(len(scores))
    for column in scores.T:
        order = usable[np.argsort(-column[usable], kind="stable")]
        value[order] += 1.0 / (60 + np.arange(1, len(order) + 1))
    return value


@pytest.mark.parametrize("aggregate", ["mean", "max", "rrf"])
def test_scores_and_values_equal_brute_force(indexed: Indexed, aggregate: Aggregate) -> None:
    frame = _decide(indexed, f"brute-{aggregate}", aggregate, size=2, weights=WEIGHTS)
    silent = indexed.chunks == 0
    assert silent.sum() == SILENT * len(indexed.blocks)
    total = np.zeros(len(silent))
    for name, weight in WEIGHTS.items():
        expected = _brute(indexed, name, aggregate)
        total += weight * expected
        found = frame[f"score_{name}"]
        assert found.is_null().to_numpy().tolist() == silent.tolist()
        np.testing.assert_allclose(found.drop_nulls(), expected[~silent], atol=1e-6)
    assert frame["doc_id"].to_list() == indexed.rows["doc_id"].to_list()
    np.testing.assert_allclose(frame["value"].drop_nulls(), total[~silent], atol=2e-6)
    assert not frame.filter(pl.col("value").is_null())["kept"].any()
    assert set(frame.filter(pl.col("value").is_null())["reason"]) == {"no_prediction"}


@pytest.mark.parametrize("aggregate", ["mean", "max", "rrf"])
def test_parts_do_not_matter(indexed: Indexed, aggregate: Aggregate) -> None:
    one = _decide(indexed, f"one-{aggregate}", aggregate, size=100, weights=WEIGHTS)
    many = _decide(indexed, f"many-{aggregate}", aggregate, size=1, weights=WEIGHTS)
    assert one.equals(many)


def test_a_target_without_weight_is_scored_but_does_not_count(indexed: Indexed) -> None:
    frame = _decide(indexed, "weightless", "mean", size=100, weights={"bad": 2.0})
    np.testing.assert_allclose(frame["value"].drop_nulls(), 2 * frame["score_bad"].drop_nulls(), atol=1e-6)
    assert frame["score_good"].null_count() == SILENT * len(indexed.blocks)


def test_fusion_ignores_rows_beyond_its_depth(indexed: Indexed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(valuation, "RRF_DEPTH", 60)
    one = _decide(indexed, "depth-one", "rrf", size=100, weights=WEIGHTS)
    many = _decide(indexed, "depth-many", "rrf", size=1, weights=WEIGHTS)
    assert one.equals(many)
    scores = indexed.matrix @ TARGETS["good"].signature.T
    scores[indexed.chunks == 0] = -2
    named = np.unique(np.argsort(-scores, axis=0, kind="stable")[:60])
    assert set(np.flatnonzero(one["score_good"].fill_null(0.0).to_numpy())) == set(named)


@pytest.mark.parametrize("size", [1, 100])
def test_extremes_of_all_parts_merge(indexed: Indexed, size: int) -> None:
    run_id = f"extremes-{size}"
    parts = score_parts(indexed, TARGETS, run_id=run_id, size=size)
    merged = read_extremes(indexed.store, parts, k=7)
    rows = indexed.rows
    for name, target in TARGETS.items():
        scores = indexed.matrix @ target.signature.T
        for query, column in enumerate(scores.T):
            usable = np.flatnonzero(indexed.chunks > 0)
            for side, sign in (("top", -1), ("bottom", 1)):
                order = usable[np.argsort(sign * column[usable])]
                here = (pl.col("target") == name) & (pl.col("query") == query) & (pl.col("side") == side)
                mine = merged.filter(here).sort("rank")
                assert mine["rank"].to_list() == list(range(1, 8))
                np.testing.assert_allclose(mine["score"], column[order[:7]], atol=1e-6)
                named = rows[order[:7].tolist()].select("block", "block_row")
                assert mine.select("block", "block_row").rows() == named.rows()


def test_names_of_columns_are_good_names_of_targets(tmp_path: Path) -> None:
    indexed = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": make_rows(20)})
    targets = {"block": make_target(2), "block_row": make_target(3, seed=3), "rank": make_target(1, seed=4)}
    parts = score_parts(indexed, targets, aggregate="rrf")
    decide(
        indexed.store, indexed.version, run_id="run", parts=parts, weights=dict.fromkeys(targets, 1.0),
        targets=list(targets), aggregate="rrf", selection=SelectionConfig(keep=KeepConfig()), memory=2**30,
    )  # fmt: skip
    frame = indexed.store.scan_parquet([decisions_key("run")]).collect()
    total = frame["score_block"] + frame["score_block_row"] + frame["score_rank"]
    np.testing.assert_allclose(total, frame["value"], atol=1e-6)


def test_errors_stand_beside_scores_and_top_n_is_a_mean_of_the_best(indexed: Indexed) -> None:
    run_id = "top-2"
    parts = score_parts(indexed, TARGETS, aggregate="top-2", run_id=run_id, size=2)
    frame = pl.concat(iter_part_scores(indexed.store, parts, list(TARGETS), "top-2", rows=10_000))
    usable = frame["chunks"].to_numpy() > 0
    for name, target in TARGETS.items():
        scores = np.sort(indexed.matrix @ target.signature.T, axis=1)[:, -2:].mean(axis=1)
        np.testing.assert_allclose(frame[f"score_{name}"].to_numpy()[usable], scores[usable], atol=1e-5)
        squares = noise_squares(indexed.matrix @ noise_queries(target.signature, SKETCH, "top-2").T)
        for place in range(len(indexed.blocks)):
            mine = frame["block"].to_numpy() == place
            expected = standard_errors(squares[mine], usable[mine])[usable[mine]]
            np.testing.assert_allclose(frame[f"error_{name}"].to_numpy()[mine & usable], expected, atol=1e-5)
    silent = frame.filter(pl.col("chunks") == 0).select(
        f"{kind}_{name}" for kind in ("score", "error") for name in TARGETS
    )
    assert silent.height and silent.null_count().row(0) == (silent.height,) * silent.width
