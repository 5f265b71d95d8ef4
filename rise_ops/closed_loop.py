"""The closed loop: rows that several arms chose at one budget, a model trained on each, and what it is worth.

    loops/<loop_id>/arms/<arm>-<seed>.parquet       the rows of an arm (`rise_ops.arms`)
    loops/<loop_id>/results/<arm>-<seed>.json       what the model trained on them makes of the held-out texts
    loops/<loop_id>/results/base.json               the same of the untrained model
    loops/<loop_id>/checkpoints/<arm>-<seed>/       a training that is not at its end (`rise_ops.training`)

`loop_id` covers rows, scores, weights, model, the configuration of training and the held-out texts, but not the arms
and the number of seeds: an arm or a seed that is added later costs itself only. Results are written once.

**Comparison.** Of each arm and each held-out set: the mean over seeds of the change of the loss against the untrained
model, and of the difference to the arm `random` with the same seed, each with a 95 % t-interval over seeds. (Of arms
that draw nothing, seeds differ in the order of the rows alone.) One seed gives no interval. Beside it, the difference
to `random` text by text, with an interval over texts.

**The claim** that is tested: rows of high value improve the target, those of low value hurt. It is judged on the
held-out sets that are named as a target with a positive weight, or on the first one where none is, against `random`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from rise_ops.arms import arm_texts, read_arm, read_candidates, refuse_seen, write_arms
from rise_ops.compare_config import Arm, ChoicesConfig, ClosedLoopConfig
from rise_ops.config import CurationConfig, TargetConfig
from rise_ops.corpus import CorpusVersion
from rise_ops.errors import ConfigError
from rise_ops.hashing import fingerprint
from rise_ops.held_out import choice_accuracy, held_out_loss
from rise_ops.machine import measured_on
from rise_ops.model_files import model_fingerprint
from rise_ops.progress import Progress, silent
from rise_ops.session import block_rows
from rise_ops.shapes import LoopResultShape
from rise_ops.store import Store
from rise_ops.targets import read_queries
from rise_ops.training import Checkpoints, encoded_rows, fresh_trunk, train
from rise_ops.trunk import Trunk

FORMAT_VERSION = 1
LOOP_VERSION = 1
"""Raised when the same configuration would give other results."""
BASE = "base"
CONFIDENCE = 0.95

_ACCURACIES = ("acc", "acc_norm")
_OF_NO_LOOP = {"arms", "seeds", "checkpoint_steps", "held_out", "choices"}
"""What the loop's id does not cover, or covers by content."""

Json = dict[str, Any]


def loop_of(config: CurationConfig) -> ClosedLoopConfig:
    """The section `closed_loop`.

    Raises
    ------
    ConfigError
        There is none.
    """
    if config.closed_loop is None:
        raise ConfigError("no closed loop is configured; give tokens and held-out texts under `closed_loop`")
    return config.closed_loop


def loop_identity(config: CurationConfig, *, snapshot_id: str, valuation: str) -> str:
    """Identity of a loop; reads the held-out texts.

    Raises
    ------
    SourceError
        They cannot be read.
    """
    loop = loop_of(config)
    return fingerprint(
        {
            "version": LOOP_VERSION,
            "rows": snapshot_id,
            "valuation": valuation,
            "weights": config.weights,
            "model": model_fingerprint(config.model),
            "training": loop.model_dump(mode="json", exclude=_OF_NO_LOOP),
            "held_out": {name: _names(config, texts) for name, texts in loop.held_out.items()},
            "choices": loop.choices and [loop.choices.distractors, _names(config, loop.choices)],
        }
    )


def _names(config: CurationConfig, texts: TargetConfig) -> list[str]:
    return [row.doc_id for row in read_queries(texts, limits=config.limits)]


def choose_rows(store: Store, config: CurationConfig, version: CorpusVersion, *, valuation: str, run_id: str) -> Json:
    """Choose the rows of all arms and seeds by the decisions of a run. Returns {loop_id, arms}.

    Raises
    ------
    ConfigError, SourceError
        The budget leaves nothing to choose, or held-out texts cannot be read, or are rows or queries.
    """
    loop, candidates = loop_of(config), read_candidates(store, run_id)
    loop_id = loop_identity(config, snapshot_id=version.snapshot_id, valuation=valuation)
    held_out = {name: _names(config, texts) for name, texts in loop.held_out.items()}
    _refuse_asked(config, held_out)
    refuse_seen(candidates, held_out)
    arms = write_arms(store, config, loop, candidates, loop_id=loop_id, blocks=block_rows(store, version))
    return {"loop_id": loop_id, "arms": arms}


def _refuse_asked(config: CurationConfig, held_out: Mapping[str, Sequence[str]]) -> None:
    """Raise where rows are valued by texts that are held out."""
    for target, queries in config.targets.items():
        asked = set(_names(config, queries))
        for name, texts in held_out.items():
            shared = asked.intersection(texts)
            if shared:
                raise ConfigError(
                    f"closed_loop.held_out.{name}: {len(shared):,} of its texts are queries of target {target}, by "
                    "which rows are valued; hold other texts out"
                )


def result_key(loop_id: str, arm: str, seed: int) -> str:
    """Where a result is in the store."""
    return f"loops/{loop_id}/results/{arm if arm == BASE else f'{arm}-{seed}'}.json"


def measure_base(store: Store, config: CurationConfig, *, loop_id: str) -> Json:
    """The untrained model on the held-out texts: what the store has of it, or what it gives now.

    Raises
    ------
    CurationError
        Texts or model cannot be read, or do not fit each other.
    """
    key = result_key(loop_id, BASE, 0)
    reused = store.exists(key)
    if not reused:
        trunk = fresh_trunk(config.model)
        record = {"arm": BASE, "seed": 0, "rows": 0, "tokens": 0, **_measured(trunk, config)}
        store.create_json(key, _dated(record, trunk))
    return _result(store, key, reused=reused)


def train_arm(store: Store, config: CurationConfig, *, loop_id: str, arm: Arm, seed: int,
              progress: Progress = silent) -> Json:  # fmt: skip
    """Train on the rows of an arm and measure: what the store has of it, or what it gives now.

    Parameters
    ----------
    progress
        Counts rows, as many in each epoch.

    Raises
    ------
    CurationError
        As `measure_base`, or the training diverged.
    """
    loop, key = loop_of(config), result_key(loop_id, arm, seed)
    checkpoints = Checkpoints(store, f"loops/{loop_id}/checkpoints/{arm}-{seed}")
    reused = store.exists(key)
    if not reused:
        chosen, trunk, clock = read_arm(store, loop_id, arm, seed), fresh_trunk(config.model), time.perf_counter()
        total = chosen.height * loop.epochs
        training = train(trunk, encoded_rows(trunk, arm_texts(store, chosen)), loop, seed=seed, checkpoints=checkpoints,
                         progress=lambda done, steps: progress(total * done // (steps or 1), total))  # fmt: skip
        record = {
            "arm": arm,
            "seed": seed,
            "rows": chosen.height,
            "tokens": int(chosen["tokens"].cast(int).sum()),
            "training": asdict(training),
            "seconds": round(time.perf_counter() - clock, 3),
        }
        store.create_json(key, _dated({**record, **_measured(trunk, config)}, trunk))
    checkpoints.clear()
    return _result(store, key, reused=reused)


def _measured(trunk: Trunk, config: CurationConfig) -> Json:
    loop = loop_of(config)
    found: Json = {}
    for name, texts in loop.held_out.items():
        losses = held_out_loss(trunk, read_queries(texts, limits=config.limits))
        found[name] = {"loss": losses.mean, **asdict(losses)}
    return {"held_out": found, "choices": loop.choices and _chosen(trunk, config, loop.choices)}


def _chosen(trunk: Trunk, config: CurationConfig, choices: ChoicesConfig) -> Json:
    rows = read_queries(choices, limits=config.limits)
    return asdict(choice_accuracy(trunk, rows, choices.distractors))


def _dated(record: Json, trunk: Trunk) -> Json:
    return {"format_version": FORMAT_VERSION, **record, **measured_on(str(trunk.device))}


def _result(store: Store, key: str, *, reused: bool) -> Json:
    """What a run needs to know of a result: that it is there, and whether it was before."""
    read_result(store, key)
    return {"key": key, "reused": reused}


def read_result(store: Store, key: str) -> Json:
    """A result, as `LoopResultShape` describes it.

    Raises
    ------
    MissingObjectError, IntegrityError
        It is not there, or damaged.
    """
    return store.get_json(key, format_version=FORMAT_VERSION, shape=LoopResultShape)


def t_quantile(part: float, freedom: int) -> float:
    """Quantile of Student's t: `part` of the distribution with `freedom` (≥ 1) degrees of freedom lies below it.

    By bisection of the distribution function, which for whole degrees of freedom is a finite sum (Abramowitz and
    Stegun, 26.7.3 and 26.7.4). `part` is above 1/2.
    """
    low, high = 0.0, 1.0
    while _t_below(high, freedom) < part:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_below(middle, freedom) < part else (low, middle)
    return (low + high) / 2


def _t_below(t: float, freedom: int) -> float:
    """Part of Student's t below t ≥ 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    if freedom % 2:
        term = cosine
        for odd in range(3, freedom + 1, 2):
            total += term
            term *= cosine**2 * (odd - 1) / odd
        within = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        for even in range(2, freedom + 1, 2):
            total += term
            term *= cosine**2 * (even - 1) / even
        within = math.sin(angle) * total
    return (1 + within) / 2


def interval(values: Sequence[float]) -> Json:
    """{mean, low, high, values}: the mean with its 95 % t-interval; of one value low and high are None."""
    mean = fmean(values)
    if len(values) < 2:
        return {"mean": mean, "low": None, "high": None, "values": list(values)}
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def compare_results(config: CurationConfig, base: Json, results: Sequence[Json]) -> Json:
    """The section `closed_loop` of a run's record, without the loop's id.

    Parameters
    ----------
    base, results
        As `read_result` gives them, the results of each arm in the order of seeds.

    Returns
    -------
    dict
        tokens, seeds, base {held_out, choices}, judged, arms {arm: {rows, tokens, held_out: {name: {loss, change,
        against_random, over_texts}}, choices: {acc: …, acc_norm: …}}}, verdict
    """
    loop = loop_of(config)
    by_arm: dict[str, list[Json]] = {arm: [found for found in results if found["arm"] == arm] for arm in loop.arms}
    chance = by_arm.get("random")
    arms = {arm: _arm(base, runs, chance if arm != "random" else None) for arm, runs in by_arm.items()}
    judged = [name for name in loop.held_out if config.weights.get(name, 0) > 0] or [next(iter(loop.held_out))]
    return {
        "tokens": loop.tokens,
        "seeds": loop.seeds,
        "base": {
            "held_out": {name: found["loss"] for name, found in base["held_out"].items()},
            "choices": base.get("choices"),
        },
        "judged": judged,
        "arms": arms,
        "verdict": [verdict(arms, name) for name in judged],
    }


def _arm(base: Json, runs: Sequence[Json], chance: Sequence[Json] | None) -> Json:
    held_out: Json = {}
    for name, untrained in base["held_out"].items():
        own, other = ([run["held_out"][name] for run in each] for each in (runs, chance or ()))
        changes = _change(untrained["loss"], *([each["loss"] for each in some] for some in (own, other)))
        held_out[name] = {"loss": fmean(each["loss"] for each in own), **changes, "over_texts": _over_texts(own, other)}
    choices: Json = {}
    for name in _ACCURACIES if base.get("choices") else ():
        mine, its = ([run["choices"][name] for run in each] for each in (runs, chance or ()))
        choices[name] = {"accuracy": fmean(mine), **_change(base["choices"][name], mine, its)}
    rows, tokens = (fmean(run[name] for run in runs) for name in ("rows", "tokens"))
    return {"rows": round(rows), "tokens": round(tokens), "held_out": held_out, "choices": choices}


def _change(untrained: float, own: Sequence[float], other: Sequence[float]) -> Json:
    """The change against the untrained model, and the difference to random rows where there are some."""
    paired = [mine - its for mine, its in zip(own, other, strict=True)] if other else None
    return {"change": interval([value - untrained for value in own]), "against_random": paired and interval(paired)}


def _over_texts(own: Sequence[Json], other: Sequence[Json]) -> Json | None:
    """The difference to random rows text by text, each text's mean over seeds in nats a token; None without random.

    Returns
    -------
    dict
        mean, low, high (a t-interval over texts, which count alike whatever their length), lower (texts whose loss is
        lower), texts
    """
    if not other:
        return None
    sums = [[sum(losses) for losses in zip(*(run["losses"] for run in runs), strict=True)] for runs in (own, other)]
    found = [(mine - its) / (len(own) * count) for mine, its, count in zip(*sums, own[0]["counts"], strict=True)]
    over = {name: value for name, value in interval(found).items() if name != "values"}
    return {**over, "lower": sum(value < 0 for value in found), "texts": len(found)}


def verdict(arms: Mapping[str, Json], name: str) -> Json:
    """What the arms say of the claim on a held-out set.

    Returns
    -------
    dict
        held_out, improves and hurts (True: the whole interval of the difference to random rows says so, False: it does
        not, None: it cannot be told, for want of an arm or of a second seed), text
    """
    parts = []
    found: Json = {"held_out": name}
    for arm, says, sign, what in (("rise", "improves", -1, "Rows of the highest value"),
                                  ("lowest", "hurts", 1, "Rows of the lowest value")):  # fmt: skip
        own = arms.get(arm, {}).get("held_out", {}).get(name, {})
        against = own.get("against_random")
        if against is None:
            found[says] = None
            parts.append(f"{what} are not compared: that needs the arms {arm} and random.")
            continue
        found[says] = _is_beyond(against, sign)
        parts += [_told(what, against, sign), _told_texts(own["over_texts"])]
        if arm == "lowest":
            parts.append(_told_change(own["change"]))
    return {**found, "text": " ".join(parts)}


def _is_beyond(found: Json, sign: int) -> bool | None:
    """Whether an interval lies wholly on one side of 0; None where there is no interval."""
    if found["low"] is None:
        return None
    return bool((found["low"] if sign > 0 else -found["high"]) > 0)


def _told(what: str, found: Json, sign: int) -> str:
    """A sentence on an arm's loss against that of random rows, and whether it is as claimed (sign −1: lower)."""
    values, mean = found["values"], found["mean"]
    side = "lower" if mean < 0 else "higher"
    number = sum((value < 0) == (mean < 0) for value in values)
    text = f"{what} gave a loss {abs(mean):.3f} nats a token {side} than random rows"
    if found["low"] is None:
        return f"{text}, at the one seed: no interval."
    at = "at every seed" if number == len(values) else f"at {number} of {len(values)} seeds"
    span = f"95 % interval {_signed(found['low'])} to {_signed(found['high'])}"
    if _is_beyond(found, sign):
        return f"{text} {at} ({span}), as claimed."
    if _is_beyond(found, -sign):
        return f"{text} {at} ({span}): the contrary of the claim."
    return f"{text} {at} ({span}): the claim is not shown."


def _told_texts(found: Json) -> str:
    span = "" if found["low"] is None else f" (95 % interval {_signed(found['low'])} to {_signed(found['high'])})"
    return (
        f"Text by text: lower on {found['lower']:,} of {found['texts']:,}, {_signed(found['mean'])} in the mean{span}."
    )


def _told_change(found: Json) -> str:
    mean = found["mean"]
    return f"Against no training at all, the loss is {abs(mean):.3f} {'lower' if mean < 0 else 'higher'}."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
