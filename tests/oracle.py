"""The estimator as plain loops in float64, one position and one vocabulary entry at a time.

Slow on purpose, and written from the equations alone: it shares no code with `rise_ops.head`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from rise_ops.config import SketchConfig

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Head:
    """What turns hidden states into logits."""

    weight: Array
    bias: Array | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    def logits(self, hidden: Array) -> Array:
        """Logits [V] of one position."""
        z = self.weight.astype(np.float64) @ hidden.astype(np.float64)
        if self.bias is not None:
            z = z + self.bias
        z = z * self.scale
        return z if self.soft_cap is None else self.soft_cap * np.tanh(z / self.soft_cap)


def support(scaled: Array, target: int, config: SketchConfig) -> tuple[dict[int, float], float]:
    """Kept entries with their unnormalised weights, and how near the cut came to `mass` (for tests to avoid)."""
    order = [int(token) for token in np.argsort(-scaled, kind="stable")[: min(config.top_k, len(scaled))]]
    if target not in order:
        order[-1] = target
    top = max(scaled[token] for token in order)
    weights = {token: math.exp(scaled[token] - top) for token in order}
    if not config.adaptive_support:
        return weights, 1.0
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    margin, mass = 1.0, 0.0
    for token in order:
        if mass >= config.mass * total and len(kept) >= config.min_support:
            break
        kept[token] = weights[token]
        mass += weights[token]
        margin = min(margin, abs(mass / total - config.mass))
    kept[target] = weights[target]
    return kept, margin


def residual(scaled: Array, target: int, config: SketchConfig) -> dict[int, float]:
    """Residual on the kept entries."""
    kept, _ = support(scaled, target, config)
    total = math.fsum(kept.values())
    others = {token: weight / total for token, weight in kept.items() if token != target}
    return others | {target: -math.fsum(others.values())}


def _sketch(values: dict[int, float], buckets: Array, signs: Array, width: int, eps: float) -> Array:
    out = np.zeros(width)
    for index, value in values.items():
        out[buckets[index]] += signs[index] * value
    return out / max(float(np.linalg.norm(out)), eps)


def signature(
    hidden: Array, token_ids: Array, head: Head, config: SketchConfig, tables: dict[str, Array], *, loss_start: int = 0
) -> Array:
    """Signature of one chunk. `tables` holds `{h,g,r}_{buckets,signs}`."""
    widths = {"h": config.dim_h, "g": config.dim_g, "r": config.dim_r}
    sums = {channel: np.zeros((widths[channel[0]], widths[channel[1]])) for channel in config.channels}
    for position in range(len(token_ids) - 1):
        if position + 1 < loss_start:
            continue
        scaled = head.logits(hidden[position]) / config.temperature
        r = residual(scaled, int(token_ids[position + 1]), config)
        back = np.zeros(hidden.shape[1])
        for token, value in r.items():
            back += value * head.weight[token].astype(np.float64)
        inputs = {"h": dict(enumerate(hidden[position].astype(np.float64))), "g": dict(enumerate(back)), "r": r}
        unit = {
            name: _sketch(inputs[name], tables[f"{name}_buckets"], tables[f"{name}_signs"], widths[name], config.eps)
            for name in inputs
        }
        for channel in sums:
            sums[channel] += np.outer(unit[channel[0]], unit[channel[1]])
    weights = {"rh": config.weight_rh, "gh": config.weight_gh, "rg": config.weight_rg}
    whole = np.concatenate([weights[channel] * sums[channel].ravel() for channel in config.channels])
    return whole / max(float(np.linalg.norm(whole)), config.eps)


def cosine(a: Array, b: Array) -> float:
    """Cosine of two vectors in float64; 1 where both are zero."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if norms == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(a @ b) / norms
