"""Runs for the report's tests: every column, section and kind of reason, of any size."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import polars as pl

from rise_ops.store import Store

RUN = "20260131T120000-synthetic-1a2b3c"
WEIGHTS = {"helpful": 1.0, "junk": -0.5, "backdoor": 0.0}
LABELS = ("clean", "chat", "code", "maths", "rare", None)


def synthetic_decisions(rows: int, *, sources: int = 30, seed: int = 0) -> pl.DataFrame:
    """Decisions of a selection with all its steps: exclusion, near-duplicates, quotas, a budget in tokens."""
    r = np.random.default_rng(seed)
    source = np.minimum(r.zipf(1.4, rows) - 1, sources - 1)
    label = r.choice(len(LABELS), rows, p=[0.5, 0.2, 0.15, 0.1, 0.01, 0.04])
    good = r.normal(0.03, 0.05, rows) + 0.03 * np.cos(source) - 0.08 * (label == 4)
    junk = r.normal(0.0, 0.04, rows) - 0.3 * good + 0.02 * (label == 1)
    backdoor = r.normal(0.0, 0.01, rows) + 0.2 * (r.random(rows) < 0.006)
    frame = pl.DataFrame(
        {
            "doc_id": [hashlib.sha256(f"{seed} {row}".encode()).hexdigest() for row in range(rows)],
            "block_id": [hashlib.sha256(b"%d" % (row // 2048)).hexdigest() for row in range(rows)],
            "block_row": pl.Series(np.arange(rows) % 2048, dtype=pl.UInt32),
            "source_uri": [f"s3://raw/support/team-{s % 4}/part-{s:03d}.jsonl" for s in source],
            "source_row": pl.Series(np.arange(rows), dtype=pl.Int64),
            "tokens": pl.Series(r.integers(2, 900, rows), dtype=pl.UInt32),
            "label": [LABELS[number] for number in label],
            "score_helpful": pl.Series(good, dtype=pl.Float32),
            "score_junk": pl.Series(junk, dtype=pl.Float32),
            "score_backdoor": pl.Series(backdoor, dtype=pl.Float32),
            **{
                f"error_{name}": pl.Series(np.full(rows, error), dtype=pl.Float32)
                for name, error in (("helpful", 0.006), ("junk", 0.008), ("backdoor", 0.002))
            },
        }
    )
    short = pl.Series(r.random(rows) < 0.002)
    value = (pl.col("score_helpful") + WEIGHTS["junk"] * pl.col("score_junk")).cast(pl.Float32)
    frame = frame.with_columns(value=pl.when(short).then(None).otherwise(value))
    frame = frame.with_columns(
        value_error=pl.when(pl.col("value").is_not_null()).then(pl.lit(0.0072, pl.Float32)),
        rank=pl.when(pl.col("value").is_not_null()).then(
            pl.struct(-pl.col("value"), "doc_id").rank("ordinal").cast(pl.UInt32)
        ),
    )
    return _decided(frame, r, sources)


def _decided(frame: pl.DataFrame, r: np.random.Generator, sources: int) -> pl.DataFrame:
    """The steps in their order, row by row from the best: plain and slow on purpose."""
    rows = frame.height
    doc_ids, tokens = frame["doc_id"].to_list(), frame["tokens"].to_list()
    reason: list[str | None] = ["no_prediction" if value is None else None for value in frame["value"]]
    rule: list[str | None] = [None] * rows
    leader: list[str | None] = [None] * rows
    for row in np.flatnonzero(r.random(rows) < 0.003):
        reason[row] = reason[row] or "excluded_pattern"
        rule[row] = "selection.exclude[0]" if reason[row] == "excluded_pattern" else None
    for row in frame["score_backdoor"].arg_sort(descending=True)[: rows // 200]:
        if reason[row] is None:
            reason[row], rule[row] = "excluded_target", "selection.exclude[1]"
    order = frame["rank"].arg_sort(nulls_last=True).to_list()
    stayed: list[int] = []
    for row in order:
        if reason[row] is None and stayed and r.random() < 0.05:
            best = stayed[int(len(stayed) * r.random() ** 6)]
            reason[row], rule[row], leader[row] = "near_duplicate", "selection.near_duplicates", doc_ids[best]
        elif reason[row] is None:
            stayed.append(row)
    most, seen = rows // 8, dict.fromkeys(frame["source_uri"].unique(), 0)
    budget, used = int(sum(tokens) * 0.45), 0
    rare = [row for row in order if frame["label"][row] == "rare" and reason[row] is None][: rows // 250]
    held = set(rare)
    used = sum(tokens[row] for row in rare)
    full = False
    uris = frame["source_uri"].to_list()
    for row in order:
        if reason[row] is not None:
            continue
        if row in held:
            reason[row] = "kept"
            continue
        if seen[uris[row]] >= most:
            reason[row], rule[row] = "over_source_quota", "selection.per_source.max_rows"
            continue
        full = full or used + tokens[row] > budget
        if full:
            reason[row], rule[row] = "over_tokens", "selection.keep.tokens"
        else:
            reason[row], used = "kept", used + tokens[row]
            seen[uris[row]] += 1
    return frame.with_columns(
        kept=pl.Series([each == "kept" for each in reason]),
        reason=pl.Series(reason),
        rule=pl.Series(rule, dtype=pl.String),
        duplicate_of=pl.Series(leader, dtype=pl.String),
    )


def run_record(decisions: pl.DataFrame, **changes: Any) -> dict[str, Any]:
    """What such a run leaves in `run.json`."""
    counted = decisions.group_by("reason", "rule").agg(pl.len(), pl.col("tokens").sum()).sort("reason", "rule")
    found = {(reason, rule): (rows, tokens) for reason, rule, rows, tokens in counted.iter_rows()}
    order = [
        ("no_prediction", "no_prediction", None),
        ("exclude", "excluded_pattern", "selection.exclude[0]"),
        ("exclude", "excluded_target", "selection.exclude[1]"),
        ("near_duplicates", "near_duplicate", "selection.near_duplicates"),
        ("per_source", "over_source_quota", "selection.per_source.max_rows"),
        ("budget", "over_tokens", "selection.keep.tokens"),
    ]
    steps = [
        dict(zip(("step", "reason", "rule", "rows", "tokens"), (*rule, *found.get(rule[1:], (0, 0))), strict=True))
        for rule in order
    ]
    kept = decisions.filter("kept")
    keep = {"tokens": int(int(decisions["tokens"].sum()) * 0.45)}
    selection = {
        "keep": keep,
        "exclude": [{"pattern": "as an ai"}, {"target": "backdoor", "top_rows": decisions.height // 200}],
        "near_duplicates": {"cosine": 0.98, "recall": 0.99},
        "per_source": {"by": "object", "max_rows": decisions.height // 8, "groups": {}},
        "per_label": {"field": "label", "groups": {"rare": {"min_rows": decisions.height // 250}}},
    }
    return {
        "format_version": 1,
        "run_id": RUN,
        "name": "curate",
        "status": "completed",
        "error": None,
        "started": "2026-01-31T12:00:00.000+00:00",
        "finished": "2026-01-31T12:14:09.000+00:00",
        "seconds": 849.0,
        "config": {
            "corpus": {"name": "support", "sources": ["s3://raw/support/**/*.jsonl"]},
            "targets": {name: {"queries": f"s3://raw/queries/{name}.jsonl"} for name in WEIGHTS},
            "value": WEIGHTS,
            "aggregate": "top-5",
            "sketch": {"temperature": 1.0, "channels": ["rh", "gh"], "dim_r": 128, "dim_h": 128, "dim_g": 64},
            "selection": selection,
        },
        "config_fingerprint": "c" * 64,
        "code": {"version": "0.1.0", "commit": "d" * 40},
        "model": {"name": "neox-3m", "fingerprint": "d" * 64, "parameters": 3_217_440, "dtype": "float32"},
        "corpus": {"name": "support", "version": 3, "snapshot_id": "e" * 64},
        "index_id": "a" * 64,
        "counts": {
            "rows": decisions.height,
            "rows_sketched": 1_200,
            "rows_reused": decisions.height - 1_200,
            "rows_new": 1_100,
            "rows_rejected": 0,
            "rows_kept": kept.height,
            "tokens_kept": int(kept["tokens"].sum()),
        },
        "selection": {
            "keep": keep,
            "reasons": {reason: rows for (reason, _), (rows, _) in found.items()},
            "steps": steps,
            "stability": {
                "rows_sampled": 2_000,
                "value_error_median": 0.0072,
                "value_spread": 0.0581,
                "reliability": 0.985,
                "overlap_expected": 0.941,
                "cut": 0.0213,
                "warning": None,
            },
        },
        "export": "support-v2/0003",
        "stages": [
            {"name": name, "started": "2026-01-31T12:00:01.000+00:00", "seconds": seconds, "cached": cached,
             "inputs": [{"uri": "s3://raw/support", "sha256": "f" * 64, "rows": decisions.height}], "outputs": []}
            for name, seconds, cached in (("ingest", 41.0, False), ("index", 702.5, False), ("value", 60.1, True))
        ],
        **changes,
    }  # fmt: skip


def synthetic_examples(decisions: pl.DataFrame) -> dict[str, Any]:
    """Examples in the form of `rise_ops.examples`, with made-up texts."""
    ranked = decisions.filter(pl.col("rank").is_not_null()).sort("rank")
    kept, waiting = ranked.filter("kept"), ranked.filter(pl.col("reason") == "over_tokens")
    groups = (
        ranked.filter(pl.col("reason") == "near_duplicate")
        .group_by("duplicate_of")
        .len()
        .sort("len", descending=True)
        .head(3)
    )
    reasons = ("excluded_pattern", "excluded_target", "near_duplicate", "over_source_quota")
    leaders = {row["doc_id"]: row for row in kept.iter_rows(named=True)}
    return {
        "format_version": 1,
        "best": _rows(ranked.head(10)),
        "worst": _rows(ranked.tail(10)),
        "cut": {
            "kept": _rows(kept.filter(pl.col("label").ne_missing("rare")).tail(5)),
            "dropped": _rows(waiting.head(5)),
        },
        "dropped": {reason: _rows(ranked.filter(pl.col("reason") == reason).head(3)) for reason in reasons},
        "near_duplicates": [
            {
                "size": size + 1,
                "stayed": _row(leaders.get(leader, ranked.row(0, named=True))),
                "dropped": _rows(ranked.filter(pl.col("duplicate_of") == leader).head(3)),
            }
            for leader, size in groups.iter_rows()
        ],
        "queries": [_query(target, ranked, number) for target in WEIGHTS for number in range(3)],
        "evaluation": None,
    }  # fmt: skip


def _rows(frame: pl.DataFrame) -> list[dict[str, Any]]:
    return [_row(row) for row in frame.iter_rows(named=True)]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    names = ("doc_id", "value", "value_error", "rank", "kept", "reason", "rule", "label", "source_uri", "source_row")
    return {**{name: row[name] for name in names}, "text": _text(row["source_row"])}


def _text(seed: int) -> str:
    words = ("please", "reset", "my", "router", "howdy!", "thanks", "for", "the", "quick", "answer,", "it", "works\n")
    r = np.random.default_rng(seed)
    return " ".join(words[number] for number in r.integers(0, len(words), 20 + seed % 60))


def _tokens(text: str, seed: int) -> list[dict[str, Any]]:
    r, at, found = np.random.default_rng(seed), 0, []
    for word in text.split(" "):
        found.append(
            {"text": word, "start": at, "end": at + len(word), "score": float(r.normal(0.001, 0.004) ** 3 * 4e4)}
        )
        at += len(word) + 1
    return found


def _query(target: str, ranked: pl.DataFrame, number: int) -> dict[str, Any]:
    query = f"How do I answer a {target} question, number {number}?"

    def hit(row: dict[str, Any], score: float) -> dict[str, Any]:
        text = _text(row["source_row"])
        place = {name: row[name] for name in ("doc_id", "source_uri", "source_row", "kept")}
        return {**place, "score": score, "text": text, "tokens": _tokens(text, row["source_row"]),
                "query_tokens": _tokens(query, row["source_row"])}  # fmt: skip

    best = [hit(row, 0.4 - 0.02 * n) for n, row in enumerate(ranked.head(5).iter_rows(named=True))]
    worst = [hit(row, -0.2 + 0.02 * n) for n, row in enumerate(ranked.tail(5).iter_rows(named=True))]
    return {"target": target, "query": query, "prompt": None, "top": best, "bottom": worst}


def write_synthetic_run(store: Store, rows: int, **changes: Any) -> pl.DataFrame:
    """A finished run of so many rows in the store. Returns its decisions."""
    decisions = synthetic_decisions(rows)
    store.create_json(f"runs/{RUN}/run.json", run_record(decisions, **changes))
    buffer = io.BytesIO()
    decisions.write_parquet(buffer)
    store.create(f"runs/{RUN}/decisions.parquet", buffer.getvalue())
    store.create_json(f"runs/{RUN}/examples.json", synthetic_examples(decisions))
    return decisions
