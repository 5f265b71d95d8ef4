"""Error bars beside errors: what scores are said to be off by, and what they are off by.

    python -m tests.benchmarks.uncertainty --task NAME=POOL,QUERIES --model FOLDER [--task … --model …]
        [--temperature 1.0] [--rows 500] [--queries 60] [--seeds 2] [--share 0.2]

Each task goes with the model at the same place. The reference is the unsketched kernel (`rise_ops.exact`). Per width:
the root mean square error of the target's mean score against it, the predicted one (root mean square standard error),
the part of the errors within 1.96 standard errors, the spread of the scores, and of the rows kept (the best `share`)
the part that two seeds have in common, that is expected (`rise_ops.stability`), and that the exact scores keep, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.config import FieldMap, ModelConfig, SketchConfig
from rise_ops.exact import exact_scores
from rise_ops.rows import CanonicalRow, canonical_row
from rise_ops.signatures import Signer
from rise_ops.stability import overlap_of
from rise_ops.trunk import Trunk, load_trunk
from rise_ops.uncertainty import noise_queries, standard_errors

WIDTHS = ((16, 16, 6), (48, 32, 16), (96, 64, 32), (128, 128, 64))
MEMORY = 2**30
Float64Array = npt.NDArray[np.float64]


def read_rows(path: str, count: int) -> list[CanonicalRow]:
    """Rows of a JSONL file, drawn without replacement."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    drawn = np.sort(np.random.default_rng(0).permutation(len(lines))[:count])
    return [canonical_row(json.loads(lines[number]), fields=FieldMap(), row_bytes=2**20) for number in drawn.tolist()]


def measure(trunk: Trunk, sketch: SketchConfig, rows: Sequence[CanonicalRow], queries: Sequence[CanonicalRow]
            ) -> tuple[Float64Array, Float64Array]:  # fmt: skip
    """Mean scores and their standard errors."""
    signer = Signer(trunk, sketch, memory=MEMORY)
    x = signer.rows([row.text for row in rows]).signature.astype(np.float32)
    q = signer.queries([row.text for row in queries], [row.prompt for row in queries]).signature.astype(np.float32)
    errors = standard_errors(x @ noise_queries(q, sketch, "mean").T)
    return (x @ q.mean(axis=0)).astype(np.float64), errors.astype(np.float64)


def best(values: Float64Array, count: int) -> set[int]:
    """The rows of the highest values."""
    return set(np.argsort(-values, kind="stable")[:count].tolist())


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--queries", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.2)
    options: Any = parser.parse_args()
    say("| task | width | measured | predicted | ratio | within 1.96 | spread | kept by both | expected | by exact |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    for task, model in zip(options.task, options.model, strict=True):
        name, _, places = task.partition("=")
        pool, _, asked = places.partition(",")
        rows, queries = read_rows(pool, options.rows), read_rows(asked, options.queries)
        trunk = load_trunk(ModelConfig(name=str(Path(model).resolve()), device="cpu"))
        base = SketchConfig(temperature=options.temperature)
        texts, prompts = [row.text for row in queries], [row.prompt for row in queries]
        exact = exact_scores(trunk, base, [row.text for row in rows], texts, prompts).mean(axis=1)
        count = int(options.share * len(rows))
        for dim_r, dim_h, dim_g in WIDTHS:
            wide = base.model_copy(update={"dim_r": dim_r, "dim_h": dim_h, "dim_g": dim_g})
            seeds = [wide.model_copy(update={"seed": 42 + 1_000 * seed}) for seed in range(options.seeds)]
            found = [measure(trunk, each, rows, queries) for each in seeds]
            wrong = np.concatenate([scores - exact for scores, _ in found])
            said = np.concatenate([errors for _, errors in found])
            off, told = float(np.sqrt(np.mean(wrong**2))), float(np.sqrt(np.mean(said**2)))
            kept = [best(scores, count) for scores, _ in found]
            both = np.mean([len(one & kept[0]) / count for one in kept[1:]])
            expected = np.mean([overlap_of(*each, count) for each in found])
            right = np.mean([len(one & best(exact, count)) / count for one in kept])
            say(
                f"| {name} | {wide.dim:,} | {off:.4f} | {told:.4f} | {told / off:.2f} | "
                f"{np.mean(np.abs(wrong) <= 1.96 * said):.0%} | {exact.std():.4f} | {both:.0%} | {expected:.0%} | "
                f"{right:.0%} |"
            )


def say(line: str) -> None:
    """A line of output, at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
