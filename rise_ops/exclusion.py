"""Rows that go because of their score on a target: those above a score, or the N most influential ones.

The N are the highest scores of all rows that have one, whatever becomes of these rows otherwise; of equal ones the
lower doc_id, then the earlier place. To find the N-th, keys are sorted on disk as far as it takes (`rise_ops.ranking`).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.config import ExcludeConfig
from rise_ops.ranking import KEY, Records, Sorter, by_value

TIE = pl.col("doc_id").str.head(16).str.to_integer(base=16, dtype=pl.UInt64).alias("tie")
"""What breaks ties of value: eight bytes of the doc_id."""


class TargetExclusions:
    """Exclusions by target: they see all rows, then tell which ones go.

    Parameters
    ----------
    rules
        By the number that rows get, in the order of precedence.
    folder
        Local folder; 20 bytes a row and target.
    capacity
        Rows that are sorted in memory at a time.
    """

    def __init__(self, rules: Mapping[int, ExcludeConfig], folder: Path, *, capacity: int) -> None:
        self._rules = rules
        counted = {str(rule.target) for rule in rules.values() if rule.min_score is None}
        self._sorters = {name: Sorter(folder / f"target-{name}", KEY, capacity=capacity) for name in sorted(counted)}
        self._last: dict[int, Any] = {}
        self._valued = 0

    @property
    def columns(self) -> list[str]:
        """Scores that are needed."""
        return list(dict.fromkeys(f"score_{rule.target}" for rule in self._rules.values()))

    def see(self, frame: pl.DataFrame, first: int) -> None:
        """The next rows: doc_id and scores; the first has this place."""
        for name, sorter in self._sorters.items():
            keys, valued = _keys(frame, name, first)
            sorter.add(keys[valued])

    def settle(self, valued: int) -> None:
        """All rows were seen, so many with scores: find the last ones that go."""
        for name, sorter in self._sorters.items():
            wanted = {
                code: _count(rule, valued)
                for code, rule in self._rules.items()
                if rule.target == name and rule.min_score is None
            }
            done = 0
            for keys in sorter.runs():
                for code, count in wanted.items():
                    if done < count <= done + len(keys):
                        self._last[code] = keys[count - done - 1]
                done += len(keys)
                if done >= max(wanted.values()):
                    break

    def codes(self, frame: pl.DataFrame, first: int) -> npt.NDArray[np.uint16]:
        """The number of the first rule by which each row goes, 0: none."""
        found = np.zeros(frame.height, np.uint16)
        for code, rule in reversed(list(self._rules.items())):
            if rule.min_score is not None:
                # scores are compared as they are stored, in 32 bits: a row of score 0.1 has at least 0.1
                scores = frame[f"score_{rule.target}"]
                least = pl.Series([rule.min_score]).cast(pl.Float32).to_numpy()[0]
                goes = scores.is_not_null().to_numpy() & (scores.fill_null(0.0).to_numpy() >= least)
            else:
                keys, valued = _keys(frame, str(rule.target), first)
                goes = valued & _is_before(keys, self._last.get(code))
            found[goes] = code
        return found


def _count(rule: ExcludeConfig, valued: int) -> int:
    if rule.top_rows is not None:
        return min(rule.top_rows, valued)
    return int(Fraction(str(rule.top_fraction)) * valued)


def _keys(frame: pl.DataFrame, name: str, first: int) -> tuple[Records, npt.NDArray[np.bool_]]:
    scores = frame[f"score_{name}"]
    keys, valued = np.empty(frame.height, KEY), scores.is_not_null().to_numpy()
    by_value(keys, scores.fill_null(0.0).to_numpy(), valued, frame.select(TIE)["tie"].to_numpy())
    keys["row"] = np.arange(first, first + frame.height, dtype=np.uint64)
    return keys, valued


def _is_before(keys: Records, last: Any) -> npt.NDArray[np.bool_]:
    """Keys that come no later than another one."""
    if last is None:
        return np.zeros(len(keys), np.bool_)
    same = keys["key"] == last["key"]
    earlier = (keys["tie"] < last["tie"]) | ((keys["tie"] == last["tie"]) & (keys["row"] <= last["row"]))
    return np.asarray((keys["key"] < last["key"]) | (same & earlier))
