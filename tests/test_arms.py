"""Arms: orders, budgets, BM25 over the queries that count, and what is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import polars as pl
import pytest

from rise_ops.arms import (
    Candidates,
    arm_key,
    arm_texts,
    mean_relevance,
    order_of,
    positive_queries,
    read_arm,
    read_candidates,
    refuse_budget,
    refuse_seen,
    take,
    write_arms,
)
from rise_ops.blocks import read_block
from rise_ops.config import CurationConfig
from rise_ops.errors import ConfigError, LimitError
from rise_ops.runs import decisions_key
from rise_ops.session import block_rows
from rise_ops.store import Store
from tests.corpora import ingest_all
from tests.curation import ROWS, load, write_curation, write_lines

LOOP = {"tokens": 200, "held_out": {"backdoor": {"queries": "queries.jsonl"}}, "seeds": 2}


@pytest.fixture
def config(tmp_path: Path) -> CurationConfig:
    return load(write_curation(tmp_path, closed_loop=LOOP, value={"backdoor": 1.0}))


def _candidates(values: list[float], tokens: list[int], ties: list[int] | None = None) -> Candidates:
    ties = ties or list(range(len(values)))
    columns = {"block_id": ["b"] * len(values), "block_row": range(len(values)), "doc_id": [str(tie) for tie in ties]}
    numbers = {"tokens": pl.Series(tokens, dtype=pl.Int32), "value": pl.Series(values, dtype=pl.Float32)}
    return Candidates(pl.DataFrame({**columns, **numbers, "tie": pl.Series(ties, dtype=pl.UInt64)}))


def test_rows_that_fit_are_taken_and_others_passed_over() -> None:
    tokens = np.array([5, 9, 4, 1, 7, 2])
    assert take(np.array([0, 1, 2, 4, 5, 3]), tokens, 12).tolist() == [0, 2, 5, 3]
    assert take(np.array([1, 0, 2, 3, 4, 5]), tokens, 9).tolist() == [1]
    assert take(np.arange(6), tokens, 28).tolist() == [0, 1, 2, 3, 4, 5]


def test_orders_are_by_value_length_and_relevance() -> None:
    rows = _candidates([0.5, -1.0, 0.5, 2.0], [3, 9, 9, 1], ties=[7, 1, 3, 2])
    assert order_of("rise", rows, seed=0).tolist() == [3, 2, 0, 1]  # of equal values the lower doc_id
    assert order_of("lowest", rows, seed=0).tolist() == [1, 2, 0, 3]
    assert order_of("length", rows, seed=0).tolist() == [1, 2, 0, 3]
    relevance = np.array([0.1, 3.0, 0.0, 0.1], np.float32)
    assert order_of("bm25", rows, seed=0, relevance=relevance).tolist() == [1, 3, 0, 2]


def test_chance_is_another_permutation_for_each_seed() -> None:
    rows = _candidates([0.0] * 50, [1] * 50)
    orders = [order_of("random", rows, seed=seed).tolist() for seed in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert orders[3] == order_of("random", rows, seed=3).tolist()


def test_a_budget_that_leaves_no_choice_is_refused() -> None:
    rows = _candidates([1.0, 2.0], [30, 40])
    with pytest.raises(ConfigError, match="tokens is 70, but the 2 rows have 70 tokens"):
        refuse_budget(rows, 70)
    with pytest.raises(ConfigError, match="tokens is 29, but the shortest row has 30"):
        refuse_budget(rows, 29)
    refuse_budget(rows, 69)


def _decided(config: CurationConfig) -> tuple[Store, dict[str, int], pl.DataFrame]:
    """A corpus with decisions: values and tokens are drawn, one row has no value, and seven rows are there twice."""
    store = Store(config.store)
    version = ingest_all(store, config.corpus)
    blocks, generator = block_rows(store, version), np.random.default_rng(0)
    frames = [
        read_block(store, block).select("doc_id", pl.lit(block).alias("block_id")).with_row_index("block_row")
        for block in blocks
    ]
    frame = pl.concat(frames).with_columns(
        tokens=pl.Series(generator.integers(3, 30, ROWS), dtype=pl.Int32),
        value=pl.Series([None, *generator.normal(size=ROWS - 1).tolist()], dtype=pl.Float32),
    )
    path = Path(config.store) / decisions_key("run")
    path.parent.mkdir(parents=True)
    pl.concat([frame, frame.tail(7)]).write_parquet(path)
    return store, blocks, frame


def test_candidates_are_the_rows_with_a_value_once(config: CurationConfig) -> None:
    store, _, frame = _decided(config)
    found = read_candidates(store, "run").frame
    assert found["doc_id"].to_list() == frame["doc_id"].to_list()[1:]
    assert found["tie"].to_list() == [int(doc[:16], 16) for doc in found["doc_id"].to_list()]


def _terms(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def test_relevance_is_the_mean_over_queries(config: CurationConfig) -> None:
    store, blocks, frame = _decided(config)
    candidates = read_candidates(store, "run")
    found = mean_relevance(store, config, candidates, blocks)
    texts = [text for block in blocks for text in read_block(store, block)["text"].to_list()]
    library = bm25s.BM25(k1=1.5, b=0.75)
    terms = [_terms(text) for text in texts]
    library.index(terms, show_progress=False)
    asked = [_terms(query.text) for query in positive_queries(config)]
    known = {term for row in terms for term in row}
    plain = np.mean([library.get_scores([term for term in query if term in known]) for query in asked], axis=0)
    assert found == pytest.approx(plain[1:], rel=1e-5)  # without the row that has no value
    assert len(found) == frame.height - 1


def _changed(config: CurationConfig, **changes: Any) -> CurationConfig:
    return CurationConfig.model_validate({**config.model_dump(mode="json"), **changes})


def test_rows_that_are_held_out_are_refused(config: CurationConfig) -> None:
    store, _, frame = _decided(config)
    candidates = read_candidates(store, "run")
    refuse_seen(candidates, {"one": ["0" * 64], "two": []})
    with pytest.raises(ConfigError, match=r"held_out\.two: 2 rows of the corpus are texts of this set"):
        refuse_seen(candidates, {"one": ["0" * 64], "two": frame["doc_id"].to_list()[3:5]})


def test_only_targets_of_positive_weight_ask(config: CurationConfig, tmp_path: Path) -> None:
    write_lines(tmp_path / "other.jsonl", [{"text": "something else"}])
    targets: Mapping[str, Any] = {"backdoor": {"queries": str(tmp_path / "queries.jsonl")},
                                  "other": {"queries": str(tmp_path / "other.jsonl")}}  # fmt: skip
    both = _changed(config, targets=targets, value={"backdoor": -1.0, "other": 0.5})
    assert [query.text for query in positive_queries(both)] == ["something else"]
    with pytest.raises(ConfigError, match="bm25 needs a target with a positive weight"):
        positive_queries(_changed(config, value={"backdoor": -1.0}))


def test_an_index_that_does_not_fit_is_refused(config: CurationConfig) -> None:
    store, blocks, _ = _decided(config)
    tight = config.model_copy(update={"limits": config.limits.model_copy(update={"memory": 100_000})})
    with pytest.raises(LimitError, match="bm25 needs"):
        mean_relevance(store, tight, read_candidates(store, "run"), blocks)


def test_all_arms_are_stored_at_one_budget(config: CurationConfig) -> None:
    store, blocks, frame = _decided(config)
    assert config.closed_loop is not None
    found = write_arms(store, config, config.closed_loop, read_candidates(store, "run"), loop_id="l", blocks=blocks)
    assert list(found) == [f"{arm}-{seed}" for arm in config.closed_loop.arms for seed in (0, 1)]
    shortest = int(frame["tokens"].min())  # type: ignore[arg-type]
    for each in found.values():
        rows = read_arm(store, "l", each["arm"], each["seed"])
        assert store.exists(arm_key("l", each["arm"], each["seed"]))
        assert (rows.height, rows["tokens"].sum()) == (each["rows"], each["tokens"])
        assert 200 - shortest < each["tokens"] <= 200
    docs = {name: read_arm(store, "l", each["arm"], each["seed"])["doc_id"].to_list() for name, each in found.items()}
    assert docs["rise-0"] == docs["rise-1"] and docs["random-0"] != docs["random-1"]
    assert docs["rise-0"][0] == frame.filter(pl.col("value") == pl.col("value").max())["doc_id"].item()
    assert docs["lowest-0"][0] == frame.filter(pl.col("value") == pl.col("value").min())["doc_id"].item()
    assert len(docs["length-0"]) < len(docs["random-0"])
    assert docs["bm25-0"] != docs["random-0"]


def test_an_arm_s_texts_are_those_of_its_rows(config: CurationConfig) -> None:
    store, blocks, _ = _decided(config)
    assert config.closed_loop is not None
    write_arms(store, config, config.closed_loop, read_candidates(store, "run"), loop_id="l", blocks=blocks)
    rows = read_arm(store, "l", "random", 1)
    texts = {doc: text for block in blocks for doc, text in read_block(store, block).select("doc_id", "text").rows()}
    found = [text for batch in arm_texts(store, rows) for text in batch]
    assert sorted(found) == sorted(texts[doc] for doc in rows["doc_id"].to_list())
