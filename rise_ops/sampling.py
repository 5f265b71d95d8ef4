"""Sampling without replacement in proportion to weights, as an order: the first k rows are a sample of k.

A row of weight w gets the key log w + G, where G is a Gumbel variable of its own; rows in descending order of keys
are a sample in which each next row is drawn from those left with chances in proportion to their weights (Gumbel
top-k: Kool, van Hoof and Welling, ICML 2019; the same order as that of u^(1/w), Efraimidis and Spirakis, Information
Processing Letters 97, 2006). With w = exp(value / temperature) the better rows are likelier and none is impossible, as
in QuRating (Wettig, Gupta, Malik and Chen, ICML 2024); w = value is in proportion to the value itself.

A row's random number is a hash of the seed and its doc_id; the second and each further row of the same doc_id and
value have their number in the hash. So it depends neither on the order of rows nor on machine or block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.config import SampleConfig
from rise_ops.ranking import Records, ties_of, values_of

UInt64Array = npt.NDArray[np.uint64]

_SIGN = np.uint64(1 << 63)
_MOST = 1e300  # of a weight's logarithm: a temperature may be next to nothing
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Draw:
    """Gives records their keys, as they come in the order of value.

    Parameters
    ----------
    sample
        Seed, and how chances come from values.
    """

    def __init__(self, sample: SampleConfig) -> None:
        self._temperature = sample.temperature
        self._seed = _mixed(np.array([sample.seed % 2**64], np.uint64))[0]
        self._last: Any = None
        self._copies = 0

    def keys(self, records: Records) -> tuple[Records, npt.NDArray[np.bool_]]:
        """Copies of the records in which the key is that of the draw, and which of them have a chance.

        Records of the same value and tie are numbered among themselves.
        """
        values = values_of(records).astype(np.float64)
        chances = np.isfinite(values) if self._temperature is not None else np.isfinite(values) & (values > 0)
        usable = np.where(chances, values, 1)
        weights = usable / self._temperature if self._temperature is not None else np.log(usable)
        hashed = ties_of(records) ^ self._seed
        numbers = _mixed(_mixed(hashed) + self._ordinals(records).astype(np.uint64) * _GAMMA)
        uniform = ((numbers >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        found = records.copy()
        found["key"] = _descending(np.clip(weights, -_MOST, _MOST) - np.log(-np.log(uniform)))
        return found, chances

    def _ordinals(self, records: Records) -> npt.NDArray[np.int64]:
        """How many records before have the same key and tie."""
        if not len(records):
            return np.empty(0, np.int64)
        key, tie = records["key"], records["tie"]
        begins = np.ones(len(records), np.bool_)
        begins[1:] = (key[1:] != key[:-1]) | (tie[1:] != tie[:-1])
        first = (int(key[0]), int(tie[0]))
        carried = self._copies if first == self._last else 0
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=len(records))
        found = np.arange(len(records)) - np.repeat(starts, lengths)
        found[: lengths[0]] += carried
        self._last, self._copies = (int(key[-1]), int(tie[-1])), int(found[-1]) + 1
        return found


def _mixed(numbers: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    mixed = numbers + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def _descending(numbers: npt.NDArray[np.float64]) -> UInt64Array:
    """Integers in the reverse order of the numbers."""
    bits = np.ascontiguousarray(numbers + 0.0).view(np.uint64)
    return np.asarray(~np.where(bits & _SIGN, ~bits, bits | _SIGN))
