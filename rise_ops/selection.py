"""Selection: value, rank and fate of every row, with the reason.

Value is Σ_target weight · score. Rows are ranked by value (ties by doc_id, then by place), and kept while
the budgets last: the best rows first, until the next one would exceed the rows, the fraction or the
tokens; `min_value` cuts where values get too low. Every row gets a reason:

    kept · below_min_value · over_rows · over_fraction · over_tokens · no_prediction (fewer than 2 tokens)

    runs/<run_id>/decisions.parquet   doc_id, block_id, block_row, source_uri, source_row, tokens,
                                      score_<target>…, value, rank, kept, reason; in corpus order

Only the value, the tokens, eight bytes of the doc_id and the fate of each row are in memory at once, SORT_BYTES
a row while they are sorted; everything else streams from part to part. An object that stands in the corpus
twice has its rows twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import polars as pl

from rise_ops.config import KeepConfig
from rise_ops.corpus import CorpusVersion, placements
from rise_ops.errors import IntegrityError, LimitError, SelectionError
from rise_ops.store import Store
from rise_ops.valuation import Aggregate, Part, fused_scores

SORT_BYTES = 200
"""Peak bytes a row while ranking: 150 to 200 measured on 1,000,000 and 3,000,000 rows."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What was decided, in numbers."""

    rows: int
    kept: int
    tokens: int
    tokens_kept: int
    reasons: dict[str, int]
    """Rows by reason."""


def decisions_key(run_id: str) -> str:
    """Key of a run's decisions."""
    return f"runs/{run_id}/decisions.parquet"


def decide(store: Store, version: CorpusVersion, *, run_id: str, parts: Sequence[Part],
           weights: Mapping[str, float], targets: Sequence[str], aggregate: Aggregate, keep: KeepConfig,
           memory: int) -> Selection:  # fmt: skip
    """Rank all rows, apply the budgets and store the decisions.

    Parameters
    ----------
    parts
        Keys of the scores and of the extremes of each part, in order.
    memory
        Bytes that ranking may take.

    Raises
    ------
    SelectionError
        Nothing is left to keep.
    LimitError
        Ranking so many rows does not fit in `memory`.
    IntegrityError
        The parts do not cover the version's rows.
    """
    if version.rows * SORT_BYTES > memory:
        raise LimitError(
            f"ranking {version.rows:,} rows takes about {version.rows * SORT_BYTES / 2**30:.1f} GiB, limits.memory is "
            f"{memory / 2**30:.1f} GiB; raise it"
        )
    with tempfile.TemporaryDirectory(prefix="curate-") as folder:
        files = _value_parts(store, version, parts, weights, targets, aggregate, Path(folder))
        ranked = _rank(pl.scan_parquet(files), keep)
        if ranked.height != version.rows:
            raise IntegrityError(
                f"corpus {version.corpus} version {version.version} has {version.rows:,} rows, the scores cover "
                f"{ranked.height:,}; the store is damaged, `curate verify` tells where"
            )
        selection = _summary(ranked)
        if selection.kept == 0:
            raise SelectionError(_nothing_kept(ranked, keep))
        whole = Path(folder) / "decisions.parquet"
        _join_ranks(files, ranked, whole)
        store.create_from_file(decisions_key(run_id), whole)
    return selection


def _value_parts(store: Store, version: CorpusVersion, parts: Sequence[Part], weights: Mapping[str, float],
                 targets: Sequence[str], aggregate: Aggregate, folder: Path) -> list[Path]:  # fmt: skip
    """Scores joined with places and values, one local file a part."""
    fused = None
    if aggregate == "rrf":
        fused = fused_scores((store.scan_parquet([extremes]) for _, extremes in parts), targets)
    scores = [f"score_{name}" for name in targets]
    value = pl.sum_horizontal([pl.lit(weights[name]) * pl.col(f"score_{name}") for name in weights], ignore_nulls=False)
    files = []
    for number, (key, _) in enumerate(parts):
        frame = store.scan_parquet([key]).collect()
        if fused is not None:
            frame = frame.join(fused, on=["block", "block_row"], how="left", maintain_order="left").with_columns(
                pl.when(pl.col("chunks") > 0).then(pl.col(name).fill_null(0.0)).alias(name) for name in scores
            )
        places = placements(store, version, frame["block_id"].unique(maintain_order=True).to_list())
        frame = (
            frame.join(places, on=["block_id", "block_row"], how="left", maintain_order="left_right")
            .with_columns(value=value.cast(pl.Float32))
            .select("doc_id", "block_id", "block_row", "source_uri", "source_row", "tokens", *scores, "value")
        )
        files.append(folder / f"part-{number:05d}.parquet")
        frame.write_parquet(files[-1])
    return files


def _rank(rows: pl.LazyFrame, keep: KeepConfig) -> pl.DataFrame:
    """value, tokens, rank, kept, reason of every row, in the rows' own order."""
    narrow = rows.select(
        pl.col("doc_id").str.head(16).str.to_integer(base=16, dtype=pl.UInt64).alias("tie"), "value", "tokens"
    ).collect(engine="streaming")
    order = {"value": True, "tie": False, "row": False}
    narrow = narrow.with_row_index("row").sort(list(order), descending=list(order.values()), nulls_last=True)
    # in decimal, as it was written: 0.29 of 100 rows are 29, and 28 in binary floating point
    budget = narrow.height if keep.fraction is None else int(Fraction(str(keep.fraction)) * narrow.height)
    rank = pl.int_range(1, pl.len() + 1, dtype=pl.UInt32)
    checks = [("no_prediction", pl.col("value").is_null())]
    if keep.min_value is not None:
        checks.append(("below_min_value", pl.col("value") < keep.min_value))
    if keep.rows is not None:
        checks.append(("over_rows", pl.col("rank") > keep.rows))
    if keep.fraction is not None:
        checks.append(("over_fraction", pl.col("rank") > budget))
    if keep.tokens is not None:
        checks.append(("over_tokens", pl.col("tokens").cast(pl.Int64).cum_sum() > keep.tokens))
    reason = pl.coalesce([pl.when(check).then(pl.lit(name)) for name, check in checks] + [pl.lit("kept")])
    return (
        narrow.with_columns(rank=pl.when(pl.col("value").is_not_null()).then(rank))
        .with_columns(reason=reason)
        .with_columns(kept=pl.col("reason") == "kept")
        .sort("row")
        .select("value", "tokens", "rank", "kept", "reason")
    )


def _join_ranks(files: Sequence[Path], ranked: pl.DataFrame, target: Path) -> None:
    import pyarrow.parquet as pq

    start = 0
    writer = None
    for file in files:
        frame = pl.read_parquet(file)
        table = frame.hstack(ranked[start : start + frame.height].select("rank", "kept", "reason")).to_arrow()
        start += frame.height
        if writer is None:
            writer = pq.ParquetWriter(target, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _summary(ranked: pl.DataFrame) -> Selection:
    tokens = ranked["tokens"].cast(pl.Int64)
    counts = ranked.group_by("reason").len().sort("len", "reason", descending=[True, False])
    return Selection(
        rows=ranked.height,
        kept=int(ranked["kept"].sum()),
        tokens=int(tokens.sum()),
        tokens_kept=int(tokens.filter(ranked["kept"]).sum()),
        reasons=dict(counts.iter_rows()),
    )


def _nothing_kept(ranked: pl.DataFrame, keep: KeepConfig) -> str:
    best = ranked.filter(pl.col("rank") == 1)
    if best.is_empty():
        return f"none of the {ranked.height:,} rows has 2 tokens, so none can be valued"
    return (
        f"selection.keep {keep.model_dump(exclude_none=True)} keeps none of {ranked.height:,} rows: the best one has "
        f"value {best['value'][0]:.4g} and {best['tokens'][0]:,} tokens"
    )
