"""How far a score may be off because of the sketch: standard errors without labels, other seeds or another index.

The inner product of two CountSketches is the inner product of the vectors plus collision noise: products of different
coordinates that fell into the same bucket (Charikar, Chen and Farach-Colton, 2002). Shift the buckets of one of them
cyclically, and equal coordinates never meet, while different ones meet as often as before: what is left is noise of
the same distribution. Signatures are sums of outer products of two sketches, so the query's matrix of each channel is
shifted along its first factor (residuals), along its second one (hidden states), and along both. A row's products with
these, e₁, e₂ and e₁₂, measure the noise that the first factor brings, that of the second, and the noise that both of
them contain:

    error² = mean e₁² + mean e₂² − mean e₁₂²        over SHIFTS shifts of each kind

Two things are done to these products. Sketches are scaled to unit length, which takes out the noise that they have in
common with the score: so from each shifted query that multiple of the unshifted one is subtracted that leaves, over the
target's own queries, nothing proportional to the score. And few shifts say little of one row, so its error² is averaged
with that of its block, half and half.

What is shifted is a combination of the target's queries that is as noisy as the score: their mean for `mean`; for
`top-N` (and `max`, N = 1) a part of the mean and a part with random signs, so that noise that queries share counts
fully and their own noise by 1/N. `rrf` has no error.

Measured against the unsketched kernel (`rise_ops.exact`) by `tests/benchmarks/uncertainty.py`, on three tasks at four
widths and two temperatures, 24 settings: with `mean`, predicted over measured root mean square is 1.05 on average, 0.91
to 1.33, and 94 % of the rows lie within 1.96 errors (90 to 98 %). With `max` and `top-N` the errors are those of the
scores' spread (ratio 0.7 to 1.6); not in them is that a maximum prefers queries whose noise is high, which lifts the
scores of all rows, by up to two errors. Errors of different rows are not independent: all share the query's sketch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rise_ops.config import SketchConfig

SHIFTS = 4
"""Shifts of each kind."""
NOISE_QUERIES = 3 * SHIFTS
"""Shifted queries of a target."""

_SAMPLE = 64  # queries of a target that tell which noise is proportional to the score
_FLOOR = 0.1  # of a block's mean error²: the difference of few squares may be below zero

Float32Array = npt.NDArray[np.float32]


def noise_queries(queries: Float32Array, sketch: SketchConfig, aggregate: str) -> Float32Array:
    """Shifted queries of one target, [NOISE_QUERIES, dim]: by the first factor, by the second, by both.

    Parameters
    ----------
    queries
        Signatures of its queries, [queries, dim].
    sketch
        What lies where in a signature.
    aggregate
        How the queries combine.
    """
    draw = np.random.default_rng(0)
    some = queries[np.linspace(0, len(queries) - 1, min(len(queries), _SAMPLE)).astype(np.int64)]
    found = []
    for kind in ((True, False), (False, True), (True, True)):
        for number in range(SHIFTS):
            combined = _combined(queries, aggregate, draw)
            second = (3 * number + 1) % SHIFTS if all(kind) else number  # other pairs than (1, 1), (2, 2), …
            shifted = _shifted(combined, sketch, (number if kind[0] else None, second if kind[1] else None))
            scores = some @ combined
            share = (some @ shifted) @ scores / max(float(scores @ scores), 1e-30)
            found.append(shifted - share * combined)
    return np.stack(found)


def noise_squares(products: Float32Array) -> Float32Array:
    """Mean squares of each kind, from rows' products with `noise_queries`: [rows, NOISE_QUERIES] → [rows, 3]."""
    return np.asarray(np.square(products).reshape(len(products), 3, SHIFTS).mean(axis=2))


def standard_errors(squares: Float32Array, usable: npt.NDArray[np.bool_]) -> Float32Array:
    """Standard errors of the scores of a block's rows.

    Parameters
    ----------
    squares
        `noise_squares` of all its rows, [rows, 3].
    usable
        Rows that have a signature; the errors of others are without meaning.
    """
    means = squares[usable].mean(axis=0, dtype=np.float64) if usable.any() else np.zeros(3)
    block = max(means[0] + means[1] - means[2], means[0], means[1])
    rows = (squares[:, 0] + squares[:, 1] - squares[:, 2] + block) / 2
    return np.asarray(np.sqrt(np.maximum(rows, _FLOOR * block)), np.float32)


def _combined(queries: Float32Array, aggregate: str, draw: np.random.Generator) -> Float32Array:
    """Σ w q with the noise of the mean of N queries: own noise counts 1/N, shared noise fully but for that of 1/N."""
    count = len(queries)
    best = count if aggregate == "mean" else 1 if aggregate == "max" else int(aggregate.removeprefix("top-"))
    if best >= count:
        return np.asarray(queries.mean(axis=0))
    shared = (1 - 1 / best) / (1 - 1 / count)
    signs = draw.choice(np.array([-1.0, 1.0]), count)
    weights = np.sqrt(shared) / count + np.sqrt((1 / best - shared / count) / count) * signs
    return np.asarray(weights.astype(np.float32) @ queries)


def _shifted(query: Float32Array, sketch: SketchConfig, numbers: tuple[int | None, int | None]) -> Float32Array:
    """A query with the buckets of the factors of each channel shifted; a factor of one bucket cannot be."""
    shapes = {
        "rh": (sketch.dim_r, sketch.dim_h),
        "gh": (sketch.dim_g, sketch.dim_h),
        "rg": (sketch.dim_r, sketch.dim_g),
    }
    parts, start = [], 0
    for channel in sketch.channels:
        shape = shapes[channel]
        part = query[start : start + shape[0] * shape[1]].reshape(shape)
        start += part.size
        for axis, number in enumerate(numbers):
            if number is not None:  # spread over all shifts but 0
                part = np.roll(part, 1 + number * max(1, shape[axis] - 1) // SHIFTS, axis=axis)
        parts.append(part.ravel())
    return np.concatenate(parts)
