"""Attribution: the hits are those of brute force, with their texts and places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rise_ops import attribution
from rise_ops.attribution import Attribution, attribute, explain, find_extremes
from rise_ops.config import KeepConfig, SelectionConfig, load_config
from rise_ops.errors import ModelError
from rise_ops.evaluation import Label, evaluate_corpus
from rise_ops.examples import HITS, QUERIES, examples_key, write_examples
from rise_ops.index import prepare_index
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_corpus
from rise_ops.judged_rows import ROWS
from rise_ops.selection import decide
from rise_ops.session import block_rows, open_signer
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.targets import read_queries
from tests.corpora import corpus_of, make_rows, write_as
from tests.curation import PLANTED, write_curation
from tests.curation import ROWS as ROWS_OF_CURATION
from tests.indexed import INDEX, Indexed, index_corpus, index_rows, make_target, score_parts, store_target

TARGET = make_target(4)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    """A large object with a copy, and small ones with a copy."""
    folder = tmp_path_factory.mktemp("attribution")
    for name, rows in (("large", 500), ("small", 30), ("other", 40)):
        write_as(folder / f"raw/{name}.jsonl", make_rows(rows, seed=rows))
    for name in ("large", "small"):
        shutil.copy(folder / f"raw/{name}.jsonl", folder / f"raw/copy of {name}.jsonl")
    return index_corpus(Store(str(folder / "store")), corpus_of(folder / "raw/*.jsonl"), silent=2)


def _attribute(indexed: Indexed, k: int) -> list[Attribution]:
    extremes = find_extremes(indexed.store, INDEX, indexed.blocks, {"queries": TARGET}, k=k)
    return explain(indexed.store, indexed.version, indexed.blocks, TARGET, extremes)


@pytest.mark.parametrize("at_once", [1, 32])
def test_hits_equal_brute_force(indexed: Indexed, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(attribution, "_BLOCKS_AT_ONCE", at_once)
    found = _attribute(indexed, 12)
    rows, usable = indexed.rows, np.flatnonzero(indexed.chunks > 0)
    scores = indexed.matrix @ TARGET.signature.T
    assert [item.query for item in found] == TARGET.queries["text"].to_list()
    for query, item in enumerate(found):
        column = scores[usable, query]
        for hits, order in ((item.hits, np.argsort(-column)), (item.bottom, np.argsort(column))):
            named = rows[usable[order[:12]].tolist()]
            assert [hit.doc_id for hit in hits] == named["doc_id"].to_list()
            assert [hit.text for hit in hits] == named["text"].to_list()
            np.testing.assert_allclose([hit.score for hit in hits], column[order[:12]], atol=1e-6)


def test_places_are_where_the_texts_stand(indexed: Indexed) -> None:
    places = [hit for item in _attribute(indexed, 40) for hit in (*item.hits, *item.bottom)]
    for hit in places:
        line = Path(hit.source_uri).read_text().splitlines()[hit.source_row]
        assert json.loads(line)["text"] == hit.text
    names = {Path(hit.source_uri).name for hit in places}
    assert names == {"copy of large.jsonl", "copy of small.jsonl", "other.jsonl"}  # of two places, the first


def test_json_has_the_bottom_only_when_asked(indexed: Indexed) -> None:
    item = _attribute(indexed, 2)[0]
    value = item.to_json(bottom=False)
    assert set(value) == {"query", "hits"}
    assert set(value["hits"][0]) == {"doc_id", "score", "source_uri", "source_row", "text"}
    assert len(item.to_json(bottom=True)["bottom"]) == 2
    assert json.loads(json.dumps(value)) == value


def test_more_hits_than_rows(tmp_path: Path) -> None:
    small = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": make_rows(5)}, silent=1)
    assert [len(item.hits) for item in _attribute(small, 100)] == [4] * 4
    mute = index_rows(Store(str(tmp_path / "mute")), tmp_path, {"a.jsonl": make_rows(5)}, silent=5)
    assert [(item.hits, item.bottom) for item in _attribute(mute, 3)] == [([], [])] * 4


@pytest.mark.parametrize("rows", [3, 400])
def test_examples_of_a_run(tmp_path: Path, rows: int) -> None:
    store = Store(str(tmp_path / "store"))
    write_as(tmp_path / "raw/a.jsonl", make_rows(rows))
    shutil.copy(tmp_path / "raw/a.jsonl", tmp_path / "raw/b.jsonl")
    indexed = index_corpus(store, corpus_of(tmp_path / "raw/*.jsonl"))
    target = make_target(QUERIES + 2)
    name = store_target(store, target)
    parts = score_parts(indexed, {"good": target})
    decide(
        store, indexed.version, run_id="run", parts=parts, weights={"good": 1.0}, targets=["good"], aggregate="mean",
        selection=SelectionConfig(keep=KeepConfig(rows=rows // 2 * 2 + 1)), memory=2**30,
    )  # fmt: skip
    key = write_examples(
        store, indexed.version, indexed.blocks, run_id="run", targets={"good": name},
        parts=parts, evaluation=None,
    )  # fmt: skip
    assert key == examples_key("run")
    found = store.get_json(key)
    shown = min(ROWS, 2 * rows)
    assert [row["rank"] for row in found["best"]] == list(range(1, shown + 1))
    assert [row["rank"] for row in found["worst"]] == list(range(2 * rows, 2 * rows - shown, -1))
    assert len(found["queries"]) == QUERIES
    decisions = store.scan_parquet(["runs/run/decisions.parquet"]).collect()
    fate = {(row["source_uri"], row["source_row"]): row["kept"] for row in decisions.iter_rows(named=True)}
    texts = dict(indexed.rows.select("doc_id", "text").iter_rows())
    for query in found["queries"]:
        assert len(query["top"]) == len(query["bottom"]) == min(HITS, rows)
        for hit in (*query["top"], *query["bottom"]):
            assert hit["kept"] == fate[hit["source_uri"], hit["source_row"]]
            assert hit["text"] == texts[hit["doc_id"]]


def test_examples_go_on_without_their_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = index_rows(Store(str(tmp_path / "store")), tmp_path, {"a.jsonl": make_rows(20)})
    parts = score_parts(small, {"good": TARGET})
    decide(
        small.store, small.version, run_id="run", parts=parts, weights={"good": 1.0}, targets=["good"],
        aggregate="mean", selection=SelectionConfig(), memory=2**30,
    )  # fmt: skip

    def gone() -> Signer:
        raise ModelError("model m is not here")

    key = write_examples(
        small.store, small.version, small.blocks, run_id="run", targets={"good": store_target(small.store, TARGET)},
        parts=parts, evaluation=None, signer=gone,
    )  # fmt: skip
    hits = [hit for query in small.store.get_json(key)["queries"] for hit in query["top"]]
    assert hits and not any("tokens" in hit for hit in hits)
    assert "examples go without the influence of tokens: model m is not here" in caplog.text


def test_the_library_alone_finds_planted_rows(tmp_path: Path) -> None:
    config = load_config(write_curation(tmp_path))
    store = Store(config.store)
    version, _ = ingest_corpus(store, config, run_id="run")
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    sketch_blocks(store, identity, list(block_rows(store, version)), dim=config.sketch.dim, signer=lambda: signer)
    found = attribute(store, config, read_queries(config.targets["backdoor"], limits=config.limits), k=5)
    figures = evaluate_corpus(store, config, "backdoor", label=Label.parse("label=backdoor"), ks=(5,))
    planted = [
        json.loads(Path(hit.source_uri).read_text().splitlines()[hit.source_row])["label"] == "backdoor"
        for item in found
        for hit in item.hits
    ]
    assert (figures.rows, figures.positives) == (ROWS_OF_CURATION, PLANTED)
    assert figures.top_k["5"]["precision"] == pytest.approx(np.mean(planted))
    assert np.mean(planted) >= 0.6
