"""Selection: value, rank and fate of every row, with the reason.

Value is Σ_target weight · score. Rows are ranked by value (ties by doc_id, then by place), and kept while
the budgets last: the best rows first, until the next one would exceed the rows, the fraction or the
tokens; `min_value` cuts where values get too low. Every row gets a reason:

    kept · below_min_value · over_rows · over_fraction · over_tokens · no_prediction (fewer than 2 tokens)

    runs/<run_id>/decisions.parquet   doc_id, block_id, block_row, source_uri, source_row, tokens,
                                      score_<target>…, value, rank, kept, reason; in corpus order

Rows stream from the scores into a local file and a file of sort keys; `rise_ops.ranking` sorts these on disk,
and the fates are joined to the rows as both are read once more. Memory is set by `limits.memory`; disk takes
about the size of the decisions and 60 bytes a row. An object that stands in the corpus twice has its rows twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from rise_ops.config import KeepConfig
from rise_ops.corpus import CorpusVersion, placements
from rise_ops.counters import count
from rise_ops.errors import IntegrityError, SelectionError
from rise_ops.heap import steady_heap
from rise_ops.memory import SelectMemory, select_memory
from rise_ops.parts import Part
from rise_ops.ranking import Judge, Ranking, Totals
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tables import TableWriter, iter_file
from rise_ops.valuation import Aggregate, count_queries, iter_part_scores

REASONS = ("kept", "no_prediction", "below_min_value", "over_rows", "over_fraction", "over_tokens")
_GROUP_ROWS = 8_192

_logger = logging.getLogger(__name__)


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
        The scored parts, in order.
    memory
        Bytes that selection may take.

    Raises
    ------
    SelectionError
        Nothing is left to keep.
    LimitError
        `memory` is too small for one slice of rows.
    IntegrityError
        The parts do not cover the version's rows.
    """
    steady_heap()
    queries = count_queries(store, parts) if aggregate == "rrf" else 0
    plan = select_memory(memory, rows=version.rows, queries=queries, aggregate=aggregate)
    _logger.info("%s", plan.plan.text)
    with spool() as name:
        folder = Path(name)
        ranking = Ranking(folder, capacity=plan.sort_rows)
        rows = folder / "rows.parquet"
        _spool(_valued_rows(store, version, parts, weights, targets, aggregate, plan), rows, ranking)
        if ranking.rows != version.rows:
            raise IntegrityError(
                f"corpus {version.corpus} version {version.version} has {version.rows:,} rows, the scores cover "
                f"{ranking.rows:,}; the store is damaged, `curate verify` tells where"
            )
        totals = ranking.rank(fate_rules(keep, ranking.rows))
        selection = _summary(totals)
        if selection.kept == 0:
            raise SelectionError(_nothing_kept(totals, selection.rows, keep))
        whole = folder / "decisions.parquet"
        _join_fates(rows, ranking, whole)
        rows.unlink()
        store.create_from_file(decisions_key(run_id), whole)
    count("rows", selection.rows)
    return selection


def _valued_rows(store: Store, version: CorpusVersion, parts: Sequence[Part], weights: Mapping[str, float],
                 targets: Sequence[str], aggregate: Aggregate, plan: SelectMemory,
                 ) -> Iterator[pl.DataFrame]:  # fmt: skip
    """Scores joined with places and values, a slice at a time, in corpus order."""
    scores = [f"score_{name}" for name in targets]
    value = pl.sum_horizontal([pl.lit(weights[name]) * pl.col(f"score_{name}") for name in weights], ignore_nulls=False)
    for frame in iter_part_scores(store, parts, targets, aggregate, rows=plan.slice_rows):
        places = placements(store, version, frame["block_id"].unique(maintain_order=True).to_list())
        yield (
            frame.join(places, on=["block_id", "block_row"], how="left", maintain_order="left_right")
            .with_columns(value=value.cast(pl.Float32))
            .select("doc_id", "block_id", "block_row", "source_uri", "source_row", "tokens", *scores, "value")
        )


def _spool(frames: Iterator[pl.DataFrame], path: Path, ranking: Ranking) -> None:
    """Write the rows to a local file and their keys to the ranking."""
    tie = pl.col("doc_id").str.head(16).str.to_integer(base=16, dtype=pl.UInt64)
    with TableWriter(path, compression="lz4", group_rows=_GROUP_ROWS) as writer:
        for frame in frames:
            writer.write(frame.to_arrow())
            ranking.add(
                frame["value"].fill_null(0.0).to_numpy(),
                frame["value"].is_not_null().to_numpy(),
                frame.select(tie).to_series().to_numpy(),
                frame["tokens"].to_numpy(),
            )


def fate_rules(keep: KeepConfig, rows: int) -> Judge:
    """The rules as a function of rows in order of rank; the first that a row breaks is its reason."""
    # in decimal, as it was written: 0.29 of 100 rows are 29, and 28 in binary floating point
    budget = rows if keep.fraction is None else int(Fraction(str(keep.fraction)) * rows)
    # values are compared as they are stored, in 32 bits: a row of value 0.1 is not below 0.1
    lowest = None if keep.min_value is None else pl.Series([keep.min_value]).cast(pl.Float32).to_numpy()[0]

    def judge(values: npt.NDArray[np.float32], valued: npt.NDArray[np.bool_], ranks: npt.NDArray[np.int64],
              tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:  # fmt: skip
        checks = [("no_prediction", ~valued)]
        if lowest is not None:
            checks.append(("below_min_value", values < lowest))
        if keep.rows is not None:
            checks.append(("over_rows", ranks > keep.rows))
        if keep.fraction is not None:
            checks.append(("over_fraction", ranks > budget))
        if keep.tokens is not None:
            checks.append(("over_tokens", tokens > keep.tokens))
        codes = np.zeros(len(values), np.uint8)
        for reason, broken in reversed(checks):
            codes[broken] = REASONS.index(reason)
        return codes

    return judge


def _join_fates(rows: Path, ranking: Ranking, target: Path) -> None:
    """Add rank, kept and reason to the rows; both come in corpus order."""
    names = pa.array(REASONS, pa.large_string())
    with TableWriter(target, group_rows=_GROUP_ROWS) as writer:
        for frame in iter_file(rows, rows=_GROUP_ROWS):
            ranks, codes = ranking.take(frame.height)
            writer.write(
                frame.to_arrow()
                .append_column("rank", pa.array(ranks, pa.uint32(), mask=ranks == 0))
                .append_column("kept", pa.array(codes == REASONS.index("kept")))
                .append_column("reason", names.take(pa.array(codes)))
            )


def _summary(totals: Totals) -> Selection:
    counts = {reason: int(totals.rows[code]) for code, reason in enumerate(REASONS) if totals.rows[code]}
    kept = REASONS.index("kept")
    return Selection(
        rows=int(totals.rows.sum()),
        kept=int(totals.rows[kept]),
        tokens=int(totals.tokens.sum()),
        tokens_kept=int(totals.tokens[kept]),
        reasons=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )


def _nothing_kept(totals: Totals, rows: int, keep: KeepConfig) -> str:
    if totals.best is None:
        return f"none of the {rows:,} rows has 2 tokens, so none can be valued"
    value, tokens = totals.best
    return (
        f"selection.keep {keep.model_dump(exclude_none=True)} keeps none of {rows:,} rows: the best one has "
        f"value {value:.4g} and {tokens:,} tokens"
    )
