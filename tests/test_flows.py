"""The flows, run by Prefect: what they publish, what they save the second time, and how they fail."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.settings import get_current_settings

from flows.attribute import attribute
from flows.curate import curate
from flows.index_corpus import index_corpus
from rise_ops import parts
from rise_ops.blocks import MIN_ROWS, read_texts
from rise_ops.card import escaped
from rise_ops.corpus import read_version
from rise_ops.errors import BadRowsError, ConfigError, ModelError, SourceError, TransientError
from rise_ops.export import list_exports
from rise_ops.hashing import sha256_hex
from rise_ops.ingest import ingest_object
from rise_ops.plan import plan_run
from rise_ops.runs import list_runs, read_run
from rise_ops.store import Store
from tasks.attribute import publish_hits
from tests.corpora import jsonl
from tests.curation import PLANTED, ROWS, load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    return write_curation(tmp_path)


def test_a_run_publishes_and_a_second_one_has_nothing_to_do(config_path: Path) -> None:
    config = load(config_path)
    first = curate(config)
    assert (first["rows"], first["rows_sketched"], first["rows_reused"]) == (ROWS, ROWS, 0)
    assert first["rows_kept"] == int(0.9 * ROWS)
    store = Store(config.store)
    decisions = store.scan_parquet([f"runs/{first['run_id']}/decisions.parquet"]).collect()
    assert decisions.height == ROWS
    assert decisions.filter(pl.col("rank") > ROWS - PLANTED)["source_uri"].unique().to_list() == [
        str(config_path.parent / "raw" / "part-1.jsonl")
    ]
    assert Path(first["report"]).read_text(encoding="utf-8").startswith("<!doctype html>")

    second = curate(config)
    assert (second["rows_sketched"], second["rows_reused"], second["rows_new"]) == (0, ROWS, 0)
    assert second["snapshot_id"] == first["snapshot_id"]
    assert second["index_id"] == first["index_id"]
    assert second["export"] == first["export"]
    assert all(second["stages"][name]["cached"] for name in ("ingest", "index", "value", "select", "export"))
    assert [item["version"] for item in list_exports(store)] == ["0001"]


def test_the_record_names_everything_that_was_read_and_written(config_path: Path) -> None:
    config = load(config_path)
    summary = curate(config)
    record = read_run(Store(config.store), summary["run_id"])
    assert record["status"] == "completed"
    assert [stage["name"] for stage in record["stages"]] == ["ingest", "index", "value", "select", "export", "evaluate"]
    assert {item["uri"] for item in record["stages"][0]["inputs"]} == {
        str(config_path.parent / "raw" / f"part-{number}.jsonl") for number in range(2)
    }
    store = Store(config.store)
    for stage in record["stages"]:
        for item in stage["outputs"]:
            assert store.exists(item["uri"].removeprefix(f"{store.uri}/"))
    assert record["model"]["fingerprint"]
    assert record["config_fingerprint"] == config.fingerprint


def _scores(store: str) -> dict[Path, int]:
    """Files of scores, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in (Path(store) / "scores").rglob("*.parquet")}


def test_scores_that_are_gone_are_computed_again_and_only_these(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "MAX_BLOCKS", 1)  # the corpus is small: a part for each block
    _add_blocks(config_path)
    config = load(config_path)
    first = curate(config, "value")
    before = _scores(config.store)
    lost = min(file for file in before if not file.name.endswith(".extremes.parquet"))
    lost.unlink()
    second = curate(config, "value")
    assert not second["stages"]["value"]["cached"]
    assert second["rows_kept"] == first["rows_kept"]
    after = _scores(config.store)
    assert after.keys() == before.keys()
    assert len(after) >= 4
    assert {file for file in after if after[file] != before[file]} == {lost}
    assert curate(config, "value")["stages"]["value"]["cached"]


def test_a_changed_row_is_scored_with_its_part_only(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_BLOCKS", 1)
    _add_blocks(config_path)
    config = load(config_path)
    curate(config, "value")
    before = _scores(config.store)
    _add_blocks(config_path, first="another text")
    run = curate(config, "value")
    added = _scores(config.store).keys() - before.keys()
    assert len(added) == 2  # the scores and the extremes of one part
    assert before.items() <= _scores(config.store).items()
    record = read_run(Store(config.store), run["run_id"])
    outputs = {item["uri"] for stage in record["stages"] if stage["name"] == "value" for item in stage["outputs"]}
    assert len(outputs & {str(file) for file in added}) == 1
    assert len(outputs) == len(before) // 2


def test_scores_are_shared_by_machines(config_path: Path, tmp_path: Path) -> None:
    """What one machine scored, another one with the same store does not score, whatever Prefect remembers."""
    config = load(config_path)
    curate(config, "value")
    before = _scores(config.store)
    for name in ("raw", "queries.jsonl"):
        shutil.move(config_path.parent / name, tmp_path / f"other-{name}")
    elsewhere = load(
        config_path,
        f"corpus.sources=['{tmp_path}/other-raw/*.jsonl']",
        f"targets.backdoor.queries={tmp_path}/other-queries.jsonl",
    )
    shutil.rmtree(get_current_settings().results.local_storage_path)
    second = curate(elsewhere, "value")
    assert second["stages"]["value"]["cached"]
    assert _scores(config.store) == before


def _add_blocks(config_path: Path, *, first: str = "a text") -> None:
    """Sources of a block each; `first` is the first row of the first one."""
    for source in range(3):
        rows = [{"text": first if (source, row) == (0, 0) else f"{source} {row}"} for row in range(MIN_ROWS)]
        (config_path.parent / "raw" / f"more-{source}.jsonl").write_bytes(jsonl(rows))


def test_losing_every_cached_result_costs_no_signature(config_path: Path) -> None:
    config = load(config_path)
    curate(config)
    shutil.rmtree(get_current_settings().results.local_storage_path)
    second = curate(config)
    assert second["rows_sketched"] == 0
    assert second["stages"]["value"]["cached"]


def _remembered(before: set[Path]) -> list[Path]:
    """What Prefect remembers of ingestion that was not there before."""
    folder = Path(get_current_settings().results.local_storage_path)
    return [path for path in folder.rglob("ingest-*") if path not in before]


@pytest.mark.parametrize("how", ["block", "rows", "garbage", "empty", "other", "fewer", "swapped", "old"])
def test_prefects_cache_can_be_wrong_without_harm(config_path: Path, how: str) -> None:
    """A hit behind which the store's objects are gone, and results that are not those of the call."""
    config = load(config_path)
    before = set(_remembered(set()))
    first = curate(config, "ingest")
    store = Store(config.store)
    contents = {key: store.get(key) for key, _ in store.list("") if key.startswith(("blocks", "objects", "snapshots"))}
    shutil.rmtree(Path(config.store) / "corpora")  # so that the second run asks for the objects again
    (path,) = _remembered(before)
    document = json.loads(path.read_text(encoding="utf-8"))
    result = json.loads(document["result"])
    if how in ("block", "rows"):
        gone = next(key for key in contents if key.endswith(".rows.parquet" if how == "rows" else ".parquet"))
        store.delete([gone])
    elif how in ("garbage", "empty"):
        path.write_bytes(b"\x00\x01" if how == "garbage" else b"")
    else:
        one, two = result["objects"]
        wrong = {
            "other": {"objects": [{**one, "record": two["record"], "object_sha": two["object_sha"]}, two]},
            "fewer": {"objects": [one]},
            "swapped": {"objects": [{**two, "uri": one["uri"]}, {**one, "uri": two["uri"]}]},
            "old": {"keys": ["objects/x.json"]},
        }[how]
        path.write_text(json.dumps({**document, "result": json.dumps(wrong)}), encoding="utf-8")
    second = curate(config, "ingest")
    assert (second["rows"], second["snapshot_id"]) == (ROWS, first["snapshot_id"])
    assert {key: store.get(key) for key in contents} == contents
    version = read_version(store, "tiny", 1)
    assert {entry.uri: entry.object_sha for entry in version.sources} == {
        str(part): sha256_hex(part.read_bytes()) for part in (config_path.parent / "raw").glob("*.jsonl")
    }


def test_a_block_that_is_gone_is_the_only_one_computed_again(config_path: Path) -> None:
    config = load(config_path)
    first = curate(config, "index")
    for file in (Path(config.store) / "indexes" / first["index_id"] / "blocks").glob("*.json"):
        file.unlink()
    second = curate(config, "index")
    assert second["rows_sketched"] == ROWS
    assert curate(config, "index")["rows_sketched"] == 0


def test_a_changed_row_costs_one_row(config_path: Path) -> None:
    config = load(config_path)
    first = curate(config)
    part = config_path.parent / "raw" / "part-0.jsonl"
    lines = part.read_text(encoding="utf-8").splitlines()
    part.write_text("\n".join([*lines[:7], json.dumps({"text": "A corrected row."}), *lines[8:]]) + "\n")
    plan = plan_run(config)
    assert (plan["rows_to_sketch"], plan["rows_reused"], plan["blocks_to_write"]) == (1, ROWS - 1, 1)
    assert plan["objects"] == {"added": 0, "changed": 1, "removed": 0, "unchanged": 1}
    assert plan["rows"] == {"added": 0, "changed": 1, "removed": 0, "unchanged": ROWS - 1}
    second = curate(config)
    assert (second["rows_sketched"], second["rows_reused"], second["rows_new"]) == (1, ROWS - 1, 1)
    assert second["diff"]["rows"] == plan["rows"] and second["diff"]["objects"] == plan["objects"]
    store = Store(config.store)
    assert read_run(store, second["run_id"])["counts"]["objects_read"] == 1
    assert second["index_id"] == first["index_id"]
    assert plan_run(config)["rows_to_sketch"] == 0


def test_rows_that_only_left_need_no_model(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(config_path)
    curate(config)
    part = config_path.parent / "raw" / "part-0.jsonl"
    lines = part.read_text(encoding="utf-8").splitlines()
    part.write_text("\n".join(lines[1:]) + "\n")
    monkeypatch.setattr("tasks.index.open_signer", None)
    found = curate(config, "index")
    assert (found["rows"], found["rows_sketched"], found["rows_new"]) == (ROWS - 1, 0, 0)


def test_removed_rows_vanish_at_once_and_stay_in_older_versions(config_path: Path) -> None:
    config = load(config_path, "selection.keep={fraction: 1.0}")
    first = curate(config)
    removed = config_path.parent / "raw" / "part-0.jsonl"
    gone = {sha256_hex(line.encode()) for line in removed.read_text(encoding="utf-8").splitlines()}
    removed.unlink()
    second = curate(config)
    assert second["rows"] == ROWS - len(gone) == second["rows_kept"]
    store = Store(config.store)
    decisions = [store.scan_parquet([f"runs/{run['run_id']}/decisions.parquet"]).collect() for run in (first, second)]
    left = decisions[0].filter(pl.col("source_uri") == str(removed))["doc_id"].to_list()
    assert len(left) == len(gone)
    assert not set(left) & set(decisions[1]["doc_id"].to_list())
    exported = [
        set(store.scan_parquet([f"exports/{run['export']}/data/train-00000.parquet"]).collect()["doc_id"].to_list())
        for run in (first, second)
    ]
    assert set(left) <= exported[0] and not set(left) & exported[1]
    older = read_version(store, "tiny", 1)
    texts = {text for entry in older.sources for block in entry.blocks for text in read_texts(store, block)}
    assert len(texts) == ROWS


def test_deep_runs_see_what_a_listing_hides(config_path: Path) -> None:
    config = load(config_path)
    curate(config, "ingest")
    part = config_path.parent / "raw" / "part-0.jsonl"
    seen = part.stat()
    part.write_text(part.read_text(encoding="utf-8").replace("e", "a", 1))
    os.utime(part, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert curate(config, "ingest")["stages"]["ingest"]["cached"]
    assert plan_run(config)["rows"]["changed"] == 0
    assert plan_run(config, deep=True)["rows"]["changed"] == 1
    found = curate(config, "ingest", deep=True)
    assert (found["rows_new"], found["stages"]["ingest"]["cached"]) == (1, False)
    assert curate(config, "ingest", deep=True)["stages"]["ingest"]["cached"]


def test_a_run_can_stop_after_a_stage(config_path: Path) -> None:
    config = load(config_path)
    assert list(curate(config, "ingest")["stages"]) == ["ingest"]
    assert list(index_corpus(config)["stages"]) == ["ingest", "index"]
    valued = curate(config, "value")
    assert list(valued["stages"]) == ["ingest", "index", "value", "select", "examples"]
    assert valued["export"] is None


def test_transient_faults_are_retried(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import ingest as module

    calls = _failing(ingest_object, TransientError("the server was busy"), times=1)
    monkeypatch.setattr(module, "ingest_object", calls)
    assert curate(load(config_path), "ingest")["rows"] == ROWS
    assert calls.count == 3  # two objects, one of them twice


def test_permanent_errors_are_not_retried_and_the_failure_is_recorded(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks import ingest as module

    config = load(config_path)
    calls = _failing(ingest_object, SourceError("part-0.jsonl is damaged"), times=99)
    monkeypatch.setattr(module, "ingest_object", calls)
    with pytest.raises(SourceError, match="is damaged"):
        curate(config)
    assert calls.count == 1
    store = Store(config.store)
    (run_id,) = list_runs(store)
    assert read_run(store, run_id)["status"] == "failed"
    assert "is damaged" in read_run(store, run_id)["error"]
    assert list_exports(store) == []


def test_too_many_bad_rows_fail_the_run_and_stay_in_quarantine(config_path: Path) -> None:
    with (config_path.parent / "raw" / "part-0.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n" * 5)
    config = load(config_path)
    with pytest.raises(BadRowsError, match=r"5 of 65 rows"):
        curate(config)
    quarantined = pl.read_parquet(Path(config.store) / "quarantine" / "*" / "rejected.parquet")
    assert quarantined["source_row"].to_list() == [30, 31, 32, 33, 34]


@pytest.mark.parametrize(
    ("override", "error"),
    [("model.name=/nowhere/at-all", ModelError), ("targets.backdoor.queries=/nowhere/*.jsonl", SourceError)],
)
def test_what_is_missing_is_said_before_anything_is_paid_for(
    config_path: Path, override: str, error: type[Exception]
) -> None:
    config = load(config_path, override)
    with pytest.raises(error, match="nowhere"):
        curate(config)
    assert not (Path(config.store) / "corpora").exists()


def test_valuation_needs_a_target(config_path: Path) -> None:
    with pytest.raises(ConfigError, match="no targets"):
        curate(load(config_path, "targets={}", "value={}"))


def test_workers_change_nothing_but_time(config_path: Path, tmp_path: Path) -> None:
    one = curate(load(config_path))
    two = curate(load(config_path, "runner.workers=2", f"store={tmp_path / 'other'}"))
    assert (one["snapshot_id"], one["index_id"]) == (two["snapshot_id"], two["index_id"])
    decisions = [
        Store(str(root)).scan_parquet([f"runs/{run['run_id']}/decisions.parquet"]).sort("rank").collect()
        for root, run in ((config_path.parent / "store", one), (tmp_path / "other", two))
    ]
    assert decisions[0]["doc_id"].to_list() == decisions[1]["doc_id"].to_list()


def test_attribution_as_a_flow_stores_its_answer(config_path: Path) -> None:
    config = load(config_path)
    curate(config, "index")
    found = attribute(config, text="Arr, ye be welcome aboard, matey!", k=3, tokens=True)
    answer = Store(config.store).get_json(found["outputs"][0])
    assert len(answer["queries"][0]["hits"]) == 3
    assert all(hit["tokens"] and hit["query_tokens"] for hit in answer["queries"][0]["hits"])
    assert answer["where"] == {"source": None, "label": None, "rescore": None}
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["attribution"])))
    row = json.loads(str(max(shown, key=lambda each: str(each.created)).data))[0]
    best = max(answer["queries"][0]["hits"][0]["tokens"], key=lambda token: abs(token["score"]))
    assert row["tokens"].startswith(f"{escaped(best['text'].strip() or '␣')} {best['score']:+.4f}")
    assert row["query_tokens"] and row["source"].replace("\\", "") == answer["queries"][0]["hits"][0]["source_uri"]


def test_hits_are_text_in_an_artifact(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells are Markdown, which could load pictures from elsewhere."""
    store = Store(load(config_path).store)
    evil = "![x](http://elsewhere/y.png) <b>"
    token = {"text": evil, "start": 0, "end": len(evil), "score": 0.5}
    hit = {"score": 0.5, "source_uri": f"/raw/{evil}", "source_row": 0, "text": evil, "tokens": [token]}
    store.create_json("attributions/a.json", {"queries": [{"query": evil, "hits": [{**hit, "query_tokens": [token]}]}]})
    tables: list[Any] = []
    monkeypatch.setattr("tasks.attribute.create_table_artifact", lambda table, **_: tables.extend(table))
    publish_hits.fn(store.uri, "attributions/a.json")
    cells = [tables[0][name] for name in ("query", "source", "text", "tokens", "query_tokens")]
    assert all(r"\!\[x\]\(http\:" in cell and r"\<b\>" in cell for cell in cells)


@pytest.mark.s3
def test_a_run_in_a_bucket_gives_the_same_ids_and_signatures(config_path: Path, s3_bucket: str) -> None:
    from tests.conftest import s3_filesystem

    files = s3_filesystem()
    for name in ("raw/part-0.jsonl", "raw/part-1.jsonl", "queries.jsonl"):
        files.put_file(str(config_path.parent / name), f"{s3_bucket}/{name}")
    local = curate(load(config_path))
    remote = curate(
        load(
            config_path,
            f"store=s3://{s3_bucket}/store",
            f"corpus.sources=['s3://{s3_bucket}/raw/*.jsonl']",
            f"targets.backdoor.queries=s3://{s3_bucket}/queries.jsonl",
        )
    )
    assert (local["snapshot_id"], local["index_id"]) == (remote["snapshot_id"], remote["index_id"])
    assert remote["rows_kept"] == local["rows_kept"]
    assert files.exists(f"{s3_bucket}/store/exports/{remote['export']}/manifest.json")
    values = [
        store.scan_parquet([f"runs/{run['run_id']}/decisions.parquet"]).sort("doc_id").collect()["value"].to_numpy()
        for store, run in (
            (Store(str(config_path.parent / "store")), local),
            (Store(f"s3://{s3_bucket}/store"), remote),
        )
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


class _failing:
    """A function that raises the first `times` times."""

    def __init__(self, function: Any, error: Exception, *, times: int) -> None:
        self.function, self.error, self.times, self.count = function, error, times, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if self.count <= self.times:
            raise self.error
        return self.function(*arguments, **options)
