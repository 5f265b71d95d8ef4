"""Evaluation: the figures, and the protocol on a corpus whose ranking is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.attribution import find_extremes
from rise_ops.errors import ConfigError, IntegrityError, SelectionError
from rise_ops.evaluation import (
    Evaluation,
    Label,
    average_precision,
    count_labels,
    evaluate,
    evaluate_run,
    roc_area,
)
from rise_ops.index import write_block
from rise_ops.session import block_rows
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from rise_ops.targets import Target, read_target
from tests.corpora import corpus_of, ingest_all, write_as
from tests.indexed import INDEX, Indexed, make_target, score_parts, store_target

_RANKINGS = st.lists(st.booleans(), min_size=1, max_size=60)


def _ranked(relevant: list[bool]) -> npt.NDArray[np.bool_]:
    return np.array(relevant, dtype=bool)


@settings(deadline=None)
@given(relevant=_RANKINGS)
def test_figures_equal_a_plain_loop(relevant: list[bool]) -> None:
    precisions = [sum(relevant[: place + 1]) / (place + 1) for place, good in enumerate(relevant) if good]
    expected = sum(precisions) / len(precisions) if precisions else 0.0
    assert average_precision(_ranked(relevant)) == pytest.approx(expected)
    pairs = [
        first < second
        for first, good in enumerate(relevant)
        for second, other in enumerate(relevant)
        if good and not other
    ]
    area = roc_area(_ranked(relevant))
    assert area == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@settings(deadline=None)
@given(relevant=_RANKINGS.filter(lambda relevant: any(relevant) and not all(relevant)))
def test_figures_equal_scikit_learn(relevant: list[bool]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    scores = -np.arange(len(relevant))
    assert average_precision(_ranked(relevant)) == pytest.approx(metrics.average_precision_score(relevant, scores))
    assert roc_area(_ranked(relevant)) == pytest.approx(metrics.roc_auc_score(relevant, scores))


def _ladder(folder: Path, rows: list[dict[str, Any]], *, scored: int | None = None) -> Indexed:
    """A corpus whose row i has score 1 - i / 100 on a query along the first axis."""
    write_as(folder / "pool.jsonl", [{"text": f"row {number}", **row} for number, row in enumerate(rows)])
    store = Store(str(folder / "store"))
    version = ingest_all(store, corpus_of(folder / "pool.jsonl"))
    (block,) = block_rows(store, version)
    signature = np.zeros((len(rows), 4), dtype=np.float16)
    signature[:, 0] = 1 - np.arange(len(rows)) / 100
    chunks = np.ones(len(rows), dtype=np.int32)
    chunks[scored:] = 0 if scored is not None else 1
    signatures = RowSignatures(signature, np.full(len(rows), 5, dtype=np.int32), chunks)
    write_block(store, INDEX, block, signatures, seconds=0, producer={})
    return Indexed(store, version, [block], {block: signatures})


def _queries(columns: list[dict[str, Any]], signs: list[float]) -> Target:
    made = make_target(len(columns), columns=columns)
    signature = np.zeros((len(columns), 4), dtype=np.float32)
    signature[:, 0] = signs
    return Target(made.target_id, made.queries, signature)


def _evaluate(indexed: Indexed, target: Target, label: str, ks: list[int]) -> Evaluation:
    extremes = find_extremes(indexed.store, INDEX, indexed.blocks, {"t": target}, k=max(ks))
    return evaluate(indexed.store, indexed.blocks, extremes, target, label=Label.parse(label), ks=ks)


def test_the_protocol_on_ten_rows(tmp_path: Path) -> None:
    labels = ["x", "y", "x", "y", "y", "y", "x", "y", "y", "x"]
    indexed = _ladder(tmp_path, [{"kind": label} for label in labels])
    found = _evaluate(indexed, _queries([{}, {}], [1.0, -1.0]), "kind=x", [1, 2, 5])
    assert (found.rows, found.positives, found.queries) == (10, 4, 2)
    # K = 1: first query ranks rows 0, 9: x x; second 9, 0: x x. Neither has two classes.
    assert found.top_k["1"] == {"auprc": 1.0, "auroc": None, "precision": 1.0}
    # K = 2: rows 0 1 8 9: x y y x, and its mirror, the same.
    assert found.top_k["2"] == {"auprc": pytest.approx((1 + 2 / 4) / 2), "auroc": 0.5, "precision": 0.5}
    # K = 5: all rows: relevant at 1, 3, 7, 10 and, mirrored, at 1, 4, 8, 10.
    first, second = (1 + 2 / 3 + 3 / 7 + 4 / 10) / 4, (1 + 2 / 4 + 3 / 8 + 4 / 10) / 4
    assert found.top_k["5"]["auprc"] == pytest.approx((first + second) / 2)
    assert found.top_k["5"]["precision"] == pytest.approx((2 / 5 + 2 / 5) / 2)


def test_no_row_counts_twice(tmp_path: Path) -> None:
    labels = ["x", "y", "x", "y", "y", "x"]
    indexed = _ladder(tmp_path, [{"kind": label} for label in labels], scored=5)
    found = _evaluate(indexed, _queries([{}], [1.0]), "kind=x", [4, 50])
    expected = {"auprc": pytest.approx((1 + 2 / 3) / 2), "auroc": pytest.approx(5 / 6)}
    assert found.top_k["4"] == {**expected, "precision": 0.5}
    assert found.top_k["50"] == {**expected, "precision": pytest.approx(2 / 5)}
    assert (found.rows, found.positives) == (6, 3)


def test_each_query_has_its_own_label(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"n": 1}, {"n": 1}, {"n": "1"}, {"n": True}, {"n": [1, "é"]}, {"other": 0}]
    indexed = _ladder(tmp_path, rows)
    target = _queries([{"n": 1}, {"n": [1, "é"]}, {"n": True}], [1.0, -1.0, 1.0])
    found = _evaluate(indexed, target, "n", [2])
    assert found.positives == 3 + 1 + 1  # the number 1 and the text "1" read the same
    assert found.top_k["2"]["precision"] == pytest.approx((2 / 2 + 1 / 2 + 0) / 3)


def test_the_text_itself_can_be_the_label(tmp_path: Path) -> None:
    indexed = _ladder(tmp_path, [{}, {}, {}])
    assert _evaluate(indexed, _queries([{}], [1.0]), "text=row 1", [3]).positives == 1


@pytest.mark.parametrize(
    ("label", "columns", "message"),
    [
        ("nothing", {"nothing": "x"}, "no row of the corpus has this field"),
        ("empty", {"empty": "x"}, "no row of the corpus has this field"),
        ("kind", {}, "query 1 has no 'kind'"),
        ("kind", {"kind": None}, "query 1 has no 'kind'"),
        ("kind=z", {}, "kind=z: no row has this value; rows have: x, y"),
        ("=x", {}, "FIELD=VALUE"),
    ],
)
def test_a_label_that_is_not_there_is_refused(
    tmp_path: Path, label: str, columns: dict[str, Any], message: str
) -> None:
    indexed = _ladder(tmp_path, [{"kind": "x", "empty": None}, {"kind": "y"}])
    with pytest.raises(ConfigError, match=message):
        _evaluate(indexed, _queries([columns], [1.0]), label, [1])


def test_a_corpus_without_scores_is_refused(tmp_path: Path) -> None:
    indexed = _ladder(tmp_path, [{"kind": "x"}], scored=0)
    with pytest.raises(SelectionError, match="none was scored"):
        _evaluate(indexed, _queries([{}], [1.0]), "kind=x", [1])


@pytest.mark.parametrize(
    ("rows", "queries", "named"),
    [
        ([{"label": "x"}, {"label": "y"}], [{"label": "x"}], True),
        ([{"label": "x"}, {"label": "y"}], [{"label": "z"}], True),
        ([{"label": None}], [{"label": "x"}], False),
        ([{}], [{"label": "x"}], False),
        ([{"label": "x"}], [{"label": "x"}, {"label": None}], False),
        ([{"label": "x"}], [{}], False),
    ],
)
def test_a_run_is_evaluated_where_both_sides_have_labels(
    tmp_path: Path, rows: list[dict[str, Any]], queries: list[dict[str, Any]], named: bool
) -> None:
    indexed = _ladder(tmp_path, rows)
    target = _queries(queries, [1.0] * len(queries))
    name = store_target(indexed.store, target)
    parts = score_parts(indexed, {"good": target})
    found = evaluate_run(indexed.store, indexed.version, indexed.blocks, {"good": name}, parts)
    if not named:
        assert found is None
        return
    assert found is not None
    assert json.loads(json.dumps(found))["good"]["queries"] == len(queries)
    assert set(found["good"]["top_k"]) == {"5", "10", "50"}


def test_labels_are_counted_without_keeping_all_of_them(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"id": f"{number:04d}"} for number in range(500)]
    rows += [{"id": "0007"}, {"id": None}]
    indexed = _ladder(tmp_path, rows)
    counts = count_labels(indexed.store, indexed.blocks, "id", ["0007", "0499", "none"])
    assert counts.rows == 502
    assert counts.wanted == {"0007": 2, "0499": 1, "none": 0}
    assert counts.first == [f"{number:04d}" for number in range(5)]


def test_a_damaged_target_is_noticed(tmp_path: Path) -> None:
    indexed = _ladder(tmp_path, [{}])
    name = store_target(indexed.store, _queries([{}], [1.0]))
    assert read_target(indexed.store, name).queries.height == 1
    indexed.store.delete([f"targets/{name}.zarr/signature/c/0/0"])
    with pytest.raises(IntegrityError, match="does not match the checksums"):
        read_target(indexed.store, name)


def test_labels_are_parsed() -> None:
    assert Label.parse("a=b=c") == Label("a", "b=c")
    assert Label.parse("a=") == Label("a", "")
    assert Label.parse("a") == Label("a", None)
