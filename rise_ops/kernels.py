"""Triton kernels for GPUs: the largest logits of each row, the kept part of the support, and the sketches of residuals.

What `rise_ops.support` and `rise_ops.residual_sketch` compute with dozens of tensor operations, most of which wait for
the device, in four launches for thousands of rows; a program works on one row. No program writes what another reads.

1. `_candidates` reads a row of logits in blocks of `_GROUPS` columns. The maxima over every `_GROUPS`-th column are
   elementwise maxima of blocks. The k-th largest of these is a floor that k entries reach, and in a second reading all
   that reach it are moved together. Mostly that is little more than k entries; where it is more than there is room for,
   or all the row (equal logits), the floor is raised by bisection first, each step a reading of the row.
2. `_support` has a row's candidates in registers. The k largest, and of these the shortest prefix that has the mass,
   are those above a floor, found by bisection again: 32 sums decide every bit of a float. Of equal entries at the floor
   the first fill up. What is kept is moved together, renormalised, the next token left out (`r_y = −Σ` of the others).
3. `_sketch_r` and `_sketch_g` add the kept entries to their buckets, and the rows of the projected head that belong to
   them, and scale to unit length. Where an entry shares bucket and sign with the next token, both are left out.

Floats are compared as integers of the same order. A number that is none is the largest of all, as in `torch.topk`, and
makes its row's sketches NaN. Sums are float32, in no order: where a mass is at the cut to the last bit, an entry more
or less is kept than by tensor operations, and of equal entries others.

Import only where the kernels are used. With `TRITON_INTERPRET=1` in the environment they run on a CPU, slowly.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, cast

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

from rise_ops.config import SketchConfig
from rise_ops.support import Candidates

FAILURES: tuple[type[Exception], ...] = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)
"""What can go wrong where kernels are compiled and started for the first time."""

_GROUPS = 4096
"""Columns of a block: the more, the nearer the floor is to the k-th largest entry. 32 numbers of each thread."""
_LARGEST_TOP_K = 1024
"""Four candidates for each entry must fit the registers of a program."""
_WIDEST = 1024
"""Width of a sketch, likewise."""
_TILE = 4096
"""Numbers that a program of a sketch adds at a time: entries × width."""

_LEAST: tl.constexpr = tl.constexpr(-(2**31))
_MOST: tl.constexpr = tl.constexpr(2**31 - 1)
_NONE: tl.constexpr = tl.constexpr(2**31 - 2)
"""Order of a number that is none."""
_LEAST_FINITE: tl.constexpr = tl.constexpr(-0x7F800000)
_MOST_FINITE: tl.constexpr = tl.constexpr(0x7F7FFFFF)
"""Orders of the finite floats; below is −∞, an entry that cannot be."""


def _kernel(function: Callable[..., Any]) -> Any:
    """Compile for the device when first called. Arguments have no types: Triton looks into annotations."""
    return cast(Any, triton.jit)(function)


def fit(config: SketchConfig) -> bool:
    """Whether the kernels can do it."""
    return config.top_k <= _LARGEST_TOP_K and max(config.dim_r, config.dim_g) <= _WIDEST


def top_entries(scaled: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A few more than the k largest entries of each row, in no order, and where they are.

    Parameters
    ----------
    scaled
        float32 [N, V], contiguous.
    k
        At most V and 1,024.

    Returns
    -------
    tuple
        float32 and int64 [N, C]; an entry that is not there is −∞, at a negative place.
    """
    rows, vocab = scaled.shape
    width = max(256, 4 * triton.next_power_of_2(k))
    values = torch.empty(rows, width, device=scaled.device)
    tokens = torch.empty(rows, width, dtype=torch.int64, device=scaled.device)
    groups = max(16, min(_GROUPS, triton.next_power_of_2(vocab)))
    with torch.cuda.device_of(scaled):
        _candidates[(rows,)](scaled, values, tokens, vocab, k, GROUPS=groups, WIDTH=width, num_warps=8)
    return values, tokens


def sketches(
    found: Candidates,
    targets: torch.Tensor,
    *,
    codes: torch.Tensor | None,
    projected: torch.Tensor | None,
    config: SketchConfig,
) -> dict[str, torch.Tensor]:
    """Sketches of the residuals of some rows, of unit length.

    Parameters
    ----------
    found
        At least the `top_k` largest entries of each row, in any order.
    targets
        int64 [N] next tokens.
    codes
        int32 [V] of the residuals' sketch (`rise_ops.sketch.column_codes`); None where it is not wanted.
    projected
        float32 [V, dim_g] the unembedding's sketch; None where it is not wanted.
    config
        Its `top_k`, `mass`, `min_support`, `adaptive_support`, `dim_r`, `dim_g` and `eps` are used.

    Returns
    -------
    dict
        float32 [N, dim_r] under r, float32 [N, dim_g] under g.
    """
    kept = _kept(found, targets, config)
    rows, device = targets.numel(), targets.device
    out = {}
    with torch.cuda.device_of(targets):
        if codes is not None:
            out["r"] = torch.empty(rows, config.dim_r, device=device)
            _start(_sketch_r, kept, targets, codes, out["r"], config.eps)
        if projected is not None:
            out["g"] = torch.empty(rows, config.dim_g, device=device)
            _start(_sketch_g, kept, targets, projected, out["g"], config.eps)
    return out


_Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _kept(found: Candidates, targets: torch.Tensor, config: SketchConfig) -> _Kept:
    """Residuals and tokens [N, top_k] of the kept entries but the next token, from the left; their number [N]."""
    rows, width = found.values.shape
    values = torch.empty(rows, config.top_k, device=targets.device)
    tokens = torch.empty(rows, config.top_k, dtype=torch.int64, device=targets.device)
    counts = torch.empty(rows, dtype=torch.int32, device=targets.device)
    with torch.cuda.device_of(targets):
        _support[(rows,)](
            found.values, found.tokens, found.own, targets, values, tokens, counts, width, config.top_k, config.mass,
            config.min_support, ADAPTIVE=config.adaptive_support, WIDTH=max(16, triton.next_power_of_2(width)),
            num_warps=4,
        )  # fmt: skip
    return values, tokens, counts


def _start(kernel: Any, kept: _Kept, targets: torch.Tensor, table: torch.Tensor, out: torch.Tensor, eps: float) -> None:
    rows, width = out.shape
    padded = max(16, triton.next_power_of_2(width))
    kernel[(rows,)](
        *kept, targets, table, out, kept[0].shape[1], width, eps, WIDTH=padded, ENTRIES=max(2, _TILE // padded),
        num_warps=4,
    )  # fmt: skip


@_kernel
def _order(x):
    """Integers of the same order as floats."""
    bits = x.to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, _NONE, order)


@_kernel
def _floor(order, count):
    """The largest number that at least `count` reach.

    The middle is half the sum, rounded down, which itself may have more than 32 bits; `low` where they are neighbours.
    """
    low, high = tl.full([], _LEAST, tl.int32), tl.full([], _MOST, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum((order >= middle).to(tl.int32), 0) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@_kernel
def _candidates(scaled, values, tokens, vocab, k, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Entries of one row that reach a floor, at least the k largest and at most WIDTH."""
    row = tl.program_id(0).to(tl.int64)
    logits, values, tokens = scaled + row * vocab, values + row * WIDTH, tokens + row * WIDTH
    maxima = tl.full([GROUPS], _LEAST, tl.int32)
    for start in range(0, vocab, GROUPS):
        maxima = tl.maximum(maxima, _order(_block(logits, start, vocab, GROUPS)))
    low = tl.maximum(_floor(maxima, k), _LEAST_FINITE)
    high, nothing = tl.full([], _MOST, tl.int32), tl.full([], 0, tl.int32)
    count = _compact(logits, vocab, low, high, values, tokens, nothing, GROUPS, WIDTH)
    if count > WIDTH:
        middle = (low & high) + ((low ^ high) >> 1)
        while (count > WIDTH) & (middle > low):
            found = _reach(logits, vocab, middle, GROUPS)
            if found >= k:
                low, count = middle, found
            else:
                high = middle
            middle = (low & high) + ((low ^ high) >> 1)
        # Fewer than k are at `high` or above, and must be in; of those between, which may be equal, as many as fit.
        tl.debug_barrier()
        above = _compact(logits, vocab, high, tl.full([], _MOST, tl.int32), values, tokens, nothing, GROUPS, WIDTH)
        count = _compact(logits, vocab, low, high, values, tokens, above, GROUPS, WIDTH)
    tl.debug_barrier()
    slots = tl.arange(0, WIDTH)
    tl.store(values + slots, tl.full([WIDTH], float("-inf"), tl.float32), mask=slots >= count)
    tl.store(tokens + slots, tl.full([WIDTH], _LEAST, tl.int64), mask=slots >= count)


@_kernel
def _block(logits, start, vocab, GROUPS: tl.constexpr):
    columns = start + tl.arange(0, GROUPS)
    return tl.load(logits + columns, mask=columns < vocab, other=float("-inf"))


@_kernel
def _reach(logits, vocab, floor, GROUPS: tl.constexpr):
    """How many reach the floor."""
    reached = tl.zeros([GROUPS], tl.int32)
    for start in range(0, vocab, GROUPS):
        reached += (_order(_block(logits, start, vocab, GROUPS)) >= floor).to(tl.int32)
    return tl.sum(reached, 0)


@_kernel
def _compact(
    logits, vocab, low, high, values, tokens, count,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Move entries in [low, high) together, from slot `count` on, as far as there is room; the slot after the last."""
    for start in range(0, vocab, GROUPS):
        x = _block(logits, start, vocab, GROUPS)
        order = _order(x)
        chosen = (order >= low) & (order < high)
        slots = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        room = chosen & (slots < WIDTH)
        tl.store(values + slots, x, mask=room)
        tl.store(tokens + slots, (start + tl.arange(0, GROUPS)).to(tl.int64), mask=room)
        count += tl.sum(chosen.to(tl.int32), 0)
    return count


@_kernel
def _largest(order, among, count):
    """Which are the `count` largest of some; of equal ones at the end the first. All where there are not as many."""
    floor = _floor(tl.where(among, order, _LEAST), count)
    above = among & (order > floor)
    equal = among & (order == floor)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@_kernel
def _heaviest(order, weight, among, wanted):
    """The fewest of some, largest first, that together have the weight; all where they have not."""
    low, high = tl.full([], _LEAST, tl.int32), tl.full([], _MOST, tl.int32)
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)
        enough = tl.sum(tl.where(among & (order >= middle), weight, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    above = among & (order > low)
    equal = among & (order == low)
    missing = wanted - tl.sum(tl.where(above, weight, 0.0), 0)
    before = (tl.cumsum(equal.to(tl.int32), 0) - 1).to(tl.float32)
    return above | (equal & (before * weight < missing))


@_kernel
def _support(
    values, tokens, own, targets, kept_values, kept_tokens, counts,
    width, top_k, mass, min_support, ADAPTIVE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The kept entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, WIDTH)
    x = tl.load(values + row * width + slots, mask=slots < width, other=float("-inf"))
    token = tl.load(tokens + row * width + slots, mask=slots < width, other=_LEAST)
    target, own_logit = tl.load(targets + row), tl.load(own + row)
    order = _order(x)
    there = order >= _LEAST_FINITE
    top = tl.max(x, 0)
    weight = tl.exp(x - top)
    own_weight = tl.exp(own_logit - top)

    chosen = _largest(order, there, top_k)
    missing = tl.sum((chosen & (token == target)).to(tl.int32), 0) == 0
    if missing:  # it takes the last slot
        chosen = _largest(order, there, top_k - 1)
    total = tl.sum(tl.where(chosen, weight, 0.0), 0) + tl.where(missing, own_weight, 0.0)
    kept = chosen
    if ADAPTIVE:
        kept = _heaviest(order, weight, chosen, mass * total)
        if tl.sum(kept.to(tl.int32), 0) < min_support:
            kept = _largest(order, chosen, min_support)

    kept = kept & (token != target)
    weight = tl.where(kept, weight, 0.0)
    scale = 1.0 / (tl.sum(weight, 0) + own_weight)
    places = tl.cumsum(kept.to(tl.int32), 0) - 1
    count = tl.sum(kept.to(tl.int32), 0)
    overflows = tl.sum((order > _MOST_FINITE).to(tl.int32), 0)
    broken = (overflows > 0) | (tl.sum(there.to(tl.int32), 0) == 0) | (own_logit != own_logit)
    tl.store(kept_values + row * top_k + places, weight * scale, mask=kept)
    tl.store(kept_tokens + row * top_k + places, token, mask=kept)
    tl.debug_barrier()
    if broken:  # an overflow must not look like a sketch
        count = 1
        tl.store(kept_values + row * top_k, float("nan"))
        tl.store(kept_tokens + row * top_k, target)
    tl.store(counts + row, count)


@_kernel
def _sketch_r(
    kept_values, kept_tokens, counts, targets, codes, out, top_k,
    width, eps, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """CountSketch of one row's residual: `Σ_{v≠y} r_v (s_v e_b(v) − s_y e_b(y))`."""
    row = tl.program_id(0).to(tl.int64)
    count, own = tl.load(counts + row), tl.load(codes + tl.load(targets + row))
    buckets = tl.arange(0, WIDTH)
    sketch, others, all_others = tl.zeros([WIDTH], tl.float32), 0.0, 0.0
    for start in range(0, count, ENTRIES):
        slots = start + tl.arange(0, ENTRIES)
        value = tl.load(kept_values + row * top_k + slots, mask=slots < count, other=0.0)
        token = tl.load(kept_tokens + row * top_k + slots, mask=slots < count, other=0)
        code = tl.load(codes + token)
        all_others += tl.sum(value, 0)
        value = tl.where(code == own, 0.0, value)
        others += tl.sum(value, 0)
        signed = tl.where((code & 1) == 1, value, -value)
        sketch += tl.sum(tl.where((code >> 1)[:, None] == buckets[None, :], signed[:, None], 0.0), 0)
    own_part = tl.where((own & 1) == 1, others, -others)
    sketch -= tl.where(buckets == own >> 1, own_part, 0.0)
    _store_unit(sketch, all_others, out + row * width, width, eps, WIDTH)


@_kernel
def _sketch_g(
    kept_values, kept_tokens, counts, targets, projected, out, top_k,
    width, eps, WIDTH: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Sketch of the residual times the weight: rows of the projected head, weighted by the residual."""
    row = tl.program_id(0).to(tl.int64)
    count, target = tl.load(counts + row), tl.load(targets + row)
    columns = tl.arange(0, WIDTH)
    sketch, others = tl.zeros([WIDTH], tl.float32), 0.0
    for start in range(0, count, ENTRIES):
        slots = start + tl.arange(0, ENTRIES)
        value = tl.load(kept_values + row * top_k + slots, mask=slots < count, other=0.0)
        token = tl.load(kept_tokens + row * top_k + slots, mask=slots < count, other=0)
        there = (slots < count)[:, None] & (columns < width)[None, :]
        part = tl.load(projected + token[:, None] * width + columns[None, :], mask=there, other=0.0)
        sketch += tl.sum(value[:, None] * part, 0)
        others += tl.sum(value, 0)
    sketch -= others * tl.load(projected + target * width + columns, mask=columns < width, other=0.0)
    _store_unit(sketch, others, out + row * width, width, eps, WIDTH)


@_kernel
def _store_unit(sketch, others, out, width, eps, WIDTH: tl.constexpr):
    """Scaled to unit length; nothing but NaN where the residual is none."""
    norm = tl.maximum(tl.sqrt(tl.sum(sketch * sketch, 0)), eps)
    unit = tl.where(others == others, sketch / norm, float("nan"))
    columns = tl.arange(0, WIDTH)
    tl.store(out + columns, unit, mask=columns < width)
