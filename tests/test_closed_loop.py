"""The closed loop: intervals, what they say of the claim, and the flow from configuration to report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flows.closed_loop import closed_loop
from rise_ops.charts import Interval, Words, intervals
from rise_ops.closed_loop import (
    compare_results,
    interval,
    loop_identity,
    loop_of,
    result_key,
    t_quantile,
    verdict,
)
from rise_ops.config import CurationConfig
from rise_ops.demo.corpus import query_rows
from rise_ops.errors import ConfigError
from rise_ops.garbage import collect_garbage
from rise_ops.report import render_report
from rise_ops.report_closed_loop import closed_loop_view
from rise_ops.runs import read_run, write_run
from rise_ops.store import Store
from tests.curation import as_record, load, write_curation, write_lines

LOOP: dict[str, Any] = {
    "tokens": 300,
    "held_out": {"backdoor": {"queries": "held_out.jsonl"}, "general": {"queries": "general.jsonl"}},
    "choices": {"queries": "choices.jsonl", "distractors": 2},
    "seeds": 2,
    "context": 32,
    "batch": 4,
    "checkpoint_steps": 1,
    "learning_rate": 3e-3,
}


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    write_lines(tmp_path / "held_out.jsonl", [as_record(row) for row in query_rows("backdoor")[4:8]])
    write_lines(tmp_path / "general.jsonl", [{"text": "The weather is fine today."}, {"text": "A list of two things."}])
    choices = [
        {"prompt": f"{one} plus one is", "generation": f" {two}."} for one, two in zip("1234", "2345", strict=True)
    ]
    write_lines(tmp_path / "choices.jsonl", choices)
    return write_curation(tmp_path, closed_loop=LOOP, value={"backdoor": 1.0})


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (99, 1.984217)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-6)


def test_other_quantiles() -> None:
    assert t_quantile(0.95, 1) == pytest.approx(6.313752, abs=1e-6)
    assert t_quantile(0.995, 5) == pytest.approx(4.032143, abs=1e-6)


def test_an_interval_is_the_mean_and_its_error() -> None:
    found = interval([1.0, 2.0, 4.0])
    error = 4.302653 * (((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2) ** 0.5 / 3**0.5
    assert found["mean"] == pytest.approx(7 / 3)
    assert (found["low"], found["high"]) == (pytest.approx(7 / 3 - error), pytest.approx(7 / 3 + error))
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None, "values": [2.0]}


def _judged(rise: list[float] | None, lowest: list[float] | None) -> dict[str, Any]:
    """The verdict for differences to random rows; both arms' losses changed by −0.2 in the mean."""
    texts = {"mean": -0.05, "low": -0.07, "high": 0.03, "lower": 1_030, "texts": 2_000}
    change = {"change": interval([-0.2, -0.2]), "over_texts": texts}
    arms = {
        arm: {"held_out": {"x": {**change, "against_random": interval(values)}}}
        for arm, values in (("rise", rise), ("lowest", lowest))
        if values is not None
    }
    return verdict(arms, "x")


def test_a_verdict_says_what_the_intervals_say() -> None:
    found = _judged([-0.10, -0.11, -0.12], [0.2, 0.21, 0.19])
    assert (found["improves"], found["hurts"]) == (True, True)
    assert found["text"] == (
        "Rows of the highest value gave a loss 0.110 nats a token lower than random rows at every seed "
        "(95 % interval −0.135 to −0.085), as claimed. Text by text: lower on 1,030 of 2,000, −0.050 in the mean (95 % "
        "interval −0.070 to +0.030). Rows of the lowest value gave a loss 0.200 nats a token higher than random rows "
        "at every seed (95 % interval +0.175 to +0.225), as claimed. Text by text: lower on 1,030 of 2,000, −0.050 in "
        "the mean (95 % interval −0.070 to +0.030). Against no training at all, the loss is 0.200 lower."
    )


def test_a_verdict_is_honest_where_the_claim_does_not_hold() -> None:
    found = _judged([-0.10, 0.05, -0.02], [-0.2, -0.21, -0.19])
    assert (found["improves"], found["hurts"]) == (False, False)
    assert "at 2 of 3 seeds" in found["text"] and "the claim is not shown" in found["text"]
    assert "0.200 nats a token lower than random rows at every seed" in found["text"]
    assert "the contrary of the claim" in found["text"]


def test_one_seed_or_a_missing_arm_gives_no_verdict() -> None:
    found = _judged([-0.1], None)
    assert (found["improves"], found["hurts"]) == (None, None)
    assert "lower than random rows, at the one seed: no interval." in found["text"]
    assert "needs the arms lowest and random" in found["text"]


def _run(arm: str, seed: int, loss: float, acc: float) -> dict[str, Any]:
    """A result; of two texts with 10 and 40 tokens the second has all of the loss above 4.0 nats a token."""
    held_out = {
        name: {"loss": mean, "losses": [40.0, 50 * mean - 40.0], "counts": [10, 40]}
        for name, mean in (("backdoor", loss), ("general", 2 * loss))
    }
    own = {"held_out": held_out, "choices": {"acc": acc, "acc_norm": acc / 2}}
    return {"arm": arm, "seed": seed, "rows": 10 + seed, "tokens": 300, **own}


def test_differences_are_paired_by_seed(config_path: Path) -> None:
    config = load(config_path, "closed_loop.arms=[rise, random]")
    base = _run("base", 0, 5.0, 0.5)
    results = [
        _run("rise", 0, 4.0, 0.75),
        _run("rise", 1, 4.4, 0.5),
        _run("random", 0, 4.5, 0.5),
        _run("random", 1, 5.0, 0.5),
    ]
    found = compare_results(config, base, results)
    rise = found["arms"]["rise"]
    assert rise["rows"] == 10 and rise["tokens"] == 300
    assert rise["held_out"]["backdoor"]["loss"] == pytest.approx(4.2)
    assert rise["held_out"]["backdoor"]["change"]["values"] == pytest.approx([-1.0, -0.6])
    assert rise["held_out"]["backdoor"]["against_random"]["values"] == pytest.approx([-0.5, -0.6])
    assert rise["held_out"]["general"]["against_random"]["mean"] == pytest.approx(-1.1)
    second = 50 / 40 * (4.2 - 4.75)  # of the first text all arms have the same loss
    over = interval([0.0, second])
    assert rise["held_out"]["backdoor"]["over_texts"] == pytest.approx(
        {**{name: over[name] for name in ("mean", "low", "high")}, "lower": 1, "texts": 2}
    )
    assert rise["choices"]["acc"]["against_random"]["values"] == [0.25, 0.0]
    assert rise["choices"]["acc_norm"]["accuracy"] == pytest.approx(0.3125)
    assert found["arms"]["random"]["held_out"]["backdoor"]["against_random"] is None
    assert found["arms"]["random"]["held_out"]["backdoor"]["over_texts"] is None
    assert found["base"]["held_out"] == {"backdoor": 5.0, "general": 10.0}
    assert found["judged"] == ["backdoor"]


def test_the_first_set_is_judged_where_none_is_named_as_a_target(config_path: Path) -> None:
    config = load(config_path, "closed_loop.arms=[random]", "value.backdoor=-1.0")
    found = compare_results(config, _run("base", 0, 5.0, 0.5), [_run("random", 0, 4.0, 0.5)])
    assert found["judged"] == ["backdoor"] and found["verdict"][0]["improves"] is None


def test_a_loop_is_named_by_what_its_results_depend_on(config_path: Path) -> None:
    def named(*overrides: str) -> str:
        return loop_identity(load(config_path, *overrides), snapshot_id="s", valuation="v")

    one = named()
    assert named("closed_loop.arms=[rise]", "closed_loop.seeds=7", "closed_loop.checkpoint_steps=9") == one
    for change in (
        "closed_loop.tokens=9",
        "closed_loop.learning_rate=0.1",
        "value.backdoor=2.0",
        "closed_loop.choices=null",
    ):
        assert named(change) != one
    general = config_path.parent / "general.jsonl"
    moved = general.rename(general.with_name("moved.jsonl"))
    assert named("closed_loop.held_out.general.queries=moved.jsonl") == one
    moved.write_text(moved.read_text().replace("fine", "bad"))
    assert named("closed_loop.held_out.general.queries=moved.jsonl") != one


def _record(config: CurationConfig, seeds: int) -> dict[str, Any]:
    """A run's record: the loss after rise is 4.0, after random 4.5, with each further seed 0.1 higher."""
    base = _run("base", 0, 5.0, 0.5)
    losses = {"rise": 4.0, "random": 4.5}
    results = [_run(arm, seed, loss + 0.1 * seed, 0.5) for arm, loss in losses.items() for seed in range(seeds)]
    run = {"run_id": "run", "status": "completed", "started": "2026-01-31T12:00:00+00:00", "stages": []}
    return {**run, "closed_loop": {"loop_id": "l", **compare_results(config, base, results)}}


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_report_shows_what_each_arm_is_worth(config_path: Path, seeds: int) -> None:
    config = load(config_path, "closed_loop.arms=[rise, random]", f"closed_loop.seeds={seeds}")
    store = Store(config.store)
    write_run(store, _record(config, seeds))
    page = render_report(store, "run")
    assert page.count('id="h-closed_loop"') == 1
    assert page.count("<svg") == 2 * 2  # a wide and a narrow drawing of each held-out set
    assert "Against the untrained model&#39;s 5.000, in nats a token" in page
    assert page.index("Loss on backdoor") < page.index("Loss on general")  # the target first
    if seeds == 1:
        assert "at the one seed: no interval" in page and "One seed gives no interval" in page
        assert "−1.000" in page and "−0.500" in page
    else:
        view = closed_loop_view(_record(config, seeds)["closed_loop"])
        assert view is not None and [row.arm for row in view.held_out[0].rows] == ["rise", "random"]
        own, chance = view.held_out[0].rows
        assert own.change.mean == pytest.approx(-0.9) and own.against_random is not None and own.against_random.is_clear
        assert own.change.span == pytest.approx((-0.9 - 0.2484, -0.9 + 0.2484), abs=1e-4)
        assert chance.against_random is None
        assert [each.name for each in view.choices] == ["acc", "acc_norm"]


def test_a_chart_of_intervals_tells_better_from_worse_by_shape() -> None:
    items = [Interval("one", "−1", -1.0, (-1.5, -0.5), [-1.2, -0.8]), Interval("two <b>", "+2", 2.0, None, [2.0])]
    drawn = intervals(items, unit="change", words=Words("Change by arm", "one −1; two +2."))
    wide, narrow = drawn.split('<div class="narrow">')
    for page in (wide, narrow):
        assert page.count('class="points kept"') == page.count('class="points dropped"') == 1
        assert page.count('class="zero"') == 2
        assert "two &lt;b&gt;" in page and "<desc" in page
    bar = re.search(r'class="error kept" d="M([\d.]+) [\d.]+v10m0-5H([\d.]+)m', wide)
    dot = re.search(r'class="points kept" d="M([\d.]+) ', wide)
    assert bar and dot and 2 * float(dot[1]) == pytest.approx(float(bar[1]) + float(bar[2]), abs=0.2)
    assert wide.count("v10m0-5H") == 1  # no interval, no bar


def test_a_loop_that_did_not_come_to_its_end_is_not_shown() -> None:
    assert closed_loop_view(None) is None and closed_loop_view({"loop_id": "l"}) is None


def test_no_loop_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no closed loop is configured"):
        loop_of(load(write_curation(tmp_path)))


def _results(store: Store, loop_id: str) -> dict[str, Any]:
    return {name: store.get(f"loops/{loop_id}/results/{name}") for name in store.children(f"loops/{loop_id}/results")}


@pytest.mark.usefixtures("prefect_harness")
def test_texts_that_rows_are_valued_by_cannot_be_held_out(config_path: Path) -> None:
    config = load(config_path, "closed_loop.held_out.general.queries=queries.jsonl")
    with pytest.raises(ConfigError, match=r"held_out\.general: 4 of its texts are queries of target backdoor"):
        closed_loop(config)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_harness")
def test_a_flow_trains_compares_and_goes_on_where_it_was(config_path: Path) -> None:
    config = load(config_path)
    summary = closed_loop(config)
    found, store = summary["closed_loop"], Store(config.store)
    loop_id = found["loop_id"]
    assert list(summary["stages"]) == ["ingest", "index", "value", "select", "arms", "train", "compare"]
    assert list(found["arms"]) == ["rise", "random", "lowest", "bm25", "length"]
    assert set(found["base"]["held_out"]) == {"backdoor", "general"}
    for arm in found["arms"].values():
        assert 200 < arm["tokens"] <= 300
        for name, untrained in found["base"]["held_out"].items():
            own = arm["held_out"][name]
            assert len(own["change"]["values"]) == 2 and own["change"]["mean"] != 0
            assert own["loss"] == pytest.approx(untrained + own["change"]["mean"])
    record = read_run(store, summary["run_id"])
    assert record["closed_loop"]["arms"] == found["arms"]
    assert {item["uri"].rsplit("/", 1)[-1] for item in record["stages"][5]["outputs"]} == set(_results(store, loop_id))
    assert not [key for key, _ in store.list(f"loops/{loop_id}/checkpoints")]
    page = Path(summary["report"]).read_text(encoding="utf-8")
    assert 'id="h-closed_loop"' in page and "Against no training at all" in page

    before = _results(store, loop_id)
    lost = result_key(loop_id, "lowest", 1)
    store.delete([lost])
    again = closed_loop(_changed(config, arms=["lowest", "random"], seeds=3))
    assert again["closed_loop"]["loop_id"] == loop_id
    after = _results(store, loop_id)
    assert after.keys() - before.keys() == {"lowest-2.json", "random-2.json"}
    assert {name for name in before if after[name] != before[name]} == {"lowest-1.json"}
    one, two = (_measured(each) for each in (before["lowest-1.json"], after["lowest-1.json"]))
    assert one == two
    assert collect_garbage(store, dry_run=True)["removed"].get("loops") is None
    for run_id in (summary["run_id"], again["run_id"]):
        store.delete([f"runs/{run_id}/run.json"])
    assert collect_garbage(store, dry_run=True)["removed"]["loops"]["objects"] == 10 + 2 + 10 + 2 + 1


def _measured(result: bytes) -> Any:
    found = json.loads(result)
    return {name: found[name] for name in ("held_out", "choices", "training", "rows", "tokens")}


def _changed(config: CurationConfig, **changes: Any) -> CurationConfig:
    document = config.model_dump(mode="json")
    return CurationConfig.model_validate({**document, "closed_loop": {**document["closed_loop"], **changes}})
