"""Single rows that the report draws: a sample for the plane of two scores, and the rows next to the cut.

A sample is the rows of the smallest `doc_id`s: hashes of their content, so the sample is even over the corpus, the
same on every machine, and hardly moves when the corpus grows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from rise_ops.report_data import SCORE, WAITING, Cut

SAMPLED = 1_500
BESIDE = 60
"""Rows drawn around the cut."""
_REACH = 4.0
"""Standard errors from the cut within which they are."""
GROUP_SIZES = ((2, 2), (3, 3), (4, 5), (6, 10), (11, None))
_GROUPS_AT_ONCE = 4_000_000
"""Near-duplicates whose groups are counted in one pass: 16 bytes and a hash table's room each."""
# not strict: a scan may look at rows that have none before it leaves them out
_LEADER = pl.col("duplicate_of").str.head(16).str.to_integer(base=16, dtype=pl.UInt64, strict=False)


@dataclass(frozen=True, slots=True)
class Plane:
    """Rows by their scores on two targets."""

    x: str
    y: str
    kept: tuple[tuple[float, float], ...]
    dropped: tuple[tuple[float, float], ...]
    rows: int
    """Rows that have both scores; more than are shown where they were sampled."""

    @property
    def shown(self) -> int:
        """Rows that are drawn."""
        return len(self.kept) + len(self.dropped)


@dataclass(frozen=True, slots=True)
class Beside:
    """Rows whose value is within a few standard errors of the cut, by falling value: a sample of them."""

    values: tuple[float, ...]
    errors: tuple[float, ...]
    kept: tuple[bool, ...]
    rows: int
    """All such rows."""
    unsure_kept: int
    """Kept rows, of all, whose value is less than two standard errors above the cut."""
    unsure_dropped: int
    """Rows that only the budget or a threshold dropped, less than two standard errors below it."""


@dataclass(frozen=True, slots=True)
class NearDuplicateGroups:
    """Rows that went because a better one is nearly the same."""

    groups: int
    dropped: int
    largest: int
    """Rows of the largest group, the one that stayed among them."""
    sizes: tuple[tuple[str, int, int], ...]
    """Size of a group, groups of this size, rows dropped from them."""


def plane(decisions: pl.LazyFrame, x: str, y: str) -> Plane:
    """A sample of the rows by two targets' scores."""
    names = [f"{SCORE}{x}", f"{SCORE}{y}"]
    both = decisions.filter(pl.all_horizontal(pl.col(name).is_finite() for name in names))
    rows = both.select(pl.len()).collect(engine="streaming").item()
    # three times the sample's share of all hashes: enough for certain, and never all rows
    bound = min(16**8 - 1, int(16**8 * 3 * SAMPLED / max(rows, 1)))
    few = both.filter(pl.col("doc_id") < f"{bound:08x}") if rows > 3 * SAMPLED else both
    sample = few.select("doc_id", "kept", *names).bottom_k(SAMPLED, by="doc_id").collect(engine="streaming")
    kept, dropped = (
        tuple((round(a, 6), round(b, 6)) for a, b in sample.filter(pl.col("kept") == fate).select(names).iter_rows())
        for fate in (True, False)
    )
    return Plane(x, y, kept, dropped, rows)


def beside_the_cut(decisions: pl.LazyFrame, cut: Cut) -> Beside | None:
    """Rows around the cut with the standard errors of their values, where the run estimated them."""
    if cut.value is None or "value_error" not in decisions.collect_schema().names():
        return None
    value, error = pl.col("value").cast(pl.Float64), pl.col("value_error").cast(pl.Float64)
    known = decisions.filter(value.is_finite() & error.is_finite() & (error > 0))
    open_ = known.filter(pl.col("kept") | pl.col("reason").is_in(WAITING))
    off = (value - cut.value) / error
    counted = open_.select(
        (off.abs() < _REACH).cast(pl.Int64).sum().alias("near"),
        (pl.col("kept") & off.is_between(0, 2)).cast(pl.Int64).sum().alias("kept"),
        (~pl.col("kept") & off.is_between(-2, 0)).cast(pl.Int64).sum().alias("dropped"),
    )
    near, kept, dropped = counted.collect(engine="streaming").row(0)
    if not near:
        return None
    sample = open_.filter(off.abs() < _REACH).bottom_k(BESIDE, by="doc_id").select(value, error, "kept")
    rows = sample.collect(engine="streaming").sort("value", descending=True)
    values, errors, fates = (tuple(rows[name].to_list()) for name in ("value", "value_error", "kept"))
    return Beside(values, errors, fates, near, kept, dropped)


def near_duplicate_groups(decisions: pl.LazyFrame) -> NearDuplicateGroups | None:
    """Number and sizes of the groups of near-duplicates, where the run looked for them."""
    if "duplicate_of" not in decisions.collect_schema().names():
        return None
    gone = decisions.filter(pl.col("reason") == "near_duplicate")
    dropped = gone.select(pl.len()).collect(engine="streaming").item()
    if not dropped:
        return None
    counted = [
        groups.group_by(size=pl.col("dropped") + 1).agg(pl.len().alias("groups")).collect(engine="streaming")
        for groups in _grouped(gone, dropped)
    ]
    sizes = pl.concat(counted).group_by("size").agg(pl.col("groups").sum()).sort("size")
    return NearDuplicateGroups(
        groups=int(sizes["groups"].sum()), dropped=dropped, largest=int(sizes["size"][-1]), sizes=_by_size(sizes)
    )


def largest_groups(decisions: pl.LazyFrame, count: int) -> list[str]:
    """`doc_id` of the rows that stayed for most near-duplicates, the most first."""
    if "duplicate_of" not in decisions.collect_schema().names():
        return []
    gone = decisions.filter(pl.col("reason") == "near_duplicate")
    dropped = gone.select(pl.len()).collect(engine="streaming").item()
    if not dropped:
        return []
    found = [
        groups.top_k(count, by=["dropped", "leader"]).collect(engine="streaming") for groups in _grouped(gone, dropped)
    ]
    largest = pl.concat(found).top_k(count, by=["dropped", "leader"])["leader"]
    named = gone.filter(_LEADER.is_in(largest.to_list())).group_by("duplicate_of").len().collect(engine="streaming")
    return named.sort("len", "duplicate_of", descending=[True, False])["duplicate_of"].to_list()


def _grouped(gone: pl.LazyFrame, dropped: int) -> Iterator[pl.LazyFrame]:
    """`leader` (the first 8 bytes of its `doc_id`) and `dropped` rows of each group, some groups at a time."""
    passes = -(-dropped // _GROUPS_AT_ONCE)
    leaders = gone.select(leader=_LEADER)
    for number in range(passes):
        yield leaders.filter(pl.col("leader") % passes == number).group_by("leader").agg(pl.len().alias("dropped"))


def _by_size(sizes: pl.DataFrame) -> tuple[tuple[str, int, int], ...]:
    found: list[tuple[str, int, int]] = []
    for low, high in GROUP_SIZES:
        some = sizes.filter(pl.col("size").is_between(low, high if high is not None else pl.col("size").max()))
        if some.height:
            name = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
            dropped = int((some["groups"].cast(pl.Int64) * (some["size"].cast(pl.Int64) - 1)).sum())
            found.append((name, int(some["groups"].sum()), dropped))
    return tuple(found)


def contrast(weights: dict[str, float], targets: Sequence[str]) -> tuple[str, str] | None:
    """The two targets that tell rows apart best: the largest weight against the smallest, else the first two."""
    if len(targets) < 2:
        return None
    ordered = sorted(targets, key=lambda name: -weights.get(name, 0.0))
    return ordered[0], ordered[-1]
