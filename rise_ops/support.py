"""The support of a prediction, and the residual on it.

For scaled logits `s [N, V]` and next tokens `y [N]`: the support is the `top_k` largest entries of `s`; where
`y` is not among them it takes the last slot. `p = softmax` over the support. Kept is the shortest prefix,
largest first, whose mass is at least `mass`, but at least `min_support` entries, and always `y`. The residual
is `r = p − onehot(y)` with `p` renormalised over the kept entries; `r_y = −Σ` of the other entries, because
`p_y − 1` cancels where the model is nearly certain.

Selecting 256 of V entries costs far more than everything after it, and mostly few survive the cut. So a
first pass selects only `_FIRST` entries. The mass of the others is at most `(top_k − _FIRST)` times the
smallest one selected; where that cannot move the cut, the kept set is exact and the row is done. Only the
other rows are selected in full. The result is the same set, not an approximation.

Where logits are not whole (`rise_ops.unembedding`), the support comes from candidates: the largest entries of each
slice of the vocabulary, and of them the largest.

Everything is float32. Ties at the edge of the support are broken arbitrarily.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rise_ops.config import SketchConfig

_FIRST = 32
_NEAR = 1e-4
"""Logits, and parts of the mass, that count as equal where rounding may decide."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The largest scaled logits of some rows; an entry that is not there has −∞."""

    values: torch.Tensor
    """float32 [N, C]."""
    tokens: torch.Tensor
    """int64 [N, C]: vocabulary entry."""
    own: torch.Tensor
    """float32 [N]: scaled logit of the next token."""


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Residuals of some rows, as one ragged list of kept entries in row order."""

    rows: torch.Tensor | None
    """int64 [n]: which rows of the input these are, ascending; None: all of them."""
    counts: torch.Tensor
    """int64 [n]: kept entries of each row, at least one."""
    entry_rows: torch.Tensor
    """int64 [entries]: index into the n rows."""
    tokens: torch.Tensor
    """int64 [entries]: vocabulary entry."""
    values: torch.Tensor
    """float32 [entries]: residual; sums to zero in every row."""


def residuals(scaled: torch.Tensor, targets: torch.Tensor, config: SketchConfig) -> Iterator[Residuals]:
    """Residuals of every row, in up to two parts.

    Parameters
    ----------
    scaled
        float32 [N, V] logits divided by the temperature.
    targets
        int64 [N] next tokens.
    config
        Its `top_k`, `mass`, `min_support` and `adaptive_support` are used.
    """
    top_k = min(config.top_k, scaled.shape[1])
    rows: torch.Tensor | None = None
    if config.adaptive_support and config.min_support <= _FIRST and top_k >= 2 * _FIRST:
        values, tokens, keep, done = _first_pass(scaled, targets, top_k=top_k, config=config)
        rows = (~done).nonzero().squeeze(1)
        if rows.numel() == 0:
            yield _residual(None, values, tokens, keep, targets)
            return
        if rows.numel() < done.numel():
            found = done.nonzero().squeeze(1)
            yield _residual(found, values[found], tokens[found], keep[found], targets[found])
            scaled, targets = scaled[rows], targets[rows]
        else:
            rows = None
    yield _residual(rows, *_full_pass(scaled, targets, top_k=top_k, config=config), targets)


def top_entries(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest entries of every row, largest first, and where they are.

    Exact in two levels: the entries lie in the k groups with the largest maxima. A group takes every G-th
    column, so that finding the maxima is a plain elementwise maximum. Group sizes from measurement: on one
    EPYC core, V = 50,257 and k = 256, 8 or 16 take 150 µs a row where `torch.topk` takes 230.
    """
    width = x.shape[1]
    size = 16 if width >= 128 * k else 4 if width >= 16 * k else 1
    if size == 1:
        values, columns = x.topk(k, dim=1)
        return values, columns
    groups = width // size
    whole = groups * size
    maxima = x[:, :whole].unflatten(1, (size, groups)).amax(dim=1)
    best = maxima.topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, whole, groups, device=x.device)
    candidates = (best[:, None, :] + offsets[:, None]).flatten(1)
    if whole < width:
        rest = torch.arange(whole, width, device=x.device).expand(x.shape[0], -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, slots = x.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, slots)


def merge(one: Candidates, other: Candidates | None, count: int) -> Candidates:
    """The `count` largest of both, largest first: not a number before all, as `torch.topk` has it."""
    values, tokens, own = one.values, one.tokens, one.own
    if other is not None:
        values, tokens = torch.cat([values, other.values], dim=1), torch.cat([tokens, other.tokens], dim=1)
        own = torch.maximum(own, other.own)
    values, slots = values.topk(min(count, values.shape[1]), dim=1)
    return Candidates(values, tokens.gather(1, slots), own)


def residuals_of(found: Candidates, targets: torch.Tensor, config: SketchConfig) -> Residuals:
    """Residuals of every row from its `top_k` largest entries, largest first: what `residuals` finds in whole rows."""
    values, tokens = found.values.clone(), found.tokens.clone()
    return _residual(None, *_support(values, tokens, found.own, targets, config), targets)


def undecided(found: Candidates, targets: torch.Tensor, config: SketchConfig) -> torch.Tensor:
    """Rows whose kept entries rounding decides: equal entries at an end, or a mass at the cut. bool [N].

    Parameters
    ----------
    found
        One entry more than the support has, largest first, where the vocabulary has as many.
    """
    values, count = found.values, found.values.shape[1]
    top_k = min(config.top_k, count)
    near = (values[:, :-1] - values[:, 1:]).abs() <= _NEAR  # the end of a slot and the next
    at_end = near[:, max(top_k - 2, 0) : top_k].any(dim=1)
    if not config.adaptive_support:
        return at_end
    kept, tokens = values[:, :top_k].clone(), found.tokens[:, :top_k].clone()
    missing = ~(tokens == targets[:, None]).any(dim=1)
    kept[:, -1] = torch.where(missing, found.own, kept[:, -1])
    cumulative = (kept - kept.amax(dim=1, keepdim=True)).exp().cumsum(dim=1)
    mass = cumulative / cumulative[:, -1:]
    last = (mass < config.mass).sum(dim=1, keepdim=True).clamp(min(config.min_support, top_k) - 1, top_k - 1)
    at_cut = (mass - config.mass).abs().amin(dim=1) <= _NEAR
    if count > 1:
        at_cut |= near.gather(1, last.clamp_max(count - 2)).squeeze(1)
    return at_end | at_cut


_Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _first_pass(
    scaled: torch.Tensor, targets: torch.Tensor, *, top_k: int, config: SketchConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, tokens and kept mask of the largest entries, and the rows where the mask is certain."""
    values, tokens = top_entries(scaled, _FIRST)
    target_values = scaled.gather(1, targets[:, None])
    has_target = (tokens == targets[:, None]).any(dim=1, keepdim=True)
    weights = (values - values[:, :1]).exp()
    cumulative = weights.cumsum(dim=1)
    # The target counts towards the mass wherever it stands: it is always in the support.
    least = cumulative[:, -1:] + (target_values - values[:, :1]).exp().masked_fill(has_target, 0)
    most = least + (top_k - _FIRST) * weights[:, -1:]
    cut = (cumulative < config.mass * least).sum(dim=1, keepdim=True)
    cut_most = (cumulative < config.mass * most).sum(dim=1, keepdim=True)
    done = ((cut == cut_most) & (cut < _FIRST)).squeeze(1)
    slots = torch.arange(_FIRST, device=scaled.device)
    keep = (slots <= cut) | (slots < config.min_support) | (tokens == targets[:, None])
    return (
        torch.cat([values, target_values], dim=1),
        torch.cat([tokens, targets[:, None]], dim=1),
        torch.cat([keep, ~has_target], dim=1),
        done,
    )


def _full_pass(scaled: torch.Tensor, targets: torch.Tensor, *, top_k: int, config: SketchConfig) -> _Kept:
    """Values, tokens and kept mask of the whole support."""
    values, tokens = top_entries(scaled, top_k)
    own = scaled.gather(1, targets[:, None]).squeeze(1)
    return _support(values, tokens, own, targets, config)


def _support(
    values: torch.Tensor, tokens: torch.Tensor, own: torch.Tensor, targets: torch.Tensor, config: SketchConfig
) -> _Kept:
    """The same from the largest entries, largest first, in whose last slot the target is put where it is missing."""
    missing = ~(tokens == targets[:, None]).any(dim=1)
    values[:, -1] = torch.where(missing, own, values[:, -1])
    tokens[:, -1] = torch.where(missing, targets, tokens[:, -1])
    if not config.adaptive_support:
        return values, tokens, torch.ones_like(tokens, dtype=torch.bool)
    cumulative = (values - values.amax(dim=1, keepdim=True)).exp().cumsum(dim=1)
    cut = (cumulative < config.mass * cumulative[:, -1:]).sum(dim=1, keepdim=True)
    slots = torch.arange(values.shape[1], device=values.device)
    return values, tokens, (slots <= cut) | (slots < config.min_support) | (tokens == targets[:, None])


def _residual(
    rows: torch.Tensor | None, values: torch.Tensor, tokens: torch.Tensor, keep: torch.Tensor, targets: torch.Tensor
) -> Residuals:
    weights = (values - values.amax(dim=1, keepdim=True)).exp() * keep
    is_target = (tokens == targets[:, None]) & keep
    others = weights.masked_fill(is_target, 0)
    signed = torch.where(is_target, -others.sum(dim=1, keepdim=True), others) / weights.sum(dim=1, keepdim=True)
    entry_rows, slots = keep.nonzero(as_tuple=True)
    return Residuals(rows, keep.sum(dim=1), entry_rows, tokens[entry_rows, slots], signed[entry_rows, slots])
