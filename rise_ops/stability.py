"""How stable a selection is: would an independent sketch of the same widths keep the same rows?

Answered from the run's decisions alone, by simulation with the rows' own standard errors. How the values would spread
without noise is estimated from the values S and their errors s: the nonparametric maximum likelihood of empirical Bayes
(Robbins, 1956; Kiefer and Wolfowitz, 1956) on a grid, by expectation maximisation (Laird, 1978). With the mean m and
the variance v that a row's value without noise has given S (Tweedie's formula; Efron, 2011), another sketch would give

    S' ~ N(m, v + s²).

As many rows as were kept are taken from the best down, and compared. Only rows whose value decided on them take part:
those that a pattern, a quota or a duplicate took are left out, and where rows were drawn or spread (`sample`,
`diversity`) the figure is that of a selection by value of the same size.

Noise moves rows in part alike, because all share the sketch of the queries, and that part changes no order: OWN_NOISE
is what is left of an error without it. By `tests/benchmarks/uncertainty.py` the expected overlap is 5 points below the
measured one on average (root mean square 9), so it mostly errs to the side of caution.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.config import SketchConfig
from rise_ops.runs import decisions_key
from rise_ops.store import Store

Float64Array = npt.NDArray[np.float64]

SAMPLE_ROWS = 100_000
LEAST_OVERLAP = 0.8
"""Below it there is a warning: every fifth row that was kept is there by chance. Rows next to the cut always change
places: with the default widths, 0.8 to 0.9 is what small pools reach."""
OWN_NOISE = 0.9
"""Part of a standard error that changes the order of rows: on average over the settings of the benchmark."""
_DRAWS = 8
_GRID = 200
_FIT_ROWS = 4_000
_FIT_STEPS = 100
_SLICE = 8_192
_WIDER = (2, 4)
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


def stability_of(values: Float64Array, errors: Float64Array, *, kept: npt.NDArray[np.bool_],
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


def reliability_of(values: Float64Array, errors: Float64Array) -> float:
    """1 − mean error² / variance of the values: the correlation of two sketches' values."""
    spread = float(values.var())
    return max(0.0, 1.0 - float(np.square(errors).mean()) / spread) if spread else 0.0


def overlap_of(values: Float64Array, errors: Float64Array, count: int) -> float:
    """Expected part of the `count` best rows that an independent sketch would also have among its `count` best."""
    noise = OWN_NOISE * errors
    mean, variance = _without_noise(values, noise)
    mine = _best(values, count)
    draw = np.random.default_rng(0)
    spread = np.sqrt(variance + noise**2)
    shares = [_best(mean + spread * draw.standard_normal(len(mean)), count)[mine].mean() for _ in range(_DRAWS)]
    return float(np.mean(shares))


def overlap_between(values: Float64Array, errors: Float64Array, count: int, *, calmer: float) -> float:
    """Expected overlap of two independent sketches whose errors are `calmer` times smaller than these."""
    noise = OWN_NOISE * errors
    mean, variance = _without_noise(values, noise)
    draw = np.random.default_rng(0)
    shares = []
    for _ in range(_DRAWS):
        true, *drawn = draw.standard_normal((3, len(mean)))
        true = mean + np.sqrt(variance) * true
        mine, theirs = (_best(true + noise / calmer * each, count) for each in drawn)
        shares.append(theirs[mine].mean())
    return float(np.mean(shares))


def _best(values: Float64Array, count: int) -> npt.NDArray[np.bool_]:
    best = np.zeros(len(values), bool)
    best[np.argpartition(-values, count - 1)[:count]] = True
    return best


def _without_noise(values: Float64Array, noise: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Mean and variance of each row's value without noise, given its value."""
    grid = np.linspace(values.min(), values.max(), _GRID)
    # a grid cannot resolve less than its step; Tweedie's formula goes from there to the noise itself
    known = np.maximum(noise, max(grid[1] - grid[0], 1e-30))
    step = -(-len(values) // _FIT_ROWS)
    likelihood = _likelihood(values[::step], known[::step], grid)
    prior = np.full(_GRID, 1 / _GRID)
    for _ in range(_FIT_STEPS):
        joint = likelihood * prior
        prior = (joint / joint.sum(axis=1, keepdims=True)).mean(axis=0)
    mean, variance = np.empty(len(values)), np.empty(len(values))
    for start in range(0, len(values), _SLICE):
        part = slice(start, start + _SLICE)
        joint = _likelihood(values[part], known[part], grid) * prior
        joint /= joint.sum(axis=1, keepdims=True)
        mean[part] = joint @ grid
        variance[part] = joint @ grid**2 - mean[part] ** 2
    part = noise**2 / known**2
    mean = values + part * (mean - values)
    variance = noise**2 * (1 + part * (variance / known**2 - 1))
    return mean, np.maximum(variance, 0.0)


def _likelihood(values: Float64Array, noise: Float64Array, grid: Float64Array) -> Float64Array:
    likelihood: Float64Array = np.exp(-0.5 * np.square((values[:, None] - grid) / noise[:, None])) + 1e-300
    return likelihood


def _warning(values: Float64Array, errors: Float64Array, count: int, overlap: float, sketch: SketchConfig) -> str:
    """What is uncertain and what would help: the variance of the noise goes at least with one over the widths."""
    text = (
        f"An independent sketch of the same widths would keep about {overlap:.0%} of these rows: at {sketch.dim:,} "
        "numbers a row the sketch is narrow for a pool whose values lie this close together"
    )
    for times in _WIDER:
        if overlap_between(values, errors, count, calmer=np.sqrt(times)) >= LEAST_OVERLAP:
            widths = {name: times * getattr(sketch, name) for name in ("dim_r", "dim_h", "dim_g")}
            wider = sketch.model_copy(update=widths)
            named = ", ".join(f"{name} {width}" for name, width in widths.items())
            return f"{text}. {times} times the widths would do (sketch.{named}: {wider.dim:,} numbers a row)"
    return (
        f"{text}, and {_WIDER[-1]} times the widths would not do either: use more queries a target, or another "
        "temperature, or count on the set as a whole, not on single rows near the cut"
    )
