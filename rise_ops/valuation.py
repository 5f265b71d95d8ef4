"""Valuation: scores of every row on every target, written part by part.

    runs/<run_id>/scores/part-00000.parquet      block (position), block_id, block_row, doc_id, tokens, chunks,
                                                 one `score_<target>` a target
    runs/<run_id>/scores/extremes-00000.parquet  target, query, side (top | bottom), rank (in this part), block,
                                                 block_row, score

The queries of a target combine by `aggregate`: `mean` or `max` of their scores, or `rrf`, reciprocal-rank
fusion: Σ_q 1 / (60 + rank_q(x)) (Cormack, Clarke and Büttcher, SIGIR 2009) over each query's 10,000 best
rows; a row outside them gets nothing from that query. Ranks need the whole corpus, so with `rrf` the
parts hold no scores; `fused_scores` merges the extremes afterwards.

A row too short to predict a token (`chunks` 0) has null scores.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import polars as pl

from rise_ops.corpus import read_block
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, Extremes, Float32Array, score_blocks
from rise_ops.store import Store
from rise_ops.targets import Target

Aggregate = Literal["mean", "max", "rrf"]
Part = tuple[str, str]
"""Keys of one part: its scores, its extremes."""

RRF_CONSTANT = 60
RRF_DEPTH = 10_000
EXTREMES = 50
"""Rows kept at either end of each query: enough for the evaluation protocol's largest K."""

_ROW_MASK = (1 << BLOCK_SHIFT) - 1


def part_key(run_id: str, part: int) -> str:
    """Key of a part's scores."""
    return f"runs/{run_id}/scores/part-{part:05d}.parquet"


def extremes_key(run_id: str, part: int) -> str:
    """Key of a part's highest and lowest rows of each query."""
    return f"runs/{run_id}/scores/extremes-{part:05d}.parquet"


def score_part(store: Store, identity: str, block_ids: Sequence[str], *, run_id: str, part: int, first_block: int,
               targets: Mapping[str, Target], aggregate: Aggregate, k: int = EXTREMES,
               progress: Progress = silent) -> int:  # fmt: skip
    """Score blocks against all targets in one pass and store the part. Returns the number of rows.

    Parameters
    ----------
    first_block
        Position of the first of `block_ids` in the corpus' order of blocks.
    k
        Rows kept at either end of each query.
    """
    stacked = np.concatenate([target.signature for target in targets.values()])
    extremes = Extremes(max(k, RRF_DEPTH) if aggregate == "rrf" else k, k_bottom=k)
    frames = []
    for block in score_blocks(store, identity, block_ids, stacked, first_block=first_block, extremes=extremes,
                              progress=progress):  # fmt: skip
        rows = block.record.rows
        frame = pl.DataFrame(
            {
                "block": np.full(rows, block.position, dtype=np.uint32),
                "block_id": pl.repeat(block.record.block_id, rows, eager=True),
                "block_row": np.arange(rows, dtype=np.uint32),
                "doc_id": read_block(store, block.record.block_id, columns=["doc_id"])["doc_id"],
                "tokens": block.tokens,
                "chunks": block.chunks,
            }
        )
        if aggregate != "rrf":
            frame = frame.with_columns(_aggregate(block.scores, targets, aggregate))
        frames.append(frame)
    _write(store, extremes_key(run_id, part), extremes_frame(extremes, targets))
    _write(store, part_key(run_id, part), pl.concat(frames))
    return sum(frame.height for frame in frames)


def extremes_frame(extremes: Extremes, targets: Mapping[str, Target]) -> pl.DataFrame:
    """The kept rows of all queries as a table: target, query, side, rank, block, block_row, score."""
    names = [name for name, target in targets.items() for _ in range(len(target.queries))]
    queries = [query for target in targets.values() for query in range(len(target.queries))]
    sides = []
    for side, scores, rows in (
        ("top", extremes.top, extremes.top_rows),
        ("bottom", extremes.bottom, extremes.bottom_rows),
    ):
        width = scores.shape[1]
        sides.append(
            pl.DataFrame(
                {
                    "target": pl.Series(names, dtype=pl.String).gather(np.repeat(np.arange(len(names)), width)),
                    "query": np.repeat(np.asarray(queries, dtype=np.uint32), width),
                    "side": pl.repeat(side, scores.size, eager=True),
                    "rank": np.tile(np.arange(1, width + 1, dtype=np.uint32), len(names)),
                    "block": (rows.ravel() >> BLOCK_SHIFT).astype(np.uint32),
                    "block_row": (rows.ravel() & _ROW_MASK).astype(np.uint32),
                    "score": scores.ravel(),
                }
            )
        )
    return pl.concat(sides)


def merge_extremes(parts: pl.LazyFrame, *, k: int) -> pl.DataFrame:
    """The k highest and lowest rows of each query over all parts, with `rank` 1, 2, … on each side."""
    order = pl.when(pl.col("side") == "top").then(-pl.col("score")).otherwise(pl.col("score")).alias("order")
    return (
        parts.filter(pl.col("rank") <= k)  # what is not among its part's best is not among the best
        .with_columns(order)
        .sort("target", "query", "side", "order", "block", "block_row")
        .with_columns(rank=pl.int_range(1, pl.len() + 1, dtype=pl.UInt32).over("target", "query", "side"))
        .filter(pl.col("rank") <= k)
        .drop("order")
        .collect(engine="streaming")
    )


def fused_scores(parts: Iterable[pl.LazyFrame], targets: Sequence[str]) -> pl.DataFrame:
    """Reciprocal-rank fusion of the extremes: block, block_row and one `score_<target>` a target.

    Parts are taken in one after the other, so that memory does not grow with their number.
    """
    tops = (part.filter(pl.col("side") == "top") for part in parts)
    ranked = merge_extremes(next(tops), k=RRF_DEPTH)
    for top in tops:
        ranked = merge_extremes(pl.concat([ranked.lazy(), top]), k=RRF_DEPTH)
    share = 1.0 / (RRF_CONSTANT + pl.col("rank"))
    # in the order of queries: sums of floats are then the same whatever the parts were
    return ranked.group_by("block", "block_row", maintain_order=True).agg(
        share.filter(pl.col("target") == name).sum().cast(pl.Float32).alias(f"score_{name}") for name in targets
    )


def _aggregate(scores: Float32Array, targets: Mapping[str, Target], aggregate: Aggregate) -> list[pl.Expr]:
    columns = []
    start = 0
    for name, target in targets.items():
        mine = scores[:, start : start + len(target.queries)]
        start += len(target.queries)
        combined = mine.mean(axis=1) if aggregate == "mean" else mine.max(axis=1)
        column = pl.lit(pl.Series(combined))
        columns.append(pl.when(pl.col("chunks") > 0).then(column).alias(f"score_{name}"))
    return columns


def _write(store: Store, key: str, frame: pl.DataFrame) -> None:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    store.create(key, buffer.getvalue())
