"""Valuation: scores of every row on every target, written part by part.

    <part_id>.parquet            block (position in the part), block_id, block_row, doc_id, tokens, chunks, one
                                 `score_<target>` and `error_<target>` a target; one row group a block
    <part_id>.extremes.parquet   target, query, side (top | bottom), rank (in this part), block, block_row, score;
                                 some queries a row group

Where they are and what a part is says `rise_ops.parts`. Readers add the position of the part's first block.

The queries of a target combine by `aggregate`: `mean` or `max` of their scores, `top-N`, the mean of the N highest, or
`rrf`, reciprocal-rank fusion: Σ_q 1 / (60 + rank_q(x)) (Cormack, Clarke and Büttcher, SIGIR 2009) over each query's
10,000 best rows; a row outside them gets nothing from that query. Ranks need the whole corpus, so with `rrf` the parts
hold no scores; `iter_part_scores` merges the extremes first. Errors are those of `rise_ops.uncertainty`; with `rrf`
there are none.

A row too short to predict a token (`chunks` 0) has null scores.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.blocks import read_doc_ids
from rise_ops.checksums import stored_crc32c
from rise_ops.config import SketchConfig
from rise_ops.counters import count
from rise_ops.errors import DamagedError, MissingObjectError
from rise_ops.memory import EXTREMES, RRF_DEPTH, value_memory
from rise_ops.parts import SCORES_FORMAT, Part
from rise_ops.progress import Progress, silent
from rise_ops.scan import BLOCK_SHIFT, Extremes, Float32Array, ScoredRows, score_blocks, smallest
from rise_ops.shapes import PartShape
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tables import TableWriter, iter_table
from rise_ops.targets import Target
from rise_ops.threads import ContextPool
from rise_ops.uncertainty import NOISE_QUERIES, noise_queries, noise_squares, standard_errors

Aggregate = str
"""mean, max, rrf, or top-N."""

RRF_CONSTANT = 60

_ROW_MASK = (1 << BLOCK_SHIFT) - 1
_GROUP_ROWS = 2**17
_CONNECTIONS = 16
_NOISE = "noise of "
_EXTREME_COLUMNS = ("target", "query", "side", "rank", "block", "block_row", "score")

_logger = logging.getLogger(__name__)


def score_parts(store: Store, identity: str, parts: Sequence[Part], *, targets: Mapping[str, Target],
                aggregate: Aggregate, sketch: SketchConfig, memory: int, tasks: int = 1, k: int = EXTREMES,
                progress: Progress = silent) -> int:  # fmt: skip
    """Score the blocks of parts against all targets and store each part. Returns the number of rows.

    Parameters
    ----------
    identity
        The index.
    sketch
        Its sketch: what lies where in a signature.
    memory
        Bytes that scoring may take.
    tasks
        How many such calls run at the same time; for messages.
    k
        Rows kept at either end of each query.
    progress
        Counts rows.

    Raises
    ------
    LimitError
        So many queries do not fit in `memory`.
    IntegrityError
        A block or its signatures are missing or damaged.
    """
    signatures = [target.signature for target in targets.values()]
    queries, dim = sum(map(len, signatures)), signatures[0].shape[1]
    if aggregate != "rrf":
        signatures += [noise_queries(each, sketch, aggregate) for each in signatures]
    columns = sum(map(len, signatures))
    plan = value_memory(memory, queries=columns, dim=dim, aggregate=aggregate, extremes=k, tasks=tasks)
    _logger.info("%s", plan.plan.text)
    stacked = signatures[0] if len(signatures) == 1 else np.concatenate(signatures)
    rows = 0
    for part in parts:
        extremes = Extremes(max(k, RRF_DEPTH) if aggregate == "rrf" else k, k_bottom=k)
        blocks = score_blocks(store, identity, part.blocks, stacked, extremes=extremes, ranked=queries,
                              memory=plan.scan,
                              progress=lambda done, _, before=rows: progress(before + done, None))  # type: ignore[misc]  # fmt: skip
        rows += _write_part(store, part, blocks, extremes, targets, aggregate)
    return rows


def _write_part(store: Store, part: Part, scored: Iterator[ScoredRows], extremes: Extremes,
                targets: Mapping[str, Target], aggregate: Aggregate) -> int:  # fmt: skip
    """Store a part as its rows are scored; of two writers of the same part, one wins a file, and both are right."""
    rows = 0
    with spool() as folder:
        path, other = folder / "scores.parquet", folder / "extremes.parquet"
        with TableWriter(path, format_version=SCORES_FORMAT) as table:
            columns: list[dict[str, Any]] = []
            for piece in scored:
                own = {} if aggregate == "rrf" else _aggregate(piece.scores, targets, aggregate)
                columns.append({"tokens": piece.tokens, "chunks": piece.chunks, **own})
                rows += len(piece.scores)
                if piece.start + len(piece.scores) == piece.record.rows:
                    table.write(_block_frame(store, piece.position, piece.record.block_id, columns).to_arrow())
                    columns = []
        with TableWriter(other, format_version=SCORES_FORMAT) as table:
            for frame in extremes_frames(extremes, targets):
                table.write(frame.to_arrow())
        store.create_from_file(part.extremes, other)
        store.create_from_file(part.scores, path)
    sums = {"scores": stored_crc32c(store, part.scores), "extremes": stored_crc32c(store, part.extremes)}
    store.create_json(part.record, {"format_version": SCORES_FORMAT, "rows": rows, "crc32c": sums})
    count("rows", rows)
    return rows


def _block_frame(store: Store, position: int, block_id: str, pieces: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """The scores of one block as a table."""
    columns = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    rows = len(columns["tokens"])
    for name in [name for name in columns if name.startswith(_NOISE)]:
        columns[f"error_{name.removeprefix(_NOISE)}"] = standard_errors(columns.pop(name), columns["chunks"] > 0)
    frame = pl.DataFrame(
        {
            "block": np.full(rows, position, dtype=np.uint32),
            "block_id": pl.repeat(block_id, rows, eager=True),
            "block_row": np.arange(rows, dtype=np.uint32),
            "doc_id": read_doc_ids(store, block_id),
            **columns,
        }
    )
    scores = [name for name in columns if name.startswith(("score_", "error_"))]
    return frame.with_columns(pl.when(pl.col("chunks") > 0).then(pl.col(name)).alias(name) for name in scores)


def _aggregate(scores: Float32Array, targets: Mapping[str, Target], aggregate: Aggregate) -> dict[str, Float32Array]:
    """Scores and noise of each target, from the scores of all queries and, after them, of the shifted ones."""
    columns = {}
    start, noise = 0, sum(len(target.queries) for target in targets.values())
    for name, target in targets.items():
        mine = scores[:, start : start + len(target.queries)]
        columns[f"score_{name}"] = _combined(mine, aggregate)
        columns[f"{_NOISE}{name}"] = noise_squares(scores[:, noise : noise + NOISE_QUERIES])
        start, noise = start + len(target.queries), noise + NOISE_QUERIES
    return columns


def _combined(scores: Float32Array, aggregate: Aggregate) -> Float32Array:
    """One score a row, [rows, queries] → [rows]."""
    if aggregate == "mean":
        return np.asarray(scores.mean(axis=1))
    if aggregate == "max":
        return np.asarray(scores.max(axis=1))
    best = min(scores.shape[1], int(aggregate.removeprefix("top-")))
    return np.asarray(-np.partition(-scores, best - 1, axis=1)[:, :best].mean(axis=1))


def extremes_frames(extremes: Extremes, targets: Mapping[str, Target]) -> Iterator[pl.DataFrame]:
    """The kept rows, some queries at a time: target, query, side, rank, block, block_row, score."""
    names = [name for name, target in targets.items() for _ in range(len(target.queries))]
    queries = [query for target in targets.values() for query in range(len(target.queries))]
    low = extremes.k if extremes.k_bottom is None else extremes.k_bottom
    step = max(1, _GROUP_ROWS // (extremes.k + low))
    for start in range(0, len(names), step):
        part = slice(start, start + step)
        yield pl.concat(
            _side_frame(side, names[part], queries[part], scores[part], rows[part])
            for side, scores, rows in (
                ("top", extremes.top, extremes.top_rows),
                ("bottom", extremes.bottom, extremes.bottom_rows),
            )
        )


def _side_frame(side: str, names: Sequence[str], queries: Sequence[int], scores: Float32Array,
                rows: npt.NDArray[np.int64]) -> pl.DataFrame:  # fmt: skip
    width = scores.shape[1]
    return pl.DataFrame(
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
        .collect()
    )


def read_extremes(store: Store, parts: Iterable[Part], *, k: int, where: pl.Expr | None = None) -> pl.DataFrame:
    """`merge_extremes` of stored parts, of the rows that `where` names; `block` is the position in the corpus.

    Parts are merged as they are read, so that memory does not grow with their number.
    """
    merged: list[pl.DataFrame] = []
    held = limit = 0
    wanted = pl.col("rank") <= k if where is None else (pl.col("rank") <= k) & where
    for part in parts:
        for frame in _iter_extremes(store, part, where=wanted):
            merged.append(frame)
            held += frame.height
            if held > limit + _GROUP_ROWS:
                merged = [merge_extremes(pl.concat(merged).lazy(), k=k)]
                held = limit = merged[0].height
    return merge_extremes(pl.concat(merged).lazy(), k=k)


def _iter_extremes(store: Store, part: Part, *, where: pl.Expr) -> Iterator[pl.DataFrame]:
    """A part's extremes, a row group at a time."""
    place = pl.col("block") + pl.lit(part.first_block, pl.UInt32)
    for frame in iter_table(store, part.extremes, columns=_EXTREME_COLUMNS, rows=_GROUP_ROWS, known=SCORES_FORMAT):
        yield frame.filter(where).with_columns(block=place)


def count_queries(store: Store, parts: Sequence[Part]) -> int:
    """Queries of all targets; 0 where no row was scored."""
    for part in parts:
        first = list(_iter_extremes(store, part, where=(pl.col("rank") == 1) & (pl.col("side") == "top")))
        if count := sum(frame.height for frame in first):
            return count
    return 0


def iter_part_scores(store: Store, parts: Sequence[Part], targets: Sequence[str], aggregate: Aggregate, *,
                     rows: int) -> Iterator[pl.DataFrame]:  # fmt: skip
    """All rows with their scores, in the order of the parts, at most about `rows` at a time.

    Columns: block (position in the corpus), block_id, block_row, doc_id, tokens, chunks, the scores and, except with
    rrf, their errors.
    """
    scores = [f"score_{name}" for name in targets]
    columns = ["block", "block_id", "block_row", "doc_id", "tokens", "chunks"]
    fusion = _Fusion(store, parts, targets) if aggregate == "rrf" else None
    wanted = columns if fusion else [*columns, *scores, *(f"error_{name}" for name in targets)]
    for frame in _gathered(_iter_placed(store, parts, wanted, rows), rows):
        yield frame if fusion is None else fusion.join(frame, scores)


def _iter_placed(store: Store, parts: Iterable[Part], columns: Sequence[str], rows: int) -> Iterator[pl.DataFrame]:
    """The row groups of all parts, a block each, with the blocks' positions in the corpus."""
    for part in parts:
        check_part(store, part)
        first = pl.lit(part.first_block, pl.UInt32)
        for frame in iter_table(store, part.scores, columns=columns, rows=rows, known=SCORES_FORMAT):
            yield frame.with_columns(pl.col("block") + first)


def check_parts(store: Store, parts: Sequence[Part]) -> None:
    """`check_part` of each."""
    with ContextPool(_CONNECTIONS) as pool:
        list(pool.map(lambda part: check_part(store, part), parts))


def check_part(store: Store, part: Part) -> None:
    """Hold the scores of a part against the checksum in its record.

    Raises
    ------
    DamagedError
        They are not what was written, or the part is not there.
    """
    try:
        record = store.get_json(part.record, format_version=SCORES_FORMAT, shape=PartShape)
        right = stored_crc32c(store, part.scores) == record["crc32c"]["scores"]
    except (MissingObjectError, KeyError):
        right = False
    if not right:
        where = store.url(part.scores)
        raise DamagedError(f"{where} is missing or does not match its checksum; run again", where)


def _gathered(frames: Iterator[pl.DataFrame], rows: int) -> Iterator[pl.DataFrame]:
    """Consecutive frames together, while they have at most `rows` rows."""
    held: list[pl.DataFrame] = []
    for frame in frames:
        if held and sum(each.height for each in held) + frame.height > rows:
            yield pl.concat(held)
            held = []
        held.append(frame)
    if held:
        yield pl.concat(held)


class _Fusion:
    """Reciprocal-rank fusion: which rows each query names among its best, by place.

    Parameters
    ----------
    store, parts
        The scored parts, in order. They are merged one after the other.
    targets
        Names of the targets.
    """

    def __init__(self, store: Store, parts: Sequence[Part], targets: Sequence[str]) -> None:
        self._targets = targets
        kept: dict[tuple[str, int], tuple[Float32Array, npt.NDArray[np.int64]]] = {}
        for part in parts:
            for frame in _iter_extremes(store, part, where=pl.col("side") == "top"):
                if frame.height:
                    self._merge(kept, frame)
        # in the order of queries: sums of floats are then the same whatever the parts were
        queries = sorted(kept)
        self._names = [name for name, _ in queries]
        ordinals = np.concatenate([kept.pop(query)[1] for query in queries]) if queries else np.empty(0, np.int64)
        self._width = max(1, len(ordinals) // max(1, len(queries)))
        self._order = np.argsort(ordinals, kind="stable")
        self._ordinals = ordinals[self._order]

    @staticmethod
    def _merge(kept: dict[tuple[str, int], tuple[Float32Array, npt.NDArray[np.int64]]], frame: pl.DataFrame) -> None:
        for (target, query), mine in frame.group_by("target", "query", maintain_order=True):
            nothing = np.empty(0, np.float32), np.empty(0, np.int64)
            scores, rows = kept.get((str(target), int(query)), nothing)
            ordinals = (mine["block"].cast(pl.Int64).to_numpy() << BLOCK_SHIFT) + mine["block_row"].to_numpy()
            best, best_rows = smallest(
                RRF_DEPTH, scores[None], rows[None], mine["score"].to_numpy()[None], ordinals[None], sign=-1
            )
            kept[str(target), int(query)] = best[0], best_rows[0]

    def join(self, frame: pl.DataFrame, scores: Sequence[str]) -> pl.DataFrame:
        """Add the fused scores of all targets."""
        first, last = int(frame["block"][0]) << BLOCK_SHIFT, (int(frame["block"][-1]) + 1) << BLOCK_SHIFT
        start, stop = np.searchsorted(self._ordinals, [first, last])
        ordinals, order = self._ordinals[start:stop], self._order[start:stop]
        named = pl.DataFrame(
            {
                "block": (ordinals >> BLOCK_SHIFT).astype(np.uint32),
                "block_row": (ordinals & _ROW_MASK).astype(np.uint32),
                "query": (order // self._width).astype(np.uint32),
                "rank": (order % self._width + 1).astype(np.uint32),
            }
        )
        mine = {name: [place for place, each in enumerate(self._names) if each == name] for name in self._targets}
        share = 1.0 / (RRF_CONSTANT + pl.col("rank"))
        fused = named.group_by("block", "block_row", maintain_order=True).agg(
            share.filter(pl.col("query").is_in(mine[name])).sum().cast(pl.Float32).alias(f"score_{name}")
            for name in self._targets
        )
        return frame.join(fused, on=["block", "block_row"], how="left", maintain_order="left").with_columns(
            pl.when(pl.col("chunks") > 0).then(pl.col(name).fill_null(0.0)).alias(name) for name in scores
        )
