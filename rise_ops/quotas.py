"""Bounds on groups of rows, and a budget, filled from an order of rows.

Rows come in an order, the best first, each in at most one group of every partition (sources, labels). A group has a
most and a least, in rows and as a fraction of what is kept; fractions count tokens where the budget does, else rows.

1. **Minima.** From the top of the order each row is reserved whose group still needs it, unless a group that it is in
   has its most.
2. **The rest.** From the top again each other row is taken. A group ends with the first row that would exceed its
   most, everything ends with the first row that would exceed the budget. A row that one bound drops counts towards
   no other; of several that bar it, the one that ended first is its reason.

Fractions are of the total T that is kept, which depends on them. Of one partition alone T is at most the largest
number within the budget for which Σ_g min(rows of g, f_g · T) ≥ T (water filling). From there on the two steps are
repeated with the total that they left, until it stays: the largest bounds are then f · T rounded down, the smallest
f · T rounded up, and hold exactly. In tokens T is a pair, a row apart: what is kept lies between; the most is a part
of the lower one, the least of the upper one. Where bounds leave no play (two labels of at most one half each, counted
in tokens), no total stays but nothing; then fractions are of a total that is larger than what is kept, by at most a
row a group (`Filled.exact`).

Minima hold or are an error with the numbers. Steps 1 and 2 are greedy: where a source and a label bound the same
rows, there may be a choice that meets minima which this one does not.

All arithmetic is in integers. Memory depends on the number of groups, not of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rise_ops.config import Quota
from rise_ops.errors import SelectionError
from rise_ops.ranking import PIECE_ROWS, Records

Unit = Literal["rows", "tokens"]
Int64Array = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint16]

NO_GROUP = 0
"""The group of rows that belong to none; it has no bounds."""
_NO_LIMIT = 2**62
_SMALL = 64
_DENSE = 4  # groups a row up to which counting all groups is faster than finding those that occur
_EXACT_ATTEMPTS = 24
_ATTEMPTS = 500
_ROUNDING = 10_000


@dataclass(frozen=True, slots=True)
class Limit:
    """A budget: no more than so many rows or tokens."""

    code: int
    unit: Unit
    most: int
    text: str
    """Such as `selection.keep.rows`."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The bounds of some groups."""

    quota: Quota
    text: str
    """Such as `selection.per_label.groups.rare`."""
    code_rows: int
    """What a row gets that exceeds `max_rows`."""
    code_fraction: int
    """What a row gets that exceeds `max_fraction`."""


@dataclass(slots=True)
class Partition:
    """Groups and what they have."""

    kind: Literal["source", "label"]
    """Also the field of a record that has the group's number."""
    names: Sequence[str]
    """By number; NO_GROUP has none that matters."""
    rules: Sequence[Rule]
    rule_of: Int64Array
    """Number of the rule of each group, −1: none."""
    there_rows: Int64Array = field(init=False)
    """Rows that may be kept, by group."""
    there_tokens: Int64Array = field(init=False)

    def __post_init__(self) -> None:
        self.there_rows, self.there_tokens = (np.zeros(len(self.rule_of), np.int64) for _ in range(2))

    def count(self, records: Records) -> None:
        """Some of the rows that may be kept."""
        groups, rows, tokens = _sums(records[self.kind], records["tokens"], len(self.rule_of))
        self.there_rows[groups] += rows
        self.there_tokens[groups] += tokens

    def there(self, unit: Unit) -> Int64Array:
        """What may be kept of each group."""
        return self.there_rows if unit == "rows" else self.there_tokens

    def any(self, *bounds: str) -> bool:
        """Whether a rule has one of these bounds."""
        return any(getattr(rule.quota, bound) is not None for rule in self.rules for bound in bounds)


@dataclass(frozen=True, slots=True)
class Filled:
    """What was taken."""

    rows: int
    tokens: int
    total: int | None
    """What fractions were taken of, at least; None where there are none."""
    exact: bool
    """False: `total` is larger than what was taken, by at most a row for each group with a largest fraction."""


def fill_order(read: Callable[[], Iterator[Records]], partitions: Sequence[Partition], limits: Sequence[Limit], *,
               rows: int, tokens: int, largest: int, unit: Unit, folder: Path) -> tuple[Filled, Path]:  # fmt: skip
    """Decide on every row of an order.

    Parameters
    ----------
    read
        Gives the rows in order, as often as it is called: records with `tokens` and, for each partition, the group.
    partitions
        In the order in which they are asked; `count` has seen all rows.
    limits
        The budget, in the order in which its parts are asked.
    rows, tokens, largest
        Of all rows: their number, their tokens, the tokens of the largest.
    unit
        What fractions are of.
    folder
        Local folder; 3 bytes a row.

    Returns
    -------
    Filled, and a file with a uint16 for every row in order: 0 where it is taken, else the code of what dropped it.

    Raises
    ------
    SelectionError
        A minimum cannot be met, or fractions leave nothing.
    """
    filler = _Filler(read, partitions, limits, unit=unit, folder=folder)
    budget = min([limit.most for limit in limits if limit.unit == unit], default=_NO_LIMIT)
    goal = min(budget, rows if unit == "rows" else tokens)
    if not goal or not any(partition.any("min_fraction", "max_fraction") for partition in partitions):
        return filler.attempt(_NO_LIMIT, _NO_LIMIT), filler.codes
    for partition in partitions:
        goal = _reachable(partition, goal, unit)
    if unit == "rows":
        goal = min((_rounded(partition, goal) for partition in partitions), default=goal)
    return filler.settle(goal, row=1 if unit == "rows" else largest), filler.codes


class _Bounds:
    """The bounds of a partition's groups for one total, and what is used of them."""

    def __init__(self, partition: Partition, unit: Unit) -> None:
        self.partition, self.kind, self._unit = partition, partition.kind, unit
        self.most_rows, self.least_rows = self._of("max_rows", _NO_LIMIT), self._of("min_rows", 0)
        self.code_rows, self.code_units = self._codes("code_rows"), self._codes("code_fraction")
        self.reset(0, 0)

    def reset(self, low: int, high: int) -> None:
        """Nothing is used; fractions are of a total between these two."""
        self.most_units = self._of("max_fraction", _NO_LIMIT, lambda part: part * low // 1)
        self.least_units = self._of("min_fraction", 0, lambda part: -(-part * high // 1))
        self.rows, self.units = np.zeros_like(self.most_rows), np.zeros_like(self.most_rows)
        self.closed = np.zeros(len(self.rows), np.uint16)
        self.ended = np.full(len(self.rows), _NO_LIMIT)

    def _of(self, name: str, otherwise: int, amount: Callable[[Fraction], Any] = lambda number: number) -> Int64Array:
        """A bound of each group."""
        found = [getattr(rule.quota, name) for rule in self.partition.rules]
        # in decimal, as it was written: 0.29 of 100 rows are 29, and 28 in binary floating point
        each = [otherwise if number is None else int(amount(Fraction(str(number)))) for number in found]
        return np.array([*each, otherwise], np.int64)[self.partition.rule_of]

    def _codes(self, name: str) -> Codes:
        return np.array([*(getattr(rule, name) for rule in self.partition.rules), 0], np.uint16)[self.partition.rule_of]

    def are_bound(self) -> npt.NDArray[np.bool_]:
        """Groups with rows and a largest fraction."""
        return (self.most_units < _NO_LIMIT) & (self.partition.there_rows > 0)

    def need(self, groups: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Whether groups are below their least."""
        below = self.rows[groups] < self.least_rows[groups]
        return np.asarray(below | (self.units[groups] < self.least_units[groups]))

    def are_full(self, groups: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
        """Whether groups take no further row."""
        full = self.rows[groups] >= self.most_rows[groups]
        return np.asarray(full | (self.units[groups] >= self.most_units[groups]))


class _Filler:
    """Goes through the order, again and again where it must."""

    def __init__(self, read: Callable[[], Iterator[Records]], partitions: Sequence[Partition],
                 limits: Sequence[Limit], *, unit: Unit, folder: Path) -> None:  # fmt: skip
        self._read, self._limits, self._unit = read, list(limits), unit
        self._bounds = [_Bounds(partition, unit) for partition in partitions]
        self._reserved = folder / "reserved"
        self.codes = folder / "codes"

    def settle(self, goal: int, *, row: int) -> Filled:
        """Find a total that the bounds leave as it is. `row`: the largest step in which it can change."""
        slack = 0 if self._unit == "rows" else row
        near = row * (1 + sum(int(bounds.are_bound().sum()) for bounds in self._bounds))
        low = high = goal
        first: tuple[int, int] | None = None
        for number in range(_ATTEMPTS):
            filled = self.attempt(low, high)
            kept = self._used(filled)
            if not kept:
                break
            if kept >= low:
                self._refuse_unmet(kept)
                return filled
            if first is None and low - kept <= near:
                first = low, high
            if first is not None and (number >= _EXACT_ATTEMPTS or kept < first[0] - _EXACT_ATTEMPTS * near):
                filled = self.attempt(*first)
                self._refuse_unmet(self._used(filled))
                return Filled(filled.rows, filled.tokens, first[0], exact=False)
            low, high = kept, min(high, kept + slack)
        named = " and ".join(dict.fromkeys(f"selection.per_{bounds.kind}" for bounds in self._bounds))
        raise SelectionError(
            f"{named}: the fractions allow no total at all, given what there is: with at most {goal:,} {self._unit} "
            "each total leaves less than itself; raise a max_fraction"
        )

    def attempt(self, low: int, high: int) -> Filled:
        """Both steps for one total; writes the codes."""
        for bounds in self._bounds:
            bounds.reset(low, high)
        limits = self._limits
        if high < min([limit.most for limit in limits if limit.unit == self._unit], default=_NO_LIMIT):
            limits = [*limits, Limit(self._total_code(), self._unit, high, "")]
        pass_ = _Pass(self._bounds, limits, self._unit)
        reserving = any((bounds.least_rows > 0).any() or (bounds.least_units > 0).any() for bounds in self._bounds)
        if reserving:
            self._reserve(pass_)
        with self.codes.open("wb") as codes:
            for records, reserved in self._pieces(reserving=reserving):
                pass_.fill(records, reserved).tofile(codes)
        fractions = any(bounds.partition.any("min_fraction", "max_fraction") for bounds in self._bounds)
        return Filled(pass_.rows, pass_.tokens, low if fractions else None, exact=True)

    def _total_code(self) -> int:
        """What drops a row that would make the total larger than the bounds allow."""
        own = [limit.code for limit in self._limits if limit.unit == self._unit]
        rules = [rule for bounds in self._bounds for rule in bounds.partition.rules]
        fractions = [
            rule for rule in rules if rule.quota.max_fraction is not None or rule.quota.min_fraction is not None
        ]
        return (own or [rule.code_fraction for rule in fractions])[0]

    def _reserve(self, pass_: _Pass) -> None:
        with self._reserved.open("wb") as file:
            for records in self._read():
                pass_.reserve(records).tofile(file)
        self._refuse_unmet(None)
        for limit in self._limits:
            used = pass_.used(limit.unit)
            if used > limit.most:
                raise SelectionError(
                    f"the minima of {self._named_minima()} reserve {used:,} {limit.unit}, {limit.text} allows "
                    f"{limit.most:,}; lower them or raise the budget"
                )

    def _named_minima(self) -> str:
        kinds = [bounds.kind for bounds in self._bounds if bounds.partition.any("min_rows", "min_fraction")]
        return " and ".join(f"selection.per_{kind}" for kind in kinds)

    def _pieces(self, *, reserving: bool) -> Iterator[tuple[Records, npt.NDArray[np.bool_]]]:
        if not reserving:
            for records in self._read():
                yield records, np.zeros(len(records), np.bool_)
            return
        with self._reserved.open("rb") as file:
            for records in self._read():
                yield records, np.fromfile(file, np.bool_, len(records))

    def _used(self, filled: Filled) -> int:
        return filled.rows if self._unit == "rows" else filled.tokens

    def _refuse_unmet(self, total: int | None) -> None:
        """Refuse minima that are not met: those in rows, or with a total those in fractions of it."""
        for bounds in self._bounds:
            have, least = bounds.rows, bounds.least_rows
            if total is not None:
                have, least = bounds.units, bounds._of("min_fraction", 0, lambda part: -(-part * total // 1))
            for group in np.flatnonzero(have < least)[:1].tolist():
                raise SelectionError(self._unmet(bounds, group, int(least[group]), total))

    def _unmet(self, bounds: _Bounds, group: int, least: int, total: int | None) -> str:
        partition = bounds.partition
        rule, name = partition.rules[partition.rule_of[group]], partition.names[group]
        have, unit = (bounds.rows, "rows") if total is None else (bounds.units, self._unit)
        there = int(partition.there("rows" if total is None else self._unit)[group])
        wanted, key, remedy = f"{least:,} {unit} of", "min_rows", "lower it"
        if total is not None:
            part = Fraction(str(rule.quota.min_fraction))
            wanted, key = f"{rule.quota.min_fraction:g} of {total:,} {unit}, that is {least:,}, of", "min_fraction"
            remedy = f"lower it, or keep at most {int(have[group] / part):,} {unit}"
        left = f"{there:,} are left after the steps before"
        if have[group] < there:
            left += f", and other bounds allow {int(have[group]):,} of them"
        return (
            f"{rule.text}.{key} asks for at least {wanted} {partition.kind} '{name}'; {left}. Loosen what is above "
            f"it, or {remedy}"
        )


class _Pass:
    """One time through the order; of each group and of all, what is taken."""

    def __init__(self, bounds: Sequence[_Bounds], limits: Sequence[Limit], unit: Unit) -> None:
        self._bounds, self._limits, self._unit = bounds, limits, unit
        self.rows = self.tokens = 0
        self._full = 0
        """Code of the budget that is used up."""
        self._ends = 0
        """Groups that have ended."""

    def used(self, unit: Unit) -> int:
        """Of all rows that were taken."""
        return self.rows if unit == "rows" else self.tokens

    def reserve(self, records: Records) -> npt.NDArray[np.bool_]:
        """Rows that their groups' minima need."""
        reserved = np.zeros(len(records), np.bool_)
        self._reserve(records, reserved, 0, len(records))
        return reserved

    def _reserve(self, records: Records, reserved: npt.NDArray[np.bool_], start: int, stop: int) -> None:
        part = records[start:stop]
        needed = np.zeros(len(part), np.bool_)
        barred = np.zeros(len(part), np.bool_)
        for bounds in self._bounds:
            groups = part[bounds.kind]
            needed |= bounds.need(groups)
            barred |= bounds.are_full(groups)
        rows = start + np.flatnonzero(needed & ~barred)
        if not len(rows):
            return
        if self._all_needed(records[rows]):
            self._take(records[rows])
            reserved[rows] = True
        elif stop - start <= _SMALL:
            for row in rows.tolist():
                one = records[row : row + 1]
                if self._is_needed(one) and self._fits_groups(one):
                    self._take(one)
                    reserved[row] = True
        else:
            middle = (start + stop) // 2
            self._reserve(records, reserved, start, middle)
            self._reserve(records, reserved, middle, stop)

    def _is_needed(self, one: Records) -> bool:
        return any(bool(bounds.need(one[bounds.kind])[0]) for bounds in self._bounds)

    def _all_needed(self, records: Records) -> bool:
        """Whether each of these rows fits and is needed when its turn comes: no group that needs some gets more."""
        for bounds in self._bounds:
            groups, rows, units = self._sums(bounds, records)
            rows, units = bounds.rows[groups] + rows, bounds.units[groups] + units
            enough = (rows > bounds.least_rows[groups]) & (units > bounds.least_units[groups])
            if (enough & bounds.need(groups)).any():
                return False
        return self._fits_groups(records)

    def fill(self, records: Records, reserved: npt.NDArray[np.bool_]) -> Codes:
        """Codes of these rows; 0 for those that are taken and those that were before."""
        codes = np.zeros(len(records), np.uint16)
        rows = np.flatnonzero(~reserved)
        if len(self._bounds) > 1:
            self._fill(records, codes, rows)
        else:
            self._fill_alone(records, codes, rows)
        return codes

    def _fill_alone(self, records: Records, codes: Codes, rows: Int64Array) -> None:
        """With one partition: what one group gets does not depend on what others get."""
        rows = self._open(records, codes, rows)
        if not len(rows):
            return
        part = records[rows]
        over_rows = over = np.zeros(len(rows), np.bool_)
        for bounds in self._bounds:
            over_rows, over = _exceeding(bounds, part, self._sizes(part))
        over_budget, code = self._over_budget(part, ~over)
        self._take(part[:over_budget][~over[:over_budget]])
        for bounds in self._bounds:
            ends = np.flatnonzero(over[:over_budget])
            groups, first = np.unique(part[bounds.kind][ends], return_index=True)
            by_rows = over_rows[ends[first]]
            bounds.closed[groups] = np.where(by_rows, bounds.code_rows[groups], bounds.code_units[groups])
            bounds.ended[groups] = 0
            codes[rows] = np.where(over, bounds.closed[part[bounds.kind]], 0)
        if over_budget < len(rows):
            self._full = code
            late = rows[over_budget:]
            codes[late] = 0
            self._open(records, codes, late)

    def _over_budget(self, part: Records, fits: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """The first row that would exceed the budget, and its code; the number of rows where none does."""
        found = len(part), 0
        for limit in reversed(self._limits):
            sizes = fits if limit.unit == "rows" else np.where(fits, part["tokens"], 0)
            total = self.used(limit.unit) + np.cumsum(sizes, dtype=np.int64)
            place = int(np.searchsorted(total, limit.most, side="right"))
            if place <= found[0] and place < len(part):
                found = place, limit.code
        return found

    def _fill(self, records: Records, codes: Codes, rows: Int64Array) -> None:
        """With several partitions: rows that all fit are taken together, others half by half."""
        many = len(rows)
        rows = self._open(records, codes, rows)
        if not len(rows):
            return
        part = records[rows]
        if self._fits_groups(part) and self._fits_budget(part):
            self._take(part)
        elif many <= _SMALL:
            for row in rows.tolist():
                codes[row] = self._one(records[row : row + 1])
        else:
            middle = len(rows) // 2
            self._fill(records, codes, rows[:middle])
            self._fill(records, codes, rows[middle:])

    def _one(self, one: Records) -> int:
        """Take a row, or end what it would exceed; its code."""
        size = int(self._sizes(one)[0])
        code = np.zeros(1, np.uint16)
        if not len(self._open(one, code, np.zeros(1, np.int64))):
            return int(code[0])
        for bounds in self._bounds:
            group = int(one[bounds.kind][0])
            if bounds.rows[group] + 1 > bounds.most_rows[group]:
                bounds.closed[group] = bounds.code_rows[group]
            elif bounds.units[group] + size > bounds.most_units[group]:
                bounds.closed[group] = bounds.code_units[group]
            if bounds.closed[group]:
                self._ends += 1
                bounds.ended[group] = self._ends
                return int(bounds.closed[group])
        place, full = self._over_budget(one, np.ones(1, np.bool_))
        if place == 0:
            self._full = full
        else:
            self._take(one)
        return self._full

    def _open(self, records: Records, codes: Codes, rows: Int64Array) -> Int64Array:
        """Those of the rows that nothing bars yet; the others get the codes of what ended first."""
        ended = np.full(len(rows), _NO_LIMIT)
        codes[rows] = self._full
        for bounds in self._bounds:
            groups = records[bounds.kind][rows]
            earlier = bounds.ended[groups] < ended
            codes[rows[earlier]] = bounds.closed[groups[earlier]]
            ended = np.minimum(ended, bounds.ended[groups])
        return rows[:0] if self._full else rows[ended == _NO_LIMIT]

    def _fits_groups(self, records: Records) -> bool:
        for bounds in self._bounds:
            groups, rows, units = self._sums(bounds, records)
            if (bounds.rows[groups] + rows > bounds.most_rows[groups]).any():
                return False
            if (bounds.units[groups] + units > bounds.most_units[groups]).any():
                return False
        return True

    def _fits_budget(self, records: Records) -> bool:
        sums = {"rows": self.rows + len(records), "tokens": self.tokens + int(records["tokens"].sum(dtype=np.int64))}
        return all(sums[limit.unit] <= limit.most for limit in self._limits)

    def _take(self, records: Records) -> None:
        for bounds in self._bounds:
            groups, rows, units = self._sums(bounds, records)
            bounds.rows[groups] += rows
            bounds.units[groups] += units
        self.rows += len(records)
        self.tokens += int(records["tokens"].sum(dtype=np.int64))

    def _sizes(self, records: Records) -> Int64Array:
        return np.ones(len(records), np.int64) if self._unit == "rows" else records["tokens"].astype(np.int64)

    def _sums(self, bounds: _Bounds, records: Records) -> tuple[Int64Array, Int64Array, Int64Array]:
        return _sums(records[bounds.kind], self._sizes(records), len(bounds.rows))


def _sums(groups: npt.NDArray[np.uint32], sizes: npt.NDArray[np.integer[Any]], count: int,
          ) -> tuple[Int64Array, Int64Array, Int64Array]:  # fmt: skip
    """The groups that occur, their rows and their sizes; sums are exact up to 2⁵³."""
    if count <= _DENSE * len(groups):
        rows = np.bincount(groups, minlength=count)
        found = np.flatnonzero(rows)
        return found, rows[found], np.bincount(groups, weights=sizes, minlength=count)[found].astype(np.int64)
    found, inverse = np.unique(groups, return_inverse=True)
    return found.astype(np.int64), np.bincount(inverse), np.bincount(inverse, weights=sizes).astype(np.int64)


def _exceeding(bounds: _Bounds, part: Records, sizes: Int64Array,
               ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:  # fmt: skip
    """Rows that exceed the most rows of their group, and those that exceed its most of anything."""
    groups = part[bounds.kind]
    order = np.argsort(groups, kind="stable")
    sums, begins = np.cumsum(sizes[order]), np.flatnonzero(np.diff(groups[order], prepend=-1))
    lengths = np.diff(begins, append=len(order))
    rows, units = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    rows[order] = np.arange(len(order)) - np.repeat(begins, lengths) + 1
    units[order] = sums - np.repeat(sums[begins] - sizes[order][begins], lengths)
    over_rows = bounds.rows[groups] + rows > bounds.most_rows[groups]
    return over_rows, over_rows | (bounds.units[groups] + units > bounds.most_units[groups])


def _reachable(partition: Partition, most: int, unit: Unit) -> int:
    """The largest total within `most` that the largest fractions of a partition's groups can make up."""
    if not partition.any("max_fraction"):
        return most
    there = partition.there(unit)
    parts: list[tuple[Fraction, Int64Array, Int64Array]] = []
    for number in range(-1, len(partition.rules)):
        quota = partition.rules[number].quota if number >= 0 else Quota()
        amounts = there[partition.rule_of == number]
        if unit == "rows" and quota.max_rows is not None:
            amounts = np.minimum(amounts, quota.max_rows)
        amounts = np.sort(amounts[amounts > 0])
        fraction = Fraction(1) if quota.max_fraction is None else Fraction(str(quota.max_fraction))
        parts.append((fraction, amounts, np.concatenate([[0], np.cumsum(amounts)])))

    def fluid(total: int) -> Fraction:
        found = Fraction(0)
        for fraction, amounts, sums in parts:
            below = int(np.searchsorted(amounts, fraction * total // 1, side="right"))
            found += int(sums[below]) + (len(amounts) - below) * fraction * total
        return found

    low, high = 0, most  # fluid(0) ≥ 0, and what is above the largest fixed point stays above
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fluid(middle) >= middle else (low, middle - 1)
    if low == 0:
        raise SelectionError(
            f"selection.per_{partition.kind}: the largest fractions of all {partition.kind}s that have rows left "
            f"({int((there > 0).sum()):,}) add up to {float(fluid(1)):.4g} of what is kept, so nothing can be; raise "
            "max_fraction to 1 in all, or more"
        )
    return _fixed(parts, low) if unit == "rows" else low


def _fixed(parts: Sequence[tuple[Fraction, Int64Array, Int64Array]], total: int) -> int:
    """The largest total, at most `total`, that whole rows can make up; 0 if none can."""
    while True:
        found = 0
        for fraction, amounts, sums in parts:
            most = int(fraction * total // 1)
            below = int(np.searchsorted(amounts, most, side="right"))
            found += int(sums[below]) + (len(amounts) - below) * most
        if found >= total:
            return total
        total = found  # sums grow with totals, so no total between the two can be made up either


def _rounded(partition: Partition, total: int) -> int:
    """The largest total, a little below, whose smallest fractions in whole rows add up to no more than it has."""
    if not partition.any("min_fraction"):
        return total
    bounds = _Bounds(partition, "rows")
    for each in range(total, max(0, total - _ROUNDING), -1):
        bounds.reset(each, each)
        if int(np.maximum(bounds.least_rows, bounds.least_units).sum()) <= each:
            return each
    return total


__all__ = ["NO_GROUP", "PIECE_ROWS", "Filled", "Limit", "Partition", "Rule", "Unit", "fill_order"]
