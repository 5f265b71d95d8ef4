"""Temperature and widths: measured on a sample, chosen once, kept, explained."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.curate import curate
from rise_ops.choosing import KS, best_temperature, choose, narrowest, sweep_corpus
from rise_ops.config import CurationConfig, SketchConfig
from rise_ops.corpus import current_version
from rise_ops.errors import ConfigError
from rise_ops.evaluation import Label, evaluate_corpus
from rise_ops.filters import RowFilter
from rise_ops.ingest import ingest_corpus
from rise_ops.plan import plan_run
from rise_ops.store import Store
from rise_ops.sweep import WIDTHS, Candidate, draw_sample, effective_rank, self_retrieval, split_half
from rise_ops.tuning import is_tuned, read_tuning, settled, tuning_id
from tests.curation import PLANTED, ROWS, load, write_curation, write_lines

AUTO = ("sketch.temperature=auto", "tuning.temperatures=[0.1, 1.0]", "tuning.rows=40")


def _ingested(tmp_path: Path, *overrides: str, **changes: Any) -> tuple[Store, CurationConfig]:
    config = load(write_curation(tmp_path, **changes), *overrides)
    store = Store(config.store)
    ingest_corpus(store, config, run_id="ingest")
    return store, config


def _version(store: Store) -> Any:
    found = current_version(store, "tiny")
    assert found is not None
    return found


def test_auto_is_written_where_the_number_stands(tmp_path: Path) -> None:
    path = write_curation(tmp_path, sketch={"temperature": "auto", "dim": "auto", "top_k": 64}, tuning={"rows": 100})
    config = load(path)
    assert (config.tuning.temperature, config.tuning.dim, config.tuning.rows) == (True, True, 100)
    assert config.sketch == SketchConfig(top_k=64)
    with pytest.raises(ConfigError, match=r"sketch\.temperature"):
        load(path, "sketch.temperature=automatic")
    with pytest.raises(ConfigError, match=r"sketch\.dim: unknown key"):
        load(path, "sketch.dim=512")


def test_a_sample_depends_on_rows_and_seed_only(tmp_path: Path) -> None:
    """Not on how rows are spread over objects and blocks, nor on copies."""
    one, _ = _ingested(tmp_path / "one")
    first = draw_sample(one, _version(one), 20, seed=0)
    assert first == draw_sample(one, _version(one), 20, seed=0)
    assert first.doc_ids != draw_sample(one, _version(one), 20, seed=1).doc_ids
    path = write_curation(tmp_path / "two")
    lines = [line for number in (1, 0) for line in (tmp_path / f"two/raw/part-{number}.jsonl").read_text().splitlines()]
    for file in (tmp_path / "two/raw").iterdir():
        file.unlink()
    (tmp_path / "two/raw/all.jsonl").write_text("\n".join(lines + lines[:5]) + "\n")
    other = load(path)
    two = Store(other.store)
    ingest_corpus(two, other, run_id="ingest")
    assert draw_sample(two, _version(two), 20, seed=0) == first
    everything = draw_sample(two, _version(two), 10_000, seed=0)
    assert len(everything.doc_ids) == len(set(everything.doc_ids)) == ROWS


def test_figures_equal_their_definitions() -> None:
    draw = np.random.default_rng(0)
    rows: Any = draw.standard_normal((30, 12)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    squared = [float(rows[a] @ rows[b]) ** 2 for a in range(30) for b in range(30) if a != b]
    zeros: Any = np.concatenate([rows, np.zeros((2, 12), np.float32)])
    assert effective_rank(zeros) == pytest.approx(30 / (1 + 29 * np.mean(squared)), rel=1e-5)
    assert effective_rank(np.eye(5, dtype=np.float32)) == pytest.approx(5)
    assert effective_rank(np.full((5, 4), 0.5, np.float32)) == pytest.approx(1)
    queries = rows[:4]
    scores = rows[4:] @ queries.T
    above = [
        np.mean([(queries[q] @ queries[f] > score) for f in range(4) if f != q for score in scores[:, q]])
        for q in range(4)
    ]
    assert self_retrieval(queries, scores) == pytest.approx(np.mean(above), abs=1e-6)
    same = np.repeat(np.arange(26, dtype=np.float32)[:, None], 4, axis=1)
    assert split_half(same) == pytest.approx(1.0)
    assert np.isnan(split_half(same[:, :1])) and np.isnan(self_retrieval(queries[:1], scores[:, :1]))


def test_a_sweep_of_all_rows_says_what_evaluation_says(tmp_path: Path) -> None:
    store, config = _ingested(tmp_path)
    label = Label.parse("label=backdoor")
    found = sweep_corpus(store, config, label=label, rows=ROWS, temperatures=[0.3, 1.0])
    assert (found["rows"], found["targets"], found["labels"]) == (ROWS, {"backdoor": 4}, True)
    for each in found["candidates"]:
        at = config.model_copy(update={"sketch": config.sketch.model_copy(update={"temperature": each["temperature"]})})
        curate(at, "index")
        right = evaluate_corpus(store, at, "backdoor", label=label, ks=KS)
        for k in map(str, KS):
            assert each["labelled"][k] == pytest.approx(right.top_k[k], abs=1e-6)
    assert found["auto"] == max(range(2), key=lambda number: found["candidates"][number]["effective_rank"])
    unlabelled = sweep_corpus(store, config, rows=10, widths=True)
    assert [each["dim"] for each in unlabelled["candidates"]] == [(r + g) * h for r, h, g in WIDTHS]
    assert all(-1 <= each["agreement"] <= 1 for each in unlabelled["candidates"])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"target": "nobody"}, "not a target"), ({"label": Label("colour")}, "--label colour: every query")],
)
def test_a_sweep_refuses_what_is_not_there(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    store, config = _ingested(tmp_path)
    with pytest.raises(ConfigError, match=says):
        sweep_corpus(store, config, rows=5, temperatures=[1.0], **options)


def _candidate(dim: int, agreement: float | None, rank: float = 1.0) -> Candidate:
    return Candidate(1.0, dim, 1, 0, dim, rank, 1.0, agreement, {}, {})


def test_the_rules_of_choice() -> None:
    ranked = [_candidate(1, None, rank) for rank in (3.0, 9.0, 9.0, 1.0)]
    assert best_temperature(ranked) is ranked[1]
    widths = [_candidate(900, 0.95), _candidate(100, 0.5), _candidate(300, 0.8)]
    assert narrowest(widths) == (widths[2], True)
    assert narrowest(widths[1:2]) == (widths[1], False)


@pytest.mark.usefixtures("prefect_harness")
def test_a_choice_is_made_once_and_kept_when_the_corpus_changes(tmp_path: Path) -> None:
    path = write_curation(tmp_path)
    config = load(path, *AUTO)
    store = Store(config.store)
    planned = plan_run(config)
    assert planned["sketch"]["to_choose"] == ["temperature"] and planned["sketch"]["temperature"] == 0.1
    first = curate(config)
    record = read_tuning(store, config)
    assert record is not None and record["rows"] == 40 and len(record["candidates"]) == 2
    best = max(record["candidates"], key=lambda each: each["effective_rank"])
    assert record["chosen"] == {"temperature": best["temperature"]}
    concrete = settled(store, config)
    assert concrete.sketch.temperature == best["temperature"] and not is_tuned(concrete)
    run = store.get_json(f"runs/{first['run_id']}/run.json")
    assert run["tuning"]["tuning_id"] == tuning_id(config) and "tune" in first["stages"]
    write_lines(tmp_path / "raw" / "more.jsonl", [{"text": f"one more row, number {number}"} for number in range(20)])
    second = curate(config)
    assert second["index_id"] == first["index_id"] and second["rows_sketched"] == 20
    assert second["stages"]["tune"]["cached"] and len(store.children("tunings")) == 1
    told = plan_run(config)["sketch"]
    assert told["chosen"]["tuning_id"] == tuning_id(config) and "directions" in told["chosen"]["why"][0]
    other = load(path, *AUTO, "tuning.seed=1")
    assert tuning_id(other) != tuning_id(config)
    with pytest.raises(ConfigError, match="curate index"):
        evaluate_corpus(store, other, "backdoor", label=Label("label", "backdoor"), ks=[5])
    found = evaluate_corpus(store, config, "backdoor", label=Label("label", "backdoor"), ks=[5])
    assert found.positives == PLANTED and not RowFilter()


def test_of_two_choosers_the_loser_takes_the_winners_choice(tmp_path: Path) -> None:
    store, config = _ingested(tmp_path, *AUTO)
    version = _version(store)
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda name: choose(store, config, version, run_id=name), ["one", "two"]))
    assert both[0] == both[1] and both[0]["run_id"] in ("one", "two")


def test_widths_are_chosen_at_the_chosen_temperature(tmp_path: Path) -> None:
    store, config = _ingested(tmp_path, *AUTO, "sketch.dim=auto", "tuning.rows=32")
    found = choose(store, config, _version(store), run_id="one")
    widths = [each for each in found["candidates"] if each["agreement"] is not None]
    assert [each["dim"] for each in widths] == [(r + g) * h for r, h, g in WIDTHS]
    assert {each["temperature"] for each in widths} == {found["chosen"]["temperature"]}
    assert len(found["why"]) == 2
    concrete = settled(store, config).sketch
    assert (concrete.dim_r, concrete.dim_h, concrete.dim_g) in WIDTHS


def test_the_command_shows_the_candidates(tmp_path: Path) -> None:
    _ingested(tmp_path)
    arguments = ["sweep", str(tmp_path / "curate.yaml"), "--rows", "30", "--temperatures", "0.5,1"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "auto" in shown.output and "P@10" in shown.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout.splitlines()[-1])
    assert [each["temperature"] for each in told["candidates"]] == [0.5, 1.0]
    wrong = CliRunner().invoke(app, [*arguments[:-1], "0.5,-1"])
    assert wrong.exit_code != 0
