"""Support, residual and the sketches of the residual in one compiled pass over a position's logits, on the CPU.

What `rise_ops.support` and the sketches of `rise_ops.head` compute with dozens of tensor operations, for one position
after the other. The logits are looked at once, and from then on only where they are large:

1. Columns are strided into groups of 8 to 32; their maxima are an elementwise maximum. A floor that k maxima reach is
   found by bisection: to count what reaches a number takes a few vector instructions. Every one of the k largest
   entries lies in a group that reaches the floor, and reaches it itself: the others are not looked at again.
2. These candidates are sorted by distribution into buckets of equal width.
3. First with k = 32. What is below the floor has at most `(top_k - candidates)` times the floor's weight; where that
   cannot move the end of the kept prefix, the rest of the support does not matter. Else again with k = `top_k`.
4. Weights of kept entries go to their buckets of `r̂` and, times their row of the projected head, to `ĝ`.

The kept set is exact. Of entries that are equal at the end of the support the next token is taken first. Sums are
float32, in no order. A row of logits that are not all numbers gives NaN.

Compiled by Numba when first called, which takes some seconds, and kept in its cache where there is a place for it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.compiled import compiled
from rise_ops.config import SketchConfig

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

_FIRST = 32
_LONGEST_PAUSE = 63
"""Positions for which the first look is left out, at most, where it has not been enough."""
_BUCKETS = 256
_NARROWEST = 1e-6
_BUCKET_ROWS = 48
"""Entries of a bucket beyond which they are sorted otherwise: insertion is quadratic."""


Array = Any
Scalar = Any
"""A float32 or an integer; Numba infers which."""


def group_size(vocab_size: int, top_k: int) -> int:
    """Columns of a group. The larger, the fewer maxima there are to look through, and the more columns of each group
    that is chosen; by measurement (V 6,144 and 50,304, top_k 256)."""
    for size, groups in ((32, 6), (16, 6), (8, 2)):
        if vocab_size >= size * groups * top_k:
            return size
    return 1


def sketch_residuals(
    scaled: Float32Array, targets: Int64Array, places: Int64Array, *, codes: npt.NDArray[np.int32],
    projected: Float32Array, out_r: Float32Array, out_g: Float32Array, config: SketchConfig,
) -> None:  # fmt: skip
    """Unit-length sketches of the residuals of some positions. Other threads run meanwhile.

    Parameters
    ----------
    scaled
        float32 [N, V] logits divided by the temperature.
    targets, places
        int64 [N] next tokens, and the rows of the outputs that are written.
    codes
        int32 [V] of the residuals' sketch (`rise_ops.sketch.column_codes`).
    projected
        float32 [V, dim_g] the unembedding's sketch.
    out_r, out_g
        float32 [P, dim_r] and [P, dim_g]; a width of 0 where the factor is not wanted.
    config
        Its `top_k`, `mass`, `min_support`, `adaptive_support` and `eps` are used.
    """
    vocab = scaled.shape[1]
    top_k = min(config.top_k, vocab)
    _sketch_positions(
        scaled, targets, places, codes, projected, out_r, out_g, group_size(vocab, top_k), top_k, config.mass,
        config.min_support, config.adaptive_support, config.eps,
    )  # fmt: skip


@compiled
def _sketch_positions(
    scaled: Array, targets: Array, places: Array, codes: Array, projected: Array, out_r: Array, out_g: Array,
    size: Scalar, top_k: Scalar, mass: Scalar, min_support: Scalar, adaptive: Scalar,
    eps: Scalar,
) -> None:  # fmt: skip
    """`sketch_residuals`; `size`: columns of a group."""
    vocab = scaled.shape[1]
    groups = -(-vocab // size)
    maxima = np.empty(groups, np.float32)
    found = (np.empty(vocab, np.float32), np.empty(vocab, np.int32))
    ordered = (np.empty(vocab, np.float32), np.empty(vocab, np.int32))
    starts = np.empty(_BUCKETS + 1, np.int32)
    weights = np.empty(top_k, np.float32)
    histogram = np.empty(2 * out_r.shape[1], np.float32)
    few = adaptive and min_support <= _FIRST and top_k >= 2 * _FIRST
    skip = pause = 0
    shallow, deep = np.float32(4), np.float32(8)
    for row in range(scaled.shape[0]):
        logits, target, place = scaled[row], targets[row], places[row]
        top = np.float32(np.nan)
        if _maxima(logits, groups, maxima):
            top = maxima.max()
        if not math.isfinite(top):
            out_r[place], out_g[place] = np.nan, np.nan
            continue
        own = np.float32(math.exp(logits[target] - top))
        kept = 0
        if few and skip == 0:
            floor = _floor(maxima, top, _FIRST, shallow)
            shallow = min(max(top - floor, np.float32(1e-3)), np.float32(1e3))
            count = _candidates(logits, groups, maxima, floor, found, ordered)
            if count <= top_k:
                _sort(found, count, top, floor, ordered, starts)
                kept = _kept_of_few(ordered, count, top, floor, target, own, weights, top_k, mass)
                kept = min(max(kept, min_support), count) if kept else 0
            pause = 0 if kept else min(2 * pause + 1, _LONGEST_PAUSE)
            skip = pause
        elif skip:
            skip -= 1
        if not kept:
            floor = _floor(maxima, top, top_k, deep)
            deep = min(max(top - floor, np.float32(1e-3)), np.float32(1e3))
            count = _candidates(logits, groups, maxima, floor, found, ordered)
            _sort(found, count, top, floor, ordered, starts)
            kept = _kept_of_all(ordered, top, target, logits[target], weights, top_k, mass, adaptive)
            kept = min(max(kept, min_support), top_k)
        _write(ordered[1], weights, kept, target, own, codes, projected, histogram, out_r[place], out_g[place], eps)


@compiled
def _maxima(logits: Array, groups: Scalar, maxima: Array) -> Scalar:
    """Largest entry of every group; whether all entries are numbers."""
    bad = np.int32(0)
    for group in range(groups):
        maxima[group] = logits[group]
        bad += np.int32(logits[group] != logits[group])
    start = groups
    while start < logits.shape[0]:
        part = logits[start : start + groups]
        for group in range(part.shape[0]):
            value, before = part[group], maxima[group]
            maxima[group] = value if value > before else before
            bad += np.int32(value != value)
        start += groups
    return bad == 0


@compiled
def _reach(maxima: Array, floor: Scalar) -> Scalar:
    """How many reach the floor."""
    reached = np.int32(0)
    for group in range(maxima.shape[0]):
        reached += np.int32(1) if maxima[group] >= floor else np.int32(0)
    return reached


@compiled
def _floor(maxima: Array, top: Scalar, k: Scalar, depth: Scalar) -> Scalar:
    """A number that at least k maxima reach, and few more, unless many are equal.

    `depth`: about how far it is below the top; only time depends on it.
    """
    high, low = np.float32(top), np.float32(top) - np.float32(depth)
    reached = _reach(maxima, low)
    while reached < k:  # at the latest -inf is low enough
        depth *= np.float32(1.25)
        high, low = low, np.float32(top) - np.float32(depth)
        reached = _reach(maxima, low)
    while reached > k + k // 8:
        middle = np.float32(low + (high - low) * np.float32(0.5))
        if not low < middle < high:
            break
        found = _reach(maxima, middle)
        if found >= k:
            low, reached = middle, found
        else:
            high = middle
    return low


@compiled
def _candidates(logits: Array, groups: Scalar, maxima: Array, floor: Scalar, found: Array, scratch: Array) -> Scalar:
    """Entries that reach the floor, and their columns; their number.

    All are written and those that count are kept: no branch that nobody can foresee.
    """
    values, columns = found
    chosen = scratch[1]
    many = 0
    for group in range(groups):
        chosen[many] = group
        many += 1 if maxima[group] >= floor else 0
    count = 0
    for slot in range(many):
        column = chosen[slot]
        while column < logits.shape[0]:
            values[count], columns[count] = logits[column], column
            count += 1 if logits[column] >= floor else 0
            column += groups
    return count


@compiled
def _sort(found: Array, count: Scalar, top: Scalar, floor: Scalar, ordered: Array, starts: Array) -> None:
    """Candidates, the largest first; equal ones in their order."""
    values, columns = found
    into, into_columns = ordered
    span = np.float32(top) - np.float32(floor)
    in_buckets = np.float32(_NARROWEST) < span < np.float32(np.inf)
    scale = np.float32(_BUCKETS - 1) / span
    starts[:] = 0
    if in_buckets:
        for slot in range(count):
            starts[np.int32((top - values[slot]) * scale) + 1] += 1
    if not in_buckets or starts.max() > _BUCKET_ROWS:
        order = np.argsort(-values[:count], kind="mergesort")
        for slot in range(count):
            into[slot], into_columns[slot] = values[order[slot]], columns[order[slot]]
        return
    for bucket in range(_BUCKETS):
        starts[bucket + 1] += starts[bucket]
    for slot in range(count):
        here = np.int32((top - values[slot]) * scale)
        into[starts[here]], into_columns[starts[here]] = values[slot], columns[slot]
        starts[here] += 1
    for slot in range(1, count):  # what is left to do is inside the buckets
        value, column, place = into[slot], into_columns[slot], slot
        while place > 0 and into[place - 1] < value:
            into[place], into_columns[place] = into[place - 1], into_columns[place - 1]
            place -= 1
        into[place], into_columns[place] = value, column


@compiled
def _kept_of_few(
    ordered: Array,
    count: Scalar,
    top: Scalar,
    floor: Scalar,
    target: Scalar,
    own: Scalar,
    weights: Array,
    top_k: Scalar,
    mass: Scalar,
) -> Scalar:
    """Length of the kept prefix; 0 where the entries below the floor might change it."""
    values, columns = ordered
    least, has_target = np.float32(0), False
    for slot in range(count):
        weights[slot] = math.exp(values[slot] - top)
        least += weights[slot]
        has_target = has_target or columns[slot] == target
    if not has_target:  # it counts towards the mass wherever it stands: it is always in the support
        least += own
    most = least + (top_k - count) * np.float32(math.exp(floor - top))
    kept = _prefix(weights, count, np.float32(mass * least))
    return kept if kept and kept == _prefix(weights, count, np.float32(mass * most)) else 0


@compiled
def _kept_of_all(
    ordered: Array, top: Scalar, target: Scalar, logit: Scalar, weights: Array, top_k: Scalar, mass: Scalar,
    adaptive: Scalar,
) -> Scalar:  # fmt: skip
    """Length of the kept prefix of the support, in whose last slot the target is put where it is missing."""
    values, columns = ordered
    last = top_k - 1
    has_target = False
    for slot in range(top_k):
        has_target = has_target or columns[slot] == target
    if not has_target:
        values[last], columns[last] = logit, target
    if not adaptive:
        mass = 2.0
    total = np.float32(0)
    for slot in range(top_k):
        weights[slot] = math.exp(values[slot] - top)
        total += weights[slot]
    return _prefix(weights, top_k, np.float32(mass * total)) or top_k


@compiled
def _prefix(weights: Array, count: Scalar, wanted: Scalar) -> Scalar:
    """How many weights from the first on have the sum; 0 where all together have not."""
    summed = np.float32(0)
    for slot in range(count):
        summed += weights[slot]
        if summed >= wanted:
            return slot + 1
    return 0


@compiled
def _write(
    columns: Array, weights: Array, kept: Scalar, target: Scalar, own: Scalar, codes: Array, projected: Array,
    histogram: Array, out_r: Array, out_g: Array, eps: Scalar,
) -> None:  # fmt: skip
    """The sketches of the kept entries and the target."""
    out_g[:] = 0
    histogram[:] = 0
    others = np.float32(0)
    for slot in range(kept):
        if columns[slot] == target:
            weights[slot] = 0
        others += weights[slot]
    if histogram.shape[0]:
        for slot in range(kept):
            histogram[codes[columns[slot]]] += weights[slot]
    if out_g.shape[0]:
        _add_rows(out_g, projected, columns, weights, kept)
    # nothing beside the target: no residual, and maybe no weight, where it is far below the top
    scale = np.float32(1) / (others + own) if others > 0 else np.float32(0)
    if histogram.shape[0]:
        # Where an entry shares bucket and sign with the target, r_v and its part of r_y cancel exactly: not summed.
        histogram[codes[target]] = 0
        histogram[codes[target]] = -histogram.sum()
        for bucket in range(out_r.shape[0]):
            out_r[bucket] = (histogram[2 * bucket + 1] - histogram[2 * bucket]) * scale
        _to_unit(out_r, eps)
    if out_g.shape[0]:
        for place in range(out_g.shape[0]):
            out_g[place] = (out_g[place] - others * projected[target, place]) * scale
        _to_unit(out_g, eps)


@compiled
def _add_rows(into: Array, rows: Array, places: Array, weights: Array, count: Scalar) -> None:
    """Add weighted rows, four at a time: each sum is written a quarter as often."""
    whole = count - count % 4
    for slot in range(0, whole, 4):
        one, two, three, four = weights[slot], weights[slot + 1], weights[slot + 2], weights[slot + 3]
        first, second = rows[places[slot]], rows[places[slot + 1]]
        third, fourth = rows[places[slot + 2]], rows[places[slot + 3]]
        for place in range(into.shape[0]):
            into[place] += one * first[place] + two * second[place] + three * third[place] + four * fourth[place]
    for slot in range(whole, count):
        row = rows[places[slot]]
        for place in range(into.shape[0]):
            into[place] += weights[slot] * row[place]


@compiled
def _to_unit(x: Array, eps: Scalar) -> None:
    squares = np.float32(0)
    for place in range(x.shape[0]):
        squares += x[place] * x[place]
    norm = max(np.float32(math.sqrt(squares)), np.float32(eps))
    for place in range(x.shape[0]):
        x[place] /= norm
