"""`curate plan` tells what the selection would do, exactly where the scores are there, else what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.curate import curate
from rise_ops.errors import SelectionError
from rise_ops.plan import plan_run
from rise_ops.runs import read_run
from rise_ops.store import Store
from tests.curation import ROWS, load, write_curation

RICH = (
    "selection.exclude=[{target: backdoor, top_rows: 5}, {pattern: '(?i)matey'}]",
    "selection.near_duplicates=0.95",
    "selection.per_source={max_fraction: 0.6}",
    "selection.keep={fraction: 0.5}",
)


@pytest.mark.usefixtures("prefect_harness")
def test_a_plan_takes_the_rows_that_the_run_takes(tmp_path: Path) -> None:
    path = write_curation(tmp_path)
    plain = load(path)
    assert "not what was ingested" in plan_run(plain)["selection_unknown"]
    curate(plain, "index")
    missing = plan_run(plain)
    assert "parts of the corpus have no scores" in missing["selection_unknown"]
    assert "selection" not in missing
    curate(plain, "value")
    rich = load(path, *RICH)
    store = Store(rich.store)
    before = dict(store.list(""))
    planned = plan_run(rich)["selection"]
    assert dict(store.list("")) == before
    run = curate(rich)
    record = read_run(store, run["run_id"])
    assert record["selection"]["steps"] == planned["steps"] == run["selection"]["steps"]
    assert (planned["kept"], planned["tokens_kept"]) == (run["rows_kept"], record["counts"]["tokens_kept"])
    assert [step["rule"] for step in planned["steps"]] == [
        None, "selection.exclude[1]", "selection.exclude[0]", "selection.near_duplicates",
        "selection.per_source.max_fraction", "selection.keep.fraction",
    ]  # fmt: skip
    assert planned["kept"] + sum(step["rows"] for step in planned["steps"]) == ROWS
    with pytest.raises(SelectionError, match="asks for at least 1,000 rows of label 'clean'"):
        plan_run(load(path, "selection.per_label={groups: {clean: {min_rows: 1000}}}"))
    assert "the index lacks" in plan_run(load(path, "sketch.seed=7"))["selection_unknown"]
    part = tmp_path / "raw" / "part-0.jsonl"
    part.write_text(part.read_text(encoding="utf-8") + '{"text": "One more row."}\n')
    assert "not what was ingested" in plan_run(rich)["selection_unknown"]
