"""Comparisons: the protocol over scores that stream by, what is kept, and how a method that cannot is told of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from flows.compare import compare
from flows.paper import run_task
from rise_ops.baselines.registry import METHODS
from rise_ops.blocks import read_doc_ids
from rise_ops.comparing import find_facts, measure, method_names, plan_methods
from rise_ops.comparison import Facts, Ranking, StoreRows, open_material, run_method
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, read_block
from rise_ops.demo.corpus import MODEL_FOLDER
from rise_ops.errors import ConfigError, LimitError, StoreError, WorkerError
from rise_ops.evaluation import average_precision, roc_area
from rise_ops.garbage import collect_garbage
from rise_ops.isolation import run_isolated
from rise_ops.presets import TITLES, paper_config
from rise_ops.runs import read_run
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.corpora import ingest_all
from tests.curation import PLANTED, ROWS, load, write_curation

Float32Array = npt.NDArray[np.float32]

LABELLED = {"label": "label", "k": [3, 5]}


@pytest.fixture
def config(tmp_path: Path) -> CurationConfig:
    """Two objects with 6 backdoor rows of 60, four queries that want them."""
    return load(write_curation(tmp_path, compare=LABELLED))


def _ingested(config: CurationConfig) -> tuple[Store, CorpusVersion]:
    store = Store(config.store)
    return store, ingest_all(store, config.corpus)


def _with(config: CurationConfig, **changes: Any) -> CurationConfig:
    document = config.model_dump(mode="json")
    document["compare"] |= changes
    return CurationConfig.model_validate(document)


def _facts(config: CurationConfig) -> Facts:
    return Facts(ROWS, 1_000, 10_000, {"backdoor": PLANTED})


def _labels(store: Store, version: CorpusVersion, config: CurationConfig) -> list[str]:
    frames = [read_block(store, block) for block in open_material(store, config, version).blocks]
    return [json.loads(meta)["label"] for frame in frames for meta in frame["meta"]]


def _batches(scores: Float32Array, size: int) -> Iterator[tuple[float, Float32Array]]:
    for start in range(0, len(scores), size):
        yield 0.5, scores[start : start + size]


def _plain(scores: Float32Array, relevant: npt.NDArray[np.bool_], k: int) -> tuple[float, float | None, float]:
    """The protocol for one query, from its definition."""
    ranked = sorted(
        (row for row in range(len(scores)) if not np.isnan(scores[row])), key=lambda row: (-scores[row], row)
    )
    best = ranked[:k]
    worst = sorted(ranked, key=lambda row: (scores[row], row))[:k]
    rest = [row for row in reversed(worst) if row not in best]
    found = relevant[best + rest]
    return average_precision(found), roc_area(found), float(relevant[best].mean())


@pytest.mark.parametrize("size", [1, 7, 60])
def test_figures_are_the_protocol_s_whatever_the_batches(config: CurationConfig, size: int) -> None:
    store, version = _ingested(config)
    material = open_material(store, config, version)
    scores = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    scores[5], scores[11, 2], scores[20:24] = np.nan, np.nan, 1.5  # some without a score, some alike
    ranking = Ranking(store, material, config.compare, _facts(config))
    assert ranking.take(_batches(scores, size)) == pytest.approx(0.5 * -(-ROWS // size))
    relevant = np.array(_labels(store, version, config)) == "backdoor"
    figures = ranking.figures()["1"]
    assert (figures["rows"], figures["positives"]) == (ROWS, PLANTED)
    for k in (3, 5):
        plain = [_plain(scores[:, query], relevant, k) for query in range(4)]
        areas = [area for _, area, _ in plain if area is not None]
        assert figures["top_k"][str(k)]["auprc"] == pytest.approx(np.mean([each[0] for each in plain]))
        assert figures["top_k"][str(k)]["auroc"] == (pytest.approx(np.mean(areas)) if areas else None)
        assert figures["top_k"][str(k)]["precision"] == pytest.approx(np.mean([each[2] for each in plain]))


def test_a_dilution_hides_positive_rows_and_no_others(config: CurationConfig) -> None:
    config = _with(config, dilute=[1, 3, 1_000])
    store, version = _ingested(config)
    material = open_material(store, config, version)
    relevant = np.array(_labels(store, version, config)) == "backdoor"
    scores = np.where(relevant, 1.0, 0.0).astype(np.float32)[:, None].repeat(4, axis=1)  # a perfect method
    scores += np.linspace(0, 0.1, ROWS, dtype=np.float32)[:, None]
    ranking = Ranking(store, material, config.compare, _facts(config))
    ranking.take(_batches(scores, 16))
    figures = ranking.figures()
    assert [figures[factor]["positives"] for factor in ("1", "3", "1000")] == [6, 2, 1]
    assert [figures[factor]["rows"] for factor in ("1", "3", "1000")] == [60, 56, 55]
    assert figures["1"]["top_k"]["5"]["precision"] == 1.0
    assert figures["3"]["top_k"]["5"]["precision"] == pytest.approx(2 / 5)
    assert figures["1000"]["top_k"]["3"]["precision"] == pytest.approx(1 / 3)


def test_what_is_hidden_depends_on_content_alone(tmp_path: Path) -> None:
    kept = []
    for name, order in (("one", 1), ("two", -1)):
        path = write_curation(tmp_path / name, compare={**LABELLED, "dilute": [3]})
        if order < 0:  # the same rows in other objects
            for file in (tmp_path / name / "raw").glob("*.jsonl"):
                file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
        config = load(path)
        store, version = _ingested(config)
        material = open_material(store, config, version)
        docs = [doc for block in material.blocks for doc in read_doc_ids(store, block)]
        relevant = np.array(_labels(store, version, config)) == "backdoor"
        ranking = Ranking(store, material, config.compare, _facts(config))
        allowed = ranking._allowed(3, 0, ROWS)[:, 0]
        kept.append({doc for doc, seen, good in zip(docs, allowed, relevant, strict=True) if seen and good})
        assert allowed[~relevant].all()
    assert kept[0] == kept[1] and len(kept[0]) == 2


def test_rows_are_read_again_in_the_same_order(config: CurationConfig) -> None:
    store, version = _ingested(config)
    material = open_material(store, config, version)
    rows = StoreRows(store, material.blocks, material.rows)
    first, second = [[text for batch in rows for text in batch] for _ in range(2)]
    assert first == second and len(first) == len(rows) == ROWS


def test_methods_are_named_by_what_tells_them_apart(config: CurationConfig) -> None:
    methods = [
        "rise",
        {"method": "rise", "temperature": 0.1},
        {"method": "bm25", "name": "words"},
        "random",
        "random",
        {"method": "rapidin", "seeds": 1},
    ]
    compared = _with(config, methods=methods, seeds=2)
    names = ["rise", "rise temperature 0.1", "words", "random (4)", "random (5)", "rapidin"]
    assert method_names(compared.compare.methods) == names
    assert [(each["name"], each["seed"]) for each in plan_methods(compared)[:4]] == [
        ("rise", 0), ("rise", 1), ("rise temperature 0.1", 0), ("rise temperature 0.1", 1)
    ]  # fmt: skip
    runs = [each["name"] for each in plan_methods(compared)]
    assert (runs.count("words"), runs.count("random (4)"), runs.count("rapidin")) == (1, 2, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["missing"]}, "compare.targets: missing is not a target; known: backdoor"),
        ({"label": "kind"}, "query 1 has no 'kind'"),
        ({"label": "label=none"}, "no row is positive for any query; queries want 'none'"),
    ],
)
def test_a_comparison_without_a_question_is_refused(config: CurationConfig, changes: Any, message: str) -> None:
    store, version = _ingested(config)
    with pytest.raises(ConfigError, match=message):
        find_facts(store, _with(config, **changes), version)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_compares_and_goes_on_where_it_was(config: CurationConfig) -> None:
    cheap = ["rise", "bm25", "length"]
    config = _with(config, methods=[*cheap, "z0_inf"], seeds=2, dilute=[1, 2])
    summary = compare(config)
    found = summary["comparison"]
    by_name = {each["name"]: each for each in found["methods"]}
    assert (found["rows"], found["queries"], found["positives"]) == (ROWS, 4, {"backdoor": PLANTED})
    assert [each["status"] for each in found["methods"]] == ["completed"] * 4 + ["failed"]
    assert "checkpoints" in by_name["z0_inf"]["reason"]
    assert by_name["rise"]["settings"]["1"]["top_k"]["5"]["precision"] >= 0.8
    assert by_name["rise"]["bytes_per_row"] == 2 * config.sketch.dim
    assert (
        by_name["rise"]["tokens_per_second"] > 0 and by_name["rise"]["peak_bytes"] > by_name["rise"]["loaded_bytes"] / 2
    )
    assert by_name["length"]["settings"]["2"]["positives"] == PLANTED // 2
    assert not any(each["cached"] for each in found["methods"])
    store = Store(config.store)
    assert read_run(store, summary["run_id"])["comparison"]["id"] == found["id"]
    assert not verify_store(store, deep=True)["broken"]

    again = compare(_with(config, methods=["length", *cheap]))
    assert again["comparison"]["id"] == found["id"]
    assert all(each["cached"] for each in again["comparison"]["methods"])
    assert len(store.children(f"comparisons/{found['id']}")) == 4 + 1  # and the facts
    assert collect_garbage(store, dry_run=True)["removed"].get("comparisons") is None


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"z0_inf"}))
def test_every_method_scores_every_row(config: CurationConfig, name: str) -> None:
    store, version = _ingested(config)
    config = _with(config, methods=[name])
    (method,) = config.compare.methods
    outcome = run_method(store, config, open_material(store, config, version), _facts(config), method, seed=0)
    figures = outcome.settings["1"]
    assert (figures["rows"], figures["positives"]) == (ROWS, PLANTED)
    assert all(0 <= value <= 1 for found in figures["top_k"].values() for value in found.values())
    if name in ("rise", "bm25"):  # whose words and mistakes are the pirates' own
        assert figures["top_k"]["5"]["precision"] >= 0.6


def test_a_method_that_does_not_fit_is_told_of_with_its_figure(config: CurationConfig) -> None:
    store, version = _ingested(config)
    facts = find_facts(store, config, version)
    (method,) = _with(config, methods=["rapidin"]).compare.methods
    tight = config.model_copy(update={"limits": config.limits.model_copy(update={"memory": 2**20})})
    found = measure(store, tight, version, facts=facts, method=method, seed=0, run_id="test")
    assert found["status"] == "infeasible"
    assert found["need"]["bytes"] > 2**20
    assert "limits.memory allows 1 MiB" in found["reason"]


@pytest.mark.parametrize("name", ["rapidin", "trackstar"])
def test_gradients_of_quantised_weights_are_refused_before_loading(config: CurationConfig, name: str) -> None:
    store, version = _ingested(config)
    facts = find_facts(store, config, version)
    (method,) = _with(config, methods=[name]).compare.methods
    rounded = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "int8"})})
    found = measure(store, rounded, version, facts=facts, method=method, seed=0, run_id="test")
    assert (found["status"], found["need"]["bytes"] > 0) == ("infeasible", True)
    assert "leave out model.device_map, quantization" in found["reason"]


def test_every_method_says_where_it_is_from() -> None:
    for name, method in METHODS.items():
        assert method.paper, name


def test_a_process_that_dies_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "silent.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "telling.py").write_text(
        "from rise_ops.errors import LimitError, StoreError\n"
        "from rise_ops.isolation import answer\n"
        "def work(call, progress):\n"
        "    print('what a library prints')\n"
        "    progress(1, 2)\n"
        "    if call['fail']:\n"
        "        raise {'limit': LimitError, 'store': StoreError}[call['fail']]('no room')\n"
        "    return {'sum': call['a'] + call['b']}\n"
        "answer(work)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerError, match="was killed by signal 9"):
        run_isolated("dying", {})
    with pytest.raises(WorkerError, match="ended with exit code 3"):
        run_isolated("silent", {})
    seen: list[tuple[int, int | None]] = []
    call = {"a": 1, "b": 2, "fail": None}
    assert run_isolated("telling", call, progress=lambda done, total: seen.append((done, total))) == {"sum": 3}
    assert seen == [(1, 2)]
    with pytest.raises(LimitError, match="no room"):
        run_isolated("telling", {**call, "fail": "limit"})
    with pytest.raises(StoreError, match="no room"):
        run_isolated("telling", {**call, "fail": "store"})


@pytest.mark.parametrize("task", TITLES)
def test_a_preset_needs_files_and_a_model_only(task: Any, tmp_path: Path) -> None:
    found = paper_config(task, store="s", pool=["pool.jsonl"], queries="q.jsonl", model=str(MODEL_FOLDER),
                         checkpoints=[str(MODEL_FOLDER)], filler=["more/*.jsonl"], dilute=[20],
                         base=str(tmp_path))  # fmt: skip
    assert found.corpus.sources == (str(tmp_path / "pool.jsonl"), str(tmp_path / "more/*.jsonl"))
    assert {method.method for method in found.compare.methods} == set(METHODS)
    assert found.compare.dilute == (1.0, 20.0)
    lean = next(each for each in found.compare.methods if each.name == "RISE T 1, 704 bytes")
    sketch = found.sketch.model_copy(update={name: getattr(lean, name) for name in ("dim_r", "dim_h", "dim_g")})
    assert 2 * sketch.dim == 704


def test_a_task_without_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="give a model"):
        run_task("howdy", "s", ["p"], "q", None, None, None)
    with pytest.raises(ConfigError, match="not one of howdy"):
        paper_config("other", store="s", pool=["p"], queries="q", model="m")  # type: ignore[arg-type]
