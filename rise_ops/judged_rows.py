"""Rows by which a person judges a selection: its ends, both sides of its cut, and what each rule took.

Chosen by streaming passes over a run's decisions; only the chosen rows are held, and the blocks of their texts are
read one after another. Columns and rows that a run does not have are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from rise_ops.corpus import read_block
from rise_ops.report_data import WAITING, find_cut
from rise_ops.report_rows import largest_groups
from rise_ops.runs import decisions_key
from rise_ops.store import Store

ROWS = 10
"""At each end of the corpus."""
BESIDE = 5
"""On each side of the cut."""
OF_A_RULE = 3
GROUPS = 5
MEMBERS = 4
"""Dropped rows shown of a group of near-duplicates."""
TEXT_CHARACTERS = 2_000

_COLUMNS = ("doc_id", "value", "value_error", "rank", "kept", "reason", "rule", "label", "source_uri", "source_row")
_PLACE = ("block_id", "block_row")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Group:
    """Near-duplicates: how many there are, the row that stayed, and some that went."""

    size: int
    stayed: pl.DataFrame
    dropped: pl.DataFrame


@dataclass(slots=True)
class _Chosen:
    best: pl.DataFrame
    worst: pl.DataFrame
    last_kept: pl.DataFrame
    first_dropped: pl.DataFrame
    by_reason: dict[str, pl.DataFrame] = field(default_factory=dict)
    groups: list[_Group] = field(default_factory=list)

    def frames(self) -> Iterable[pl.DataFrame]:
        yield from (self.best, self.worst, self.last_kept, self.first_dropped, *self.by_reason.values())
        for group in self.groups:
            yield from (group.stayed, group.dropped)


def judged_rows(store: Store, run_id: str) -> Json:
    """The rows of a run by which it is judged, with their texts, in the form of `rise_ops.examples`.

    Raises
    ------
    MissingObjectError, IntegrityError, StoreError, TransientError
    """
    key = decisions_key(run_id)
    chosen = store.collected(key, lambda: _choose(store.scan_parquet([key])))
    texts = _texts(store, chosen.frames())

    def rows(frame: pl.DataFrame) -> list[Json]:
        return [
            {name: row[name] for name in _COLUMNS if name in row} | {"text": texts[row["block_id"], row["block_row"]]}
            for row in frame.iter_rows(named=True)
        ]

    groups = [
        {"size": group.size, "stayed": rows(group.stayed)[0], "dropped": rows(group.dropped)} for group in chosen.groups
    ]
    return {
        "best": rows(chosen.best),
        "worst": rows(chosen.worst),
        "cut": {"kept": rows(chosen.last_kept), "dropped": rows(chosen.first_dropped)},
        "dropped": {reason: rows(frame) for reason, frame in chosen.by_reason.items()},
        "near_duplicates": groups,
    }


def _choose(decisions: pl.LazyFrame) -> _Chosen:
    present = decisions.collect_schema().names()
    decisions = decisions.select(
        *[name for name in (*_COLUMNS, *_PLACE) if name in present],
        *(["duplicate_of"] if "duplicate_of" in present else []),
    ).with_columns(pl.col("rank").cast(pl.Int64))
    valued = decisions.filter(pl.col("value").is_not_null())
    cut = find_cut(decisions)
    waiting = decisions.filter(pl.col("reason").is_in(WAITING) & pl.col("rank").is_not_null())
    usual = decisions.filter(pl.col("kept") & (pl.col("rank") <= (cut.rank or 0)))
    chosen = _Chosen(
        best=_top(valued, ROWS),
        worst=valued.bottom_k(ROWS, by=["value", "rank"], reverse=[False, True])
        .collect(engine="streaming")
        .sort("value", "rank", descending=[False, True]),
        last_kept=usual.top_k(BESIDE, by="rank").collect(engine="streaming").sort("rank"),
        first_dropped=waiting.bottom_k(BESIDE, by="rank").collect(engine="streaming").sort("rank"),
    )
    there = decisions.select(pl.col("reason").unique()).collect(engine="streaming")["reason"].to_list()
    for reason in sorted(set(there) - {"kept", "no_prediction", *WAITING}):
        chosen.by_reason[reason] = _top(valued.filter(pl.col("reason") == reason), OF_A_RULE)
    for leader in largest_groups(decisions, GROUPS):
        chosen.groups.append(_group(decisions, leader))
    return chosen


def _top(rows: pl.LazyFrame, count: int) -> pl.DataFrame:
    """The best rows; of equal ones those of the better rank."""
    best = rows.top_k(count, by=["value", "rank"], reverse=[False, True]).collect(engine="streaming")
    return best.sort("value", "rank", descending=[True, False], nulls_last=True)


def _group(decisions: pl.LazyFrame, leader: str) -> _Group:
    members = decisions.filter(pl.col("duplicate_of") == leader)
    # the text may stand in the corpus more than once: the copy that stayed is the one that is no duplicate
    copies = decisions.filter((pl.col("doc_id") == leader) & (pl.col("reason") != "near_duplicate"))
    size = members.select(pl.len()).collect(engine="streaming").item()
    return _Group(1 + size, _top(copies, 1), _top(members, MEMBERS))


def _texts(store: Store, frames: Iterable[pl.DataFrame]) -> dict[tuple[str, int], str]:
    """Beginnings of the rows' texts by place; each block is read once."""
    places = pl.concat([frame.select(_PLACE) for frame in frames]).unique()
    found: dict[tuple[str, int], str] = {}
    for (block,), rows in places.group_by("block_id"):
        texts = read_block(store, str(block), columns=["text"])["text"]
        found |= {(str(block), row): texts[row][:TEXT_CHARACTERS] for row in rows["block_row"].to_list()}
    return found
