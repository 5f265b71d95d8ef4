"""What `temperature: auto` and `dim: auto` choose, and what that is worth where rows have labels.

    python -m tests.benchmarks.tuning --task NAME=POOL,QUERIES,LABEL --model FOLDER [--task … --model …]
        [--rows 1000] [--widths] [--json]

LABEL is FIELD (a row is right for a query of the same value) or FIELD=VALUE. For each pair of task and model: all
candidates on a sample with auPRC and precision at 10, the choice on a sample of `tuning.rows` without labels, and the
points of precision that it loses against the best candidate on the first sample.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from rise_ops.choosing import sweep_corpus, try_candidates
from rise_ops.config import load_config
from rise_ops.evaluation import Label
from rise_ops.ingest import ingest_corpus
from rise_ops.store import Store

TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
K = "10"


def compare(task: str, model: str, *, rows: int, widths: bool) -> dict[str, Any]:
    """Candidates, choice and loss of one pair."""
    name, _, places = task.partition("=")
    pool, queries, label = places.split(",", 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "curation.yaml")
        document = {
            "store": f"{folder}/store",
            "corpus": {"name": name, "sources": [str(Path(pool).resolve())]},
            "model": {"name": str(Path(model).resolve()), "device": "cpu"},
            "sketch": {"temperature": 1.0} if widths else {},
            "tuning": {"dim" if widths else "temperature": True, "temperatures": list(TEMPERATURES)},
            "targets": {"queries": {"queries": str(Path(queries).resolve())}},
        }
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        config = load_config(path)
        store = Store(config.store)
        version, _ = ingest_corpus(store, config, run_id="benchmark")
        swept = sweep_corpus(store, config, label=Label.parse(label), rows=rows, widths=widths)
        chosen = try_candidates(store, config, version)["chosen"]
    candidates = swept["candidates"]
    right = [each for each in candidates if all(each[key] == value for key, value in chosen.items())]
    best = max(candidates, key=lambda each: each["labelled"][K]["precision"])
    loss = 100 * (best["labelled"][K]["precision"] - right[0]["labelled"][K]["precision"])
    return {"task": name, "model": Path(model).name, "chosen": chosen, "loss": loss, "candidates": candidates}


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table of each pair, and how often the choice was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", required=True)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--widths", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    losses = []
    for task in options.task:
        for model in options.model:
            found = compare(task, model, rows=options.rows, widths=options.widths)
            losses.append(found["loss"])
            if options.json:
                _say(json.dumps(found))
                continue
            _say(f"\n{found['task']} · {found['model']}: chosen {found['chosen']}, loses {found['loss']:.1f} points")
            _say("temperature  dim     rank  entropy  agreement  split  self   auPRC@10  P@10")
            for each in found["candidates"]:
                agreement = "    –" if each["agreement"] is None else f"{each['agreement']:.3f}"
                (split,), (own,) = each["split_half"].values(), each["self_retrieval"].values()
                figures = each["labelled"][K]
                rank, entropy = each["effective_rank"], each["entropy"]
                _say(
                    f"{each['temperature']:11g}  {each['dim']:6,}  {rank:5.1f}  {entropy:7.2f}"
                    f"  {agreement:>9}  {split:.3f}  {own:.3f}  {figures['auprc']:8.3f}  {figures['precision']:.3f}",
                )
    close = sum(loss <= 1 for loss in losses), sum(loss <= 2 for loss in losses)
    if not options.json:
        _say(
            f"\nwithin 1 point of the best: {close[0]} of {len(losses)}; within 2: {close[1]}; worst {max(losses):.1f}"
        )


if __name__ == "__main__":
    main()
