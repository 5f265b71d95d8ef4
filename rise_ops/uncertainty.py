"""How far a score may be off because of the sketch: standard errors without labels, other seeds or another index.

The inner product of two CountSketches is the inner product of the vectors plus collision noise: products of different
coordinates that fell into the same bucket (Charikar, Chen and Farach-Colton, 2002). Shift the buckets of one of them
cyclically, and equal coordinates never meet, while different ones meet as often as before: what is left is noise of
the same distribution. Signatures are sums of outer products of two sketches, so the query's matrix of each channel is
shifted along its first factor (residuals) or its second one (hidden states), SHIFTS times each, and a row's products
with these are samples of the noise that either factor brings. Its standard error is the larger of both root mean
squares.

The queries that are shifted are those whose mean makes the score: the target's mean query for `mean`, the mean of N of
its queries, drawn anew for each shift, for `top-N`, and single queries for `max`. That a maximum prefers scores whose
noise is high is not counted. `rrf` has no error.

Measured against the unsketched kernel (`rise_ops.exact`) by `tests/benchmarks/uncertainty.py`. Errors of different rows
are not independent: all share the query's sketch.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import numpy.typing as npt

from rise_ops.config import SketchConfig

SHIFTS = 8
"""Shifts of each factor."""

Float32Array = npt.NDArray[np.float32]


def noise_queries(queries: Float32Array, sketch: SketchConfig, aggregate: str) -> Float32Array:
    """Shifted queries of one target, [2 · SHIFTS, dim]: first those of the first factor.

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
    shifts = product((0, 1), range(SHIFTS))
    return np.stack([_shifted(_combined(queries, aggregate, draw), sketch, *shift) for shift in shifts])


def standard_errors(products: Float32Array) -> Float32Array:
    """Standard errors of rows' scores from their products with `noise_queries`, [rows, 2 · SHIFTS] → [rows]."""
    squares = np.square(products).reshape(len(products), 2, SHIFTS).mean(axis=2)
    return np.asarray(np.sqrt(squares.max(axis=1)), np.float32)


def _combined(queries: Float32Array, aggregate: str, draw: np.random.Generator) -> Float32Array:
    if aggregate == "mean":
        return np.asarray(queries.mean(axis=0))
    few = 1 if aggregate == "max" else min(len(queries), int(aggregate.removeprefix("top-")))
    return np.asarray(queries[draw.permutation(len(queries))[:few]].mean(axis=0))


def _shifted(query: Float32Array, sketch: SketchConfig, axis: int, number: int) -> Float32Array:
    """A query with the buckets of one factor of each channel shifted; a factor of one bucket cannot be."""
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
        width = shape[axis]
        step = 1 + number * max(1, width - 1) // SHIFTS  # spread over all shifts but 0
        parts.append(np.roll(part, step, axis=axis).ravel())
    return np.concatenate(parts)
