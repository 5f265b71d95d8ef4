"""The order in which rows are taken: from the best down, without near-duplicates, at random, or far from each other.

Rows come as records (`RECORD`) in the order of value, a piece at a time, and go on so. A record with a code has been
decided on; it keeps its place among the others and takes no part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.config import DiversityConfig, NearDuplicates, SampleConfig
from rise_ops.progress import Progress
from rise_ops.quotas import Limit
from rise_ops.ranking import KEY, PIECE_ROWS, Records, Sorter, append, read_records, write_records
from rise_ops.sampling import Draw
from rise_ops.scratch import Column
from rise_ops.store import Store

RECORD = np.dtype(
    [*((name, KEY[name]) for name in KEY.names or ()), ("item", "<u8"), ("tokens", "<i4"), ("source", "<u4"),
     ("label", "<u4"), ("rank", "<u4"), ("code", "<u2")]
)  # fmt: skip
"""KEY, then the row's number in the index, tokens, groups, place in the order (0: none yet), code (0: undecided)."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Indexed:
    """The index that holds the rows' signatures."""

    store: Store
    identity: str
    blocks: Sequence[str]
    memory: int
    """Bytes that a search in it may take."""
    folder: Path
    progress: Progress


def with_duplicates(pieces: Iterator[Records], config: NearDuplicates, index: Indexed, priority: Column, *,
                    code: int) -> tuple[Iterator[Records], npt.NDArray[np.int64]]:  # fmt: skip
    """Give rows a code that a better row stands for.

    Of the places of one row of the index the first that takes part is looked at; the others go for it.

    Parameters
    ----------
    priority
        A column of zeros, one for each row of the index.

    Returns
    -------
    The pieces, and for each row of the index the row that stays for it, −1 where it stays itself.
    """
    from rise_ops.near_duplicates import NOT_ELIGIBLE, find_near_duplicates

    path = index.folder / "ranked"
    for start in range(0, len(priority), PIECE_ROWS):
        priority.write(start, np.full(min(PIECE_ROWS, len(priority) - start), NOT_ELIGIBLE))
    for records in pieces:
        append(path, records)
        open_ = records[records["code"] == 0]
        items, first = np.unique(open_["item"], return_index=True)
        ranks = open_["rank"][first].astype(np.uint64)
        priority.put(items, np.minimum(priority.take(items), ranks))
    path.touch()
    leaders = find_near_duplicates(
        index.store, index.identity, index.blocks, priority.array, cosine=config.cosine, recall=config.recall,
        memory=index.memory, folder=index.folder, progress=index.progress,
    )  # fmt: skip

    def coded() -> Iterator[Records]:
        for records in read_records(path, RECORD):
            items = records["item"]
            goes = (leaders[items] >= 0) | (priority.take(items) != records["rank"])
            records["code"] = np.where((records["code"] == 0) & goes, code, records["code"])
            yield records
        path.unlink()

    return coded(), leaders


def sampled(pieces: Iterator[Records], config: SampleConfig, path: Path, *, capacity: int, code: int,
            ) -> Iterator[Records]:  # fmt: skip
    """Rows in the order of a draw, ranked anew; first those that take no part, without a rank."""
    draw = Draw(config)
    sorter = Sorter(path, RECORD, capacity=capacity)
    for records in pieces:
        drawn, chances = draw.keys(records[records["code"] == 0])
        sorter.add(drawn[chances])
        decided = np.concatenate([records[records["code"] != 0], drawn[~chances]])
        decided["code"] = np.where(decided["code"] == 0, code, decided["code"])
        decided["rank"] = 0
        yield decided
    done = 0
    for records in sorter.runs():
        records["rank"] = np.arange(done + 1, done + 1 + len(records))
        done += len(records)
        yield records


def diversified(path: Path, config: DiversityConfig, index: Indexed, limits: Sequence[Limit], *,
                whole: bool) -> None:  # fmt: skip
    """Put the best rows of a file into an order in which each is far from those before it, and rank all anew.

    Looked at are `candidates` times as many of the best rows as the budget could keep without quotas. The rows that
    the budget asks for (whole: all that are looked at) are put in the new order, the others follow by value.
    """
    from rise_ops.diversity import k_center_order

    rows = _affordable(path, limits)
    positions, items = _best(path, -(-Fraction(str(config.candidates)) * rows // 1))
    order = k_center_order(
        index.store, index.identity, index.blocks, items, len(items) if whole else min(rows, len(items)),
        memory=index.memory, folder=index.folder, progress=index.progress,
    )  # fmt: skip
    by_item = np.argsort(items, kind="stable")
    first = positions[by_item[np.searchsorted(items[by_item], order)]]
    _logger.info("diversity: %d of the %d best rows come first", len(first), len(items))
    moved = np.zeros(int(positions[-1]) + 1 if len(positions) else 0, np.bool_)
    moved[first] = True
    target = path.with_name("diverse")
    write_records(target, _ranked(_moved(path, first, moved)))
    target.replace(path)


def _moved(path: Path, first: npt.NDArray[np.int64], moved: npt.NDArray[np.bool_]) -> Iterator[Records]:
    """The records at some positions, then all others."""
    if len(first):
        records = np.memmap(path, RECORD, mode="r")
        for start in range(0, len(first), PIECE_ROWS):
            yield np.array(records[first[start : start + PIECE_ROWS]])
        del records
    start = 0
    for piece in read_records(path, RECORD):
        gone = moved[start : start + len(piece)]
        yield piece[~np.concatenate([gone, np.zeros(len(piece) - len(gone), np.bool_)])]
        start += len(piece)


def _ranked(pieces: Iterator[Records]) -> Iterator[Records]:
    done = 0
    for records in pieces:
        records["rank"] = np.arange(done + 1, done + 1 + len(records))
        done += len(records)
        yield records


def _affordable(path: Path, limits: Sequence[Limit]) -> int:
    """How many of the first records the budget could keep."""
    rows = tokens = 0
    most_rows = min([limit.most for limit in limits if limit.unit == "rows"], default=None)
    most_tokens = min([limit.most for limit in limits if limit.unit == "tokens"], default=None)
    for records in read_records(path, RECORD):
        if most_tokens is not None:
            fits = int(np.searchsorted(tokens + np.cumsum(records["tokens"], dtype=np.int64), most_tokens, "right"))
            rows += fits
            if fits < len(records):
                break
            tokens += int(records["tokens"].sum(dtype=np.int64))
        else:
            rows += len(records)
    return rows if most_rows is None else min(rows, most_rows)


def _best(path: Path, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions and numbers in the index of the first records, each number once."""
    positions, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    start = held = 0
    last: Any = None
    for records in read_records(path, RECORD):
        if held >= count:
            break
        # copies have equal keys, and their places follow each other
        new = np.diff(records["item"].astype(np.int64), prepend=-1 if last is None else int(last)) != 0
        found = np.flatnonzero(new)[: count - held]
        positions.append(start + found)
        items.append(records["item"][found].astype(np.int64))
        start, held, last = start + len(records), held + len(found), records["item"][-1]
    return np.concatenate(positions), np.concatenate(items)
