"""`limits.memory`: every stage stays below it on data that is larger, and says what it will take."""

from __future__ import annotations

import logging
from pathlib import Path

import polars as pl
import pytest

from rise_ops.config import CurationConfig, LimitsConfig, SketchConfig
from rise_ops.errors import LimitError, SourceError
from rise_ops.memory import (
    MIB,
    TILE_ROWS,
    export_memory,
    ingest_memory,
    select_memory,
    sketch_memory,
    stage_memory,
    task_limits,
    value_memory,
)
from rise_ops.plan import plan_run
from rise_ops.readers import open_rows
from rise_ops.store import Store
from tests.benchmarks.memory import STAGES, Measured, Setting, measure, write_pool
from tests.corpora import ingest_path, listed
from tests.curation import load, write_curation

LIMIT = 256 * MIB
"""The least that a configuration may give."""

_SKETCH = {"dim_r": 128, "dim_h": 64, "dim_g": 64}
_DIM = SketchConfig(dim_r=128, dim_h=64, dim_g=64).dim


def _stored(store: Store, prefix: str) -> int:
    return sum(size for _, size in store.list(prefix))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Every stage in a process of its own; sketching on shorter rows, for it is slow."""
    folder = tmp_path_factory.mktemp("memory")
    found: dict[str, Measured] = {}
    for name, rows, words, stages in (
        ("long", 140_000, 230, ("ingest", "fill", "value", "select", "export")),
        ("short", 11_500, 2, ("ingest", "sketch")),
    ):
        pool = folder / name / "pool.jsonl"
        pool.parent.mkdir()
        write_pool(pool, rows, words=words)
        setting = Setting(str(pool.parent), LIMIT, 1_024, _SKETCH)
        found = {stage: measure(stage, setting) for stage in stages} | found
        store = Store(setting.config.store)
        signatures = rows * 2 * (1_024 if name == "long" else _DIM)
        assert signatures > LIMIT
        assert _stored(store, "indexes") > signatures
        assert name == "short" or pool.stat().st_size > LIMIT
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_more_data_than_memory_stays_within_its_limit(stage: str, measured: dict[str, Measured]) -> None:
    assert measured[stage].peak < LIMIT, f"{stage} took {measured[stage].peak / MIB:.0f} MiB"


@pytest.mark.slow
def test_ranking_more_rows_than_fit_takes_more_passes_not_more_memory(tmp_path: Path) -> None:
    memory, rows = LIMIT, 3_500_000
    plan = select_memory(memory, rows=rows, queries=0, aggregate="mean")
    assert rows > 4 * plan.sort_rows
    found = measure("rank", Setting(str(tmp_path), memory, rows, _SKETCH))
    assert found.peak < memory, f"ranking took {found.peak / MIB:.0f} MiB"


@pytest.mark.parametrize("memory", [256 * MIB, 300 * MIB, 2**30, 8 * 2**30, 2**40])
def test_a_plan_keeps_the_limit_and_uses_it(memory: int) -> None:
    for queries in (1, 50, 100):
        value = value_memory(memory, queries=queries, dim=24_576, aggregate="mean")
        assert value.plan.bytes <= memory
        assert value.scan.piece_rows % TILE_ROWS == 0
    select = select_memory(memory, rows=10**9, queries=0, aggregate="mean")
    assert select.plan.bytes <= memory
    assert select.sort_rows * 160 > memory // 4
    assert ingest_memory(memory).bytes <= memory
    assert export_memory(memory).plan.bytes <= memory
    plan, rest = sketch_memory(memory, dim=_DIM)
    assert plan.bytes <= memory
    assert 0 < rest < memory


def test_a_plan_does_not_depend_on_the_corpus() -> None:
    few, many = (select_memory(2**30, rows=rows, queries=0, aggregate="mean") for rows in (10**7, 10**10))
    assert (few.plan.bytes, few.slice_rows, few.sort_rows) == (many.plan.bytes, many.slice_rows, many.sort_rows)
    assert "10,000,000,000 rows in 2,193 passes" in many.plan.text


def test_tasks_at_the_same_time_share_the_limit(tmp_path: Path) -> None:
    config = load(write_curation(tmp_path), "runner.workers=3", "limits.memory=3GiB")
    assert task_limits(config).memory == 2**30
    plans = stage_memory(config, rows=100, queries=4)
    assert list(plans) == list(STAGES)
    assert all(plan.bytes <= config.limits.memory for plan in plans.values())
    assert "3 tasks, each" in plans["value"].text
    assert all(f" of {2**10 if name in ('ingest', 'sketch', 'value') else 3 * 2**10:,} MiB" in plan.text
               for name, plan in plans.items())  # fmt: skip


def test_a_stage_that_cannot_work_within_the_limit_says_what_it_needs() -> None:
    with pytest.raises(LimitError, match=r"ingest needs 240 MiB .* each of 4 tasks .* raise limits.memory to 960MiB"):
        ingest_memory(64 * MIB, tasks=4)
    with pytest.raises(LimitError, match=r"sketch needs \d+ MiB .* allows 256 MiB; .* use a smaller sketch"):
        sketch_memory(256 * MIB, dim=24_576)
    with pytest.raises(LimitError, match=r"value needs [\d,]+ MiB .* use fewer queries"):
        value_memory(256 * MIB, queries=10_000, dim=24_576, aggregate="mean")
    with pytest.raises(LimitError, match=r"select needs [\d,]+ MiB .* or another aggregate"):
        select_memory(256 * MIB, rows=1, queries=1_000, aggregate="rrf")
    with pytest.raises(LimitError, match=r"export needs \d+ MiB"):
        export_memory(128 * MIB)


def test_the_advice_is_enough() -> None:
    """The memory that a refusal names is taken."""
    for workers in (1, 3):
        with pytest.raises(LimitError, match=r"raise limits\.memory to") as caught:
            ingest_memory(MIB, tasks=workers)
        named = int(str(caught.value).split("limits.memory to ")[1].split("MiB")[0].replace(",", ""))
        ingest_memory(named * MIB // workers, tasks=workers)


def test_the_plan_of_a_run_has_a_line_for_each_stage(tmp_path: Path) -> None:
    planned = plan_run(load(write_curation(tmp_path)))
    assert planned["peak_memory_bytes"] > 0
    assert list(planned["memory"]) == list(STAGES)
    for name, plan in planned["memory"].items():
        assert plan["text"].startswith(f"{name}: ")
        assert plan["text"].endswith("of 8,192 MiB")
        assert 0 < plan["bytes"] <= 8 * 2**30


def test_a_stage_logs_its_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from rise_ops.ingest import ingest_corpus

    config: CurationConfig = load(write_curation(tmp_path))
    with caplog.at_level(logging.INFO, logger="rise_ops"):
        ingest_corpus(Store(config.store), config, run_id="run")
    assert "ingest: a block of at most 16 MiB" in caplog.text


def test_too_little_memory_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    limits = LimitsConfig().model_copy(update={"memory": MIB})
    with pytest.raises(LimitError, match="ingest needs"):
        ingest_path(Store(str(tmp_path / "store")), tmp_path / "a.jsonl", limits=limits)
    assert not (tmp_path / "store").exists()


def test_a_table_whose_pages_are_larger_than_memory_allows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    # one page of 20 MiB: it ends after 1,024 values at the earliest
    pl.DataFrame({"text": [str(row).zfill(20_000) for row in range(1_024)]}).write_parquet(path, use_pyarrow=True)
    store = Store(str(tmp_path / "store"))
    named = r"to decode a page of every column, .* or raise limits\.memory"
    with pytest.raises(SourceError, match=named), open_rows(listed(path), row_bytes=MIB, memory=16 * MIB):
        pass
    assert ingest_path(store, path).rows == 1_024
