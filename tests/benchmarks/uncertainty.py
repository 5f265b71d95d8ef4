"""Predicted standard errors of scores beside measured ones, and the overlap that is expected beside the one there is.

    python -m tests.benchmarks.uncertainty --task NAME=POOL,QUERIES,MODEL [--task …] [--rows 500] [--seeds 4]
        [--temperature 1 0.1] [--json FILE]

For each task: the exact kernel (`rise_ops.exact`) of some rows of the pool on all queries, then signatures of the same
hidden states at four widths with several seeds. Scores are means over the queries, unless `max` and `top-10` are named.

rmse        of scores against the exact kernel (sd: of the values' spread), mean over the seeds
own         part of the rmse that is left without what is proportional to the exact score
predicted   median predicted standard error
ratio       root mean square of the predicted over that of the measured errors
coverage    rows whose exact score lies within 1.96 predicted errors
max, top    the same ratio for aggregates, to the measured errors' spread (the scores' lift is shown beside it: it is
            the same for all rows, nearly)
overlap     of the best 10 and 20 % of the rows: expected from one sketch | measured between seeds | with the exact
            ranking
rank        rank correlation of the scores with the exact kernel | of the scores with the cosine of the plain LM-head
            gradients, which are not scaled position by position | of the exact kernel with that cosine
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rise_ops.config import FieldMap, LimitsConfig, ModelConfig, SketchConfig
from rise_ops.corpus import read_rows
from rise_ops.exact import HiddenChunks, exact_scores, text_chunks
from rise_ops.stability import overlap_of
from rise_ops.trunk import Trunk, load_trunk
from rise_ops.uncertainty import noise_queries, noise_squares, standard_errors

WIDTHS = ((16, 16, 6), (32, 32, 32), (64, 64, 64), (128, 128, 64))
SHARES = (0.1, 0.2)
AGGREGATES = {"max": 1, "top-10": 10}

Float64Array = npt.NDArray[np.float64]
Json = dict[str, Any]


def measure(task: str, *, rows: int, seeds: int, temperatures: Sequence[float]) -> list[Json]:
    """Figures of one task: a record for each temperature and width."""
    name, _, places = task.partition("=")
    pool, queries, model = places.split(",")
    trunk = load_trunk(ModelConfig(name=str(Path(model).resolve()), device="cpu"))
    read = [read_rows(str(Path(file).resolve()), FieldMap(), LimitsConfig()) for file in (pool, queries)]
    drawn = np.sort(np.random.default_rng(0).permutation(len(read[0]))[:rows]).tolist()
    texts, asked = [read[0][row].text for row in drawn], [row.text for row in read[1]]
    prompts = [row.prompt for row in read[1]]
    hidden = [list(text_chunks(trunk, texts)), list(text_chunks(trunk, asked, prompts))]
    found = []
    for temperature in temperatures:
        base = SketchConfig(temperature=temperature)
        exact, gradient = (
            exact_scores(trunk, base, texts, asked, prompts, kind=kind) for kind in ("kernel", "gradient")
        )
        for widths in WIDTHS:
            sketch = base.model_copy(update=dict(zip(("dim_r", "dim_h", "dim_g"), widths, strict=True)))
            signed = [
                [_signatures(trunk, sketch.model_copy(update={"seed": 42 + 3 * seed}), chunks) for chunks in hidden]
                for seed in range(seeds)
            ]
            record = {"task": name, "temperature": temperature, "dim": sketch.dim, "rows": len(texts)}
            found.append(record | _figures(signed, sketch, exact, gradient.mean(axis=1)))
            _line(found[-1])
    return found


def _signatures(trunk: Trunk, sketch: SketchConfig, batches: Sequence[HiddenChunks]) -> npt.NDArray[np.float32]:
    """Signatures of rows or queries, rounded as they are stored."""
    head = trunk.head(sketch)
    sums = torch.zeros(1 + max(chunk.row for batch in batches for chunk in batch.chunks), sketch.dim)
    for batch in batches:
        made = head.signatures(batch.hidden, batch.ids, batch.lengths, loss_start=batch.loss_starts)
        sums.index_add_(0, torch.tensor([chunk.row for chunk in batch.chunks]), made.half().float())
    unit = sums / torch.linalg.vector_norm(sums, dim=1, keepdim=True).clamp_min(1e-8)
    found: npt.NDArray[np.float32] = unit.half().float().numpy()
    return found


def _figures(signed: Sequence[Sequence[npt.NDArray[np.float32]]], sketch: SketchConfig, exact: Float64Array,
             gradient: Float64Array) -> Json:  # fmt: skip
    right = exact.mean(axis=1)
    values = np.array([(rows @ queries.mean(axis=0)).astype(np.float64) for rows, queries in signed])
    errors = np.array([_errors(rows, queries, sketch, "mean") for rows, queries in signed])
    wrong = values - right
    own = wrong - (wrong @ right / (right @ right))[:, None] * right
    record: Json = {
        "spread": float(right.std()),
        "rmse": _root(wrong),
        "own": _root(own) / _root(wrong),
        "predicted": float(np.median(errors)),
        "ratio": _root(errors) / _root(wrong),
        "coverage": float(np.mean(np.abs(wrong) < 1.96 * errors)),
        "rank": [
            *(float(np.mean([_rank_correlation(each, other) for each in values])) for other in (right, gradient)),
            _rank_correlation(right, gradient),
        ],
    }
    for aggregate, best in AGGREGATES.items():
        lifts = [_best(rows @ queries.T, best) - _best(exact, best) for rows, queries in signed]
        told = [_errors(rows, queries, sketch, aggregate) for rows, queries in signed]
        spread = _root(np.array([each - each.mean() for each in lifts]))
        record[aggregate] = {"ratio": _root(np.array(told)) / spread, "lift": float(np.mean(lifts)), "spread": spread}
    for share in SHARES:
        count = max(1, int(share * len(right)))
        tops = [set(np.argsort(-each)[:count].tolist()) for each in values]
        ideal = set(np.argsort(-right)[:count].tolist())
        record[f"overlap {share:.0%}"] = [
            float(np.mean([overlap_of(*each, count) for each in zip(values, errors, strict=True)])),
            float(np.mean([len(a & b) / count for a, b in combinations(tops, 2)])),
            float(np.mean([len(top & ideal) / count for top in tops])),
        ]
    return record


def _errors(rows: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], sketch: SketchConfig, aggregate: str,
            ) -> Float64Array:  # fmt: skip
    squares = noise_squares(rows @ noise_queries(queries, sketch, aggregate).T)
    return standard_errors(squares, np.ones(len(rows), bool)).astype(np.float64)


def _best(scores: npt.NDArray[Any], count: int) -> Float64Array:
    return np.asarray(np.sort(scores, axis=1)[:, -count:].mean(axis=1), np.float64)


def _root(values: Float64Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _rank_correlation(a: Float64Array, b: Float64Array) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def _line(each: Json) -> None:
    parts = [f"{each['task']:9}{each['temperature']:4g}{each['dim']:7,}"]
    parts.append(
        f"{each['spread']:.4f} {each['rmse']:.4f} {each['own']:.2f} {each['predicted']:.4f} {each['ratio']:.2f}"
    )
    parts.append(f"{each['coverage']:.2f}")
    parts.append(" ".join(f"{each[name]['ratio']:.2f} (+{each[name]['lift']:.3f})" for name in AGGREGATES))
    parts += ["|".join(f"{value:.2f}" for value in each[f"overlap {share:.0%}"]) for share in SHARES]
    parts.append("|".join(f"{value:.2f}" for value in each["rank"]))
    _say("  ".join(parts))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", required=True, metavar="NAME=POOL,QUERIES,MODEL")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    _say("task     temp    dim  sd     rmse   own  predic. ratio cover max ratio    top-10        overlap 10%     20%"
         "             rank")  # fmt: skip
    records = []
    for task in options.task:
        records += measure(task, rows=options.rows, seeds=options.seeds, temperatures=options.temperature)
    ratios, coverage = (np.array([each[name] for each in records]) for name in ("ratio", "coverage"))
    overlaps = np.array([each[f"overlap {share:.0%}"] for each in records for share in SHARES])
    off = overlaps[:, 0] - overlaps[:, 1]
    own = np.mean([each["own"] for each in records])
    _say(
        f"ratio {np.exp(np.log(ratios).mean()):.2f} ({ratios.min():.2f} to {ratios.max():.2f}), coverage "
        f"{coverage.mean():.3f} ({coverage.min():.2f} to {coverage.max():.2f}), own {own:.2f}, expected minus measured "
        f"overlap {off.mean():+.3f}, root mean square {_root(off):.3f}"
    )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
