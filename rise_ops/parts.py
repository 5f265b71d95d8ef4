"""Parts: runs of consecutive blocks that are scored together, cut by content and named by content.

A part ends with a block whose id, read as an integer, has its low two bits zero (every fourth block on average),
and after eight blocks at the latest. So one changed block changes the part that it is in, or two, wherever it
stands, and all other parts keep their names and their scores.

    valuation_id = sha256 of canonical_json([format version, index_id, [[target, target_id], …] sorted, aggregate])
    part_id      = sha256 of canonical_json(block ids, in order)

    scores/<valuation_id>/<part_id>.extremes.parquet   each query's highest and lowest rows
    scores/<valuation_id>/<part_id>.parquet            the scores (`rise_ops.valuation`)
    scores/<valuation_id>/<part_id>.json               rows, and the checksums of both; written last

A part is there when all three are. Files hold no position in the corpus, so a part is scored once for every corpus
that has its blocks in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rise_ops.hashing import fingerprint
from rise_ops.store import Store

SCORES_FORMAT = 2
"""Raised when the same blocks and targets would give other files."""
MAX_BLOCKS = 8

_MASK = 3


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive blocks of a corpus."""

    folder: str
    """Of the valuation, in the store."""
    part_id: str
    first_block: int
    """Position of the first block in the corpus' order of blocks."""
    blocks: tuple[str, ...]

    @property
    def scores(self) -> str:
        """Key of the scores."""
        return f"{self.folder}/{self.part_id}.parquet"

    @property
    def record(self) -> str:
        """Key of the completion record."""
        return f"{self.folder}/{self.part_id}.json"

    @property
    def extremes(self) -> str:
        """Key of each query's highest and lowest rows."""
        return f"{self.folder}/{self.part_id}.extremes.parquet"


def valuation_id(index_id: str, targets: Mapping[str, str], aggregate: str) -> str:
    """Identity of a valuation: what, beside the blocks, decides on their scores.

    Parameters
    ----------
    targets
        Target name to target id.
    """
    return fingerprint([SCORES_FORMAT, index_id, sorted(targets.items()), aggregate])


def valuation_folder(valuation: str) -> str:
    """Where the parts of a valuation are in the store."""
    return f"scores/{valuation}"


def part_of(valuation: str, blocks: Sequence[str], first_block: int) -> Part:
    """The part of these blocks."""
    return Part(valuation_folder(valuation), fingerprint(list(blocks)), first_block, tuple(blocks))


def cut_parts(valuation: str, blocks: Iterable[str]) -> list[Part]:
    """All parts of a corpus with these blocks, in order.

    Parts that are cut out and put together in their order are cut the same way again.
    """
    parts: list[Part] = []
    held: list[str] = []
    first = 0
    for block_id in blocks:
        held.append(block_id)
        if len(held) == MAX_BLOCKS or int(block_id[-1], 16) & _MASK == 0:
            parts.append(part_of(valuation, held, first))
            first, held = first + len(held), []
    return [*parts, part_of(valuation, held, first)] if held else parts


def missing_parts(store: Store, parts: Sequence[Part]) -> list[Part]:
    """Those that the store lacks, by one listing.

    Raises
    ------
    StoreError, TransientError
    """
    there: set[str] = set()
    for folder in {part.folder for part in parts}:
        there.update(key for key, _ in store.list(folder))
    return [part for part in parts if not there.issuperset((part.scores, part.extremes, part.record))]
