"""Which pairs of rows are looked at: locality-sensitive hashing of sign codes, in bands.

A bit of a code says on which side of a random hyperplane through the origin a signature lies, so a bit of two
signatures at the angle θ differs with probability q = θ/π (Goemans and Williamson, 1995; Charikar, 2002). Two rows
are candidates where all `bits` bits of one of the `bands` disjoint bands agree:

    P(candidate) = 1 − (1 − (1 − q)^bits)^bands                (Indyk and Motwani, 1998)

Candidates are then compared by whole codes: at most `near` of all bits may differ, which the tail of the binomial
distribution allows almost every pair at the cosine. What both may miss of the pairs at the cosine, `1 − recall`, is
shared between them (union bound); pairs above the cosine are missed less often. The statement is about the mean over
rotations. The directions are nearly independent where a signature is wide; those of one rotation are orthogonal,
which makes the number of bits that differ vary less, not more (Ji et al., NIPS 2012).

Signatures of a corpus share a direction, so that strangers agree on more bits than isotropic rows would. They are
not centred, which would change the angles that the statement is about; rather, the width of a band is chosen by
what a sample of the rows costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CODE_BITS = 2_048
SAMPLE_ROWS = 1_024
"""Rows that stand for all when the cost of strangers is estimated."""
_FIRST_BITS = 512
_BAND_BITS = range(4, 33)
_FILTER_SHARE = 0.1  # of what may be missed, for each of the two comparisons of codes
_ROW_SECONDS = 6e-7  # a row in a band: its key, its place in the table
_PAIR_SECONDS = 1.5e-7  # a candidate: its codes, compared
_STRANGE = 1_024  # steps between agreement in nothing and in everything

Codes = npt.NDArray[np.uint8]
UInt64Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Bands:
    """How codes are compared."""

    bits: int
    """Of a band."""
    bands: int
    near: tuple[tuple[int, int], ...]
    """First so many bits of the code, and how many of these may differ."""
    candidates: float
    """Pairs of strangers that are expected to be candidates."""


def plan_bands(cosine: float, recall: float, *, rows: int, sample: Codes, code_bits: int = CODE_BITS) -> Bands:
    """The bands that find pairs at `cosine` with at least the probability `recall`, at the least cost.

    Parameters
    ----------
    rows
        Rows that are compared.
    sample
        Codes of some of them, [rows, code_bits / 8].
    """
    differs, miss = math.acos(cosine) / math.pi, 1 - recall
    near = tuple(
        (bits, most_differing(bits, differs, _FILTER_SHARE * miss)) for bits in sorted({_FIRST_BITS, code_bits})
    )
    share, agreement = _strangers(sample, near[-1][1])
    pairs = rows * (rows - 1) / 2
    plans = []
    for bits in _BAND_BITS:
        bands = bands_for(bits, differs, (1 - 2 * _FILTER_SHARE) * miss)
        if bands * bits <= code_bits:
            found = pairs * bands * float(share @ agreement**bits)
            plans.append((bands * rows * _ROW_SECONDS + found * _PAIR_SECONDS, Bands(bits, bands, near, found)))
    return min(plans, key=lambda plan: (plan[0], plan[1].bits))[1]


def bands_for(bits: int, differs: float, miss: float) -> int:
    """The fewest bands of `bits` bits that all miss a pair with at most the probability `miss`."""
    agrees = (1 - differs) ** bits
    return 1 if agrees >= 1 - miss else math.ceil(math.log(miss) / math.log1p(-agrees))


def most_differing(bits: int, differs: float, miss: float) -> int:
    """The least number that more of `bits` bits, each with probability `differs`, exceed with at most `miss`."""
    if differs == 0:
        return 0
    ways = math.lgamma(bits + 1)
    log = [
        ways - math.lgamma(count + 1) - math.lgamma(bits - count + 1)
        + count * math.log(differs) + (bits - count) * math.log1p(-differs)
        for count in range(bits + 1)
    ]  # fmt: skip
    above = np.cumsum(np.exp(log)[::-1])[::-1] - np.exp(log)  # more than so many
    return int(np.argmax(above <= miss))


def _strangers(sample: Codes, near: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of the pairs in a sample that are not near: shares of all pairs by agreement, and the agreements."""
    signs = np.unpackbits(sample, axis=1).astype(np.float32) * 2 - 1
    bits = signs.shape[1]
    differing = (bits - (signs @ signs.T)[np.triu_indices(len(signs), 1)]) / 2
    steps = np.rint((1 - differing / bits) * _STRANGE).astype(np.int64)
    counts = np.bincount(steps[differing > near], minlength=_STRANGE + 1)
    return counts / max(1, len(differing)), np.arange(_STRANGE + 1) / _STRANGE


def band_keys(codes: Codes, plan: Bands) -> UInt64Array:
    """The bits of each band as a number, [rows, bands]."""
    wide = np.zeros((len(codes), plan.bands, 32), np.uint8)
    bits = np.unpackbits(codes, axis=1, count=plan.bands * plan.bits)
    wide[:, :, 32 - plan.bits :] = bits.reshape(len(codes), plan.bands, plan.bits)
    return np.packbits(wide, axis=2).view(">u4")[:, :, 0].astype(np.uint64)


def differing_bits(left: UInt64Array, right: UInt64Array) -> npt.NDArray[np.int64]:
    """How many bits differ between codes, both [pairs, words]."""
    return np.asarray(np.bitwise_count(left ^ right).sum(axis=1, dtype=np.int64))
