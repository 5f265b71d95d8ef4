"""How stable a selection is: would an independent sketch of the same widths keep the same rows?

Answered from the run's decisions alone, by simulation with the rows' own standard errors. With values S, errors s and
`k = 1 − mean s² / var S`, the share of the values' variance that is not noise (reliability), the value that another
sketch would give a row is drawn from

    S' | S ~ N(μ + k (S − μ), s² (1 + k)),

the predictive distribution of empirical Bayes (Efron and Morris, 1973; Robbins, 1956). As many rows as were kept are
taken from the best down, and compared. Only rows whose value decided on them take part: those that a pattern, a quota
or a duplicate took are left out, and where rows were drawn or spread (`sample`, `diversity`) the figure is that of a
selection by value of the same size. Errors count as independent, which they are only in part (`rise_ops.uncertainty`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.config import SketchConfig
from rise_ops.selection import decisions_key
from rise_ops.store import Store

SAMPLE_ROWS = 100_000
LEAST_OVERLAP = 0.9
"""Below it there is a warning: every tenth row that was kept is there by chance."""
_DRAWS = 8
_WIDER = (2, 4, 8, 16, 32)
_BY_VALUE = ("kept", "below_min_value", "below_percentile", "over_rows", "over_fraction", "over_tokens")


@dataclass(frozen=True, slots=True)
class Stability:
    """Figures of a selection; None where they do not apply."""

    rows_sampled: int
    """Rows whose value decided, of a sample of at most SAMPLE_ROWS."""
    value_error_median: float
    """Median standard error of a value."""
    value_spread: float
    """Standard deviation of the values."""
    reliability: float
    """Share of the values' variance that is not noise of the sketch, in [0, 1]."""
    overlap_expected: float | None
    """Expected part of the kept rows that an independent sketch would keep, too; None where all or none were kept."""
    cut: float | None
    """Lowest kept value."""
    warning: str | None


def measure_stability(store: Store, run_id: str, *, rows: int, sketch: SketchConfig) -> dict[str, Any] | None:
    """The stability of a run's selection; None where the values have no errors.

    Parameters
    ----------
    rows
        Of the corpus.
    """
    key = decisions_key(run_id)
    decisions = store.scan_parquet([key])
    if "value_error" not in decisions.collect_schema().names():
        return None
    share = min(1.0, SAMPLE_ROWS / max(1, rows))
    drawn = pl.col("doc_id").str.slice(16, 8).str.to_integer(base=16, dtype=pl.Int64) < int(share * 2**32)
    wanted = decisions.filter(pl.col("value").is_finite() & pl.col("reason").is_in(_BY_VALUE) & drawn)
    frame = store.collected(key, lambda: wanted.select("value", "value_error", "kept").collect(engine="streaming"))
    if frame.height < 2 or frame["value_error"].null_count():
        return None
    columns = (frame[name].to_numpy().astype(np.float64) for name in ("value", "value_error"))
    return asdict(stability_of(*columns, kept=frame["kept"].to_numpy(), sketch=sketch))


def stability_of(values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], *, kept: npt.NDArray[np.bool_],
                 sketch: SketchConfig) -> Stability:  # fmt: skip
    """Stability from rows' values, their standard errors and which of them are kept, each [rows]."""
    count = int(kept.sum())
    undecided = count in (0, len(kept))
    overlap = None if undecided else overlap_of(values, errors, count)
    warning = None
    if overlap is not None and overlap < LEAST_OVERLAP:
        warning = _warning(values, errors, count, overlap, sketch)
    return Stability(
        rows_sampled=len(values),
        value_error_median=float(np.median(errors)),
        value_spread=float(values.std()),
        reliability=reliability_of(values, errors),
        overlap_expected=overlap,
        cut=float(values[kept].min()) if count else None,
        warning=warning,
    )


def reliability_of(values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]) -> float:
    """k of the module's formula."""
    spread = float(values.var())
    return max(0.0, 1.0 - float(np.square(errors).mean()) / spread) if spread else 0.0


def overlap_of(values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], count: int) -> float:
    """Expected part of the `count` best rows that an independent sketch would also have among its `count` best."""
    k, mean = reliability_of(values, errors), values.mean()
    mine = np.argpartition(-values, count - 1)[:count]
    draw = np.random.default_rng(0)
    shares = []
    for _ in range(_DRAWS):
        other = mean + k * (values - mean) + np.sqrt(1 + k) * errors * draw.standard_normal(len(values))
        theirs = np.zeros(len(values), bool)
        theirs[np.argpartition(-other, count - 1)[:count]] = True
        shares.append(theirs[mine].mean())
    return float(np.mean(shares))


def _warning(values: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], count: int, overlap: float,
             sketch: SketchConfig) -> str:  # fmt: skip
    """What is uncertain and what would help: the variance of the noise goes with one over the width."""
    k, mean = reliability_of(values, errors), values.mean()
    text = (
        f"An independent sketch of the same widths would keep about {overlap:.0%} of these rows: at {sketch.dim:,} "
        "numbers a row the sketch is narrow for a pool whose values lie this close together"
    )
    for times in _WIDER:  # values with less noise spread less
        calmer = mean + np.sqrt(k + (1 - k) / times) * (values - mean)
        if overlap_of(calmer, errors / np.sqrt(times), count) >= LEAST_OVERLAP:
            root = 2 ** round(np.log2(times) / 2)
            return (
                f"{text}. About {times} times the width would do, such as sketch.dim_h {sketch.dim_h * times // root}, "
                f"dim_r {sketch.dim_r * root} and dim_g {sketch.dim_g * root}"
            )
    return f"{text}, and wider ones would not do either: use more queries a target, or another temperature"
