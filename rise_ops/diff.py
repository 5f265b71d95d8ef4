"""Two states of a corpus compared: what was added, changed, removed, and what stayed, by object, block and row.

Everything is named by content, so only the blocks that one state has and the other has not are looked at, and of
these only the doc_ids.

- **Objects** are compared by uri. Changed: other content (or other ingest settings) under the same uri. One
  that moved counts as removed and as added, and is counted as moved, too.
- **Blocks** and **rows** are compared as multisets, wherever they stand: a row that went from one object to
  another is unchanged. What a changed object lost and what it gained pair up as changed; the rest of both is
  removed and added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import polars as pl

from rise_ops.blocks import read_doc_ids
from rise_ops.corpus import CorpusVersion, current_version, read_snapshot, read_version, version_numbers
from rise_ops.errors import ConfigError, MissingObjectError
from rise_ops.objects import read_rows_doc_ids
from rise_ops.store import Store
from rise_ops.threads import ContextPool

ROW_BYTES = 64
"""Peak bytes of a row while counting."""

_CONNECTIONS = 16
_MEMORY = 2**30


@dataclass(frozen=True, slots=True)
class Change:
    """How many of a kind differ."""

    added: int
    changed: int
    removed: int
    unchanged: int


@dataclass(frozen=True, slots=True)
class CorpusDiff:
    """What leads from one state to another."""

    objects: Change
    moved: int
    """Objects among the added whose content stood under a removed uri."""
    blocks: Change
    rows: Change

    @property
    def rows_new(self) -> int:
        """Rows that the old state did not have."""
        return self.rows.added + self.rows.changed

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class ObjectState:
    """One source object in a state."""

    record: str
    blocks: tuple[str, ...]
    is_small: bool
    """Whether its block is a pack that it shares."""


@dataclass(frozen=True, slots=True)
class CorpusState:
    """One state of a corpus, published or only planned."""

    objects: Mapping[str, ObjectState]
    """By uri."""
    blocks: Counter[str]
    """Blocks with multiplicity."""
    rows_of: Mapping[str, int]
    """Rows of each block."""
    doc_ids: Callable[[str], pl.Series]
    """doc_ids of a block."""
    small_doc_ids: Callable[[str], pl.Series]
    """doc_ids of a small object, by its record."""

    @property
    def rows(self) -> int:
        """Rows of all blocks."""
        return sum(self.rows_of[block] * count for block, count in self.blocks.items())


def published_state(store: Store, version: CorpusVersion) -> CorpusState:
    """A corpus version as a state.

    Raises
    ------
    IntegrityError, MissingObjectError
    """
    snapshot = read_snapshot(store, version.snapshot_id)
    objects = {entry.uri: ObjectState(entry.record, entry.blocks, entry.pack is not None) for entry in version.sources}
    return CorpusState(
        objects=objects,
        blocks=Counter(snapshot["block_id"].to_list()),
        rows_of=dict(snapshot.select("block_id", "rows").iter_rows()),
        doc_ids=lambda block: read_doc_ids(store, block),
        small_doc_ids=lambda record: read_rows_doc_ids(store, record),
    )


def diff_numbers(store: Store, corpus: str, *, old: int | None, new: int | None) -> dict[str, Any]:
    """Compare two versions by number: {corpus, from, to, objects, moved, blocks, rows}.

    Parameters
    ----------
    old
        0: nothing; None: the one before `new`.
    new
        None: the current one.

    Raises
    ------
    ConfigError
        The corpus or a version is not there.
    """
    later = current_version(store, corpus) if new is None else _version(store, corpus, new)
    if later is None:
        known = ", ".join(store.children("corpora")) or "none"
        raise ConfigError(f"{store.uri} has no corpus {corpus}; it has: {known}")
    number = (later.parent or 0) if old is None else old
    earlier = _version(store, corpus, number) if number else None
    found = diff_versions(store, earlier, later, memory=_MEMORY).to_json()
    return {"corpus": corpus, "from": number or None, "to": later.version, **found}


def _version(store: Store, corpus: str, number: int) -> CorpusVersion:
    try:
        return read_version(store, corpus, number)
    except MissingObjectError:
        known = ", ".join(map(str, version_numbers(store, corpus))) or "none"
        raise ConfigError(f"{store.uri} has no version {number} of corpus {corpus}; it has: {known}") from None


def diff_versions(store: Store, old: CorpusVersion | None, new: CorpusVersion, *, memory: int) -> CorpusDiff:
    """Compare two versions; `old` None: nothing.

    Raises
    ------
    IntegrityError, MissingObjectError
    """
    before = published_state(store, old) if old is not None else None
    return diff_states(before, published_state(store, new), memory=memory)


def diff_states(old: CorpusState | None, new: CorpusState, *, memory: int) -> CorpusDiff:
    """Compare two states.

    Parameters
    ----------
    memory
        Bytes that the comparison may take; with less it reads the doc_ids several times.
    """
    if old is None:
        objects, blocks, rows = (Change(count, 0, 0, 0) for count in (len(new.objects), new.blocks.total(), new.rows))
        return CorpusDiff(objects, 0, blocks, rows)
    changed = [uri for uri, now in new.objects.items() if uri in old.objects and old.objects[uri].record != now.record]
    added = [uri for uri in new.objects if uri not in old.objects]
    removed = [uri for uri in old.objects if uri not in new.objects]
    objects = Change(len(added), len(changed), len(removed), len(new.objects) - len(added) - len(changed))
    moved = Counter(new.objects[uri].record for uri in added) & Counter(old.objects[uri].record for uri in removed)
    pairs = [(old.objects[uri], new.objects[uri]) for uri in changed]
    return CorpusDiff(
        objects=objects,
        moved=moved.total(),
        blocks=_diff_blocks(old, new, pairs),
        rows=_diff_rows(old, new, pairs, memory),
    )


def _diff_blocks(old: CorpusState, new: CorpusState, pairs: list[tuple[ObjectState, ObjectState]]) -> Change:
    gained, lost = new.blocks - old.blocks, old.blocks - new.blocks
    paired = 0
    for before, after in pairs:
        if not (before.is_small or after.is_small):
            ours, theirs = _only(after, before), _only(before, after)
            paired += min(ours.total(), theirs.total())
    packs = [{item.blocks for item in state.objects.values() if item.is_small} for state in (old, new)]
    paired += min(len(packs[0] - packs[1]), len(packs[1] - packs[0]))
    return _change(gained.total(), lost.total(), paired, new.blocks.total())


def _diff_rows(old: CorpusState, new: CorpusState, pairs: list[tuple[ObjectState, ObjectState]], memory: int) -> Change:
    gained, lost = new.blocks - old.blocks, old.blocks - new.blocks
    rows = sum(new.rows_of[block] for block in gained) + sum(old.rows_of[block] for block in lost)
    added, removed = _surplus(_columns(new, gained), _columns(old, lost), rows=rows, memory=memory)
    paired = 0
    for before, after in pairs if added and removed else ():
        ours, theirs = _object_columns(new, after, before), _object_columns(old, before, after)
        paired += min(_surplus(ours, theirs, rows=rows, memory=memory))
    return _change(added, removed, paired, new.rows)


def _change(gained: int, lost: int, paired: int, total: int) -> Change:
    changed = min(paired, gained, lost)
    return Change(gained - changed, changed, lost - changed, total - gained)


def _only(one: ObjectState, other: ObjectState) -> Counter[str]:
    return Counter(one.blocks) - Counter(other.blocks)


def _columns(state: CorpusState, blocks: Counter[str]) -> list[Callable[[], pl.Series]]:
    return [lambda block=block: state.doc_ids(block) for block in blocks.elements()]  # type: ignore[misc]


def _object_columns(state: CorpusState, one: ObjectState, other: ObjectState) -> list[Callable[[], pl.Series]]:
    """doc_ids that tell one object from another: of the blocks it has alone where both have blocks of their own."""
    if one.is_small:
        return [lambda: state.small_doc_ids(one.record)]
    return _columns(state, Counter(one.blocks) if other.is_small else _only(one, other))


def _surplus(
    left: list[Callable[[], pl.Series]], right: list[Callable[[], pl.Series]], *, rows: int, memory: int
) -> tuple[int, int]:
    """Rows that the left has more than the right, and the other way round, as multisets."""
    if not left or not right:
        return tuple(sum(len(column) for column in _read(side)) for side in (left, right))  # type: ignore[return-value]
    more = fewer = 0
    parts = 1 + rows * ROW_BYTES // memory
    for part in range(parts):
        counted = [_part(side, part, parts).with_columns(sign=pl.lit(sign)) for side, sign in ((left, 1), (right, -1))]
        surplus = pl.concat(counted).group_by("key").agg(pl.col("sign").sum())["sign"]
        more += int(surplus.filter(surplus > 0).sum())
        fewer -= int(surplus.filter(surplus < 0).sum())
    return more, fewer


def _part(columns: list[Callable[[], pl.Series]], part: int, parts: int) -> pl.DataFrame:
    """The first 64 bits of all doc_ids that fall into one of `parts` parts."""
    key = pl.col("doc_id").str.head(16).str.to_integer(base=16, dtype=pl.UInt64)
    found = (
        column.to_frame("doc_id").select(key=key).filter(pl.col("key") % parts == part) for column in _read(columns)
    )
    return pl.concat([pl.DataFrame(schema={"key": pl.UInt64}), *found])


def _read(columns: Iterable[Callable[[], pl.Series]]) -> Iterator[pl.Series]:
    readers = iter(columns)
    with ContextPool(_CONNECTIONS) as pool:
        while batch := list(islice(readers, _CONNECTIONS)):
            yield from pool.map(lambda read: read(), batch)
