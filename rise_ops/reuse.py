"""Row reuse: what an index already holds is copied, not computed.

A row is named by its content, so a row of a new block that any block of the same index holds has its signature
there. Rows are looked up by doc_id; of the candidate blocks only that column is read, the most likely first:

1. blocks of the latest indexed version of the corpus that the present one no longer has: they hold all rows of
   a changed block but the changed ones;
2. other blocks of the index that the corpus does not have: older versions, other corpora;
3. the corpus' own indexed blocks: rows that stand in it twice.

Of a recorded block that lacks some of its chunks, the rows of the others are kept.

The search ends when every row is found, or when it has looked at LOOKS_PER_ROW doc_ids for each row in search
(and at FREE_LOOKS in all): from there on, computing the rest costs less than looking on.

    runs/<run_id>/reuse-<hash>.parquet   block_id, block_row, from_block, from_row; sorted by block
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

import polars as pl

from rise_ops.blocks import read_doc_ids
from rise_ops.corpus import CorpusVersion, parent_version
from rise_ops.errors import IntegrityError
from rise_ops.hashing import sha256_hex
from rise_ops.store import Store
from rise_ops.threads import ContextPool

LOOKS_PER_ROW = 1_000
"""doc_ids (32 bytes each once compressed) that are read at most for each row in search: 32 KB, which take less time
to read than a forward pass of one row takes on a fast device."""
FREE_LOOKS = 200_000
ROW_BYTES = 400
"""Peak bytes of a row in search: its doc_id, its place and the hash table."""

_ANCESTORS = 8
_CONNECTIONS = 16
_SMALLEST_BATCH, _LARGEST_BATCH = 8, 64
_FOUND = {"block": pl.UInt32, "block_row": pl.UInt32, "from_block": pl.String, "from_row": pl.UInt32}


def candidate_blocks(
    store: Store, recorded: Sequence[str], current: Collection[str], *, earlier: CorpusVersion | None
) -> list[str]:
    """Indexed blocks that may hold the rows of new ones, the most likely first.

    Parameters
    ----------
    recorded
        Blocks of the index that are complete.
    current
        Blocks of the corpus as it is now.
    earlier
        The latest version of the corpus before this one, if there is any.
    """
    known, now = set(recorded), set(current)
    likely: list[str] = []
    for _ in range(_ANCESTORS):
        if earlier is None or likely:
            break
        blocks = dict.fromkeys(block for entry in earlier.sources for block in entry.blocks)
        likely = [block for block in blocks if block in known and block not in now]
        earlier = parent_version(store, earlier)
    others = sorted(known - now - set(likely))
    return [*likely, *others, *sorted(known & now)]


def find_rows(
    store: Store,
    missing: Iterable[tuple[str, pl.Series]],
    candidates: Sequence[str],
    *,
    memory: int,
    kept: Mapping[str, pl.Series] | None = None,
) -> Iterator[pl.DataFrame]:
    """Where the rows of blocks that an index lacks stand in blocks that it has.

    Parameters
    ----------
    missing
        Blocks and the doc_ids of their rows, in order.
    candidates
        Indexed blocks, the most likely first.
    memory
        Bytes that the search may take.
    kept
        By block, rows of missing blocks whose own signatures are there.

    Yields
    ------
    polars.DataFrame
        block_id, block_row, from_block, from_row; each found row once, all rows of a block in one frame.
    """
    for blocks, rows in _groups(missing, most=max(1, memory // ROW_BYTES)):
        own = _kept(blocks, kept or {})
        rows = rows.join(own, on=["block", "block_row"], how="anti")
        found = pl.concat([own, *_search(store, rows, candidates)])
        if not found.is_empty():
            names = pl.Series(blocks, dtype=pl.String).gather(found["block"]).alias("block_id")
            yield found.select(names, "block_row", "from_block", "from_row").sort("block_id", "block_row")


def write_reuse(store: Store, run_id: str, found: Iterable[pl.DataFrame]) -> tuple[dict[str, str], int]:
    """Store where rows were found, a file a frame. Returns the key by block, and the number of rows."""
    keys: dict[str, str] = {}
    rows = 0
    for frame in found:
        buffer = io.BytesIO()
        frame.write_parquet(buffer, row_group_size=2**16)
        key = f"runs/{run_id}/reuse-{sha256_hex(buffer.getvalue())[:16]}.parquet"
        store.create(key, buffer.getvalue())
        keys |= dict.fromkeys(frame["block_id"].unique().to_list(), key)
        rows += frame.height
    return keys, rows


def read_reuse(store: Store, keys: Collection[str], blocks: Sequence[str]) -> dict[str, pl.DataFrame]:
    """What `write_reuse` stored of some blocks: block_row, from_block, from_row by block."""
    wanted = pl.col("block_id").is_in(list(blocks))
    found: dict[str, pl.DataFrame] = {}
    for key in sorted(keys):
        rows = store.collected(key, lambda key=key: store.scan_parquet([key]).filter(wanted).collect())  # type: ignore[misc]
        parts = rows.partition_by("block_id", as_dict=True)
        found |= {str(name): part.drop("block_id") for (name,), part in parts.items()}
    return found


def _kept(blocks: Sequence[str], kept: Mapping[str, pl.Series]) -> pl.DataFrame:
    frames = [
        pl.DataFrame({"block_row": kept[block]}, schema={"block_row": pl.UInt32}).with_columns(
            block=pl.lit(place, pl.UInt32), from_block=pl.lit(block), from_row="block_row"
        )
        for place, block in enumerate(blocks)
        if block in kept
    ]
    return pl.concat([pl.DataFrame(schema=_FOUND), *(frame.select(list(_FOUND)) for frame in frames)])


def _groups(missing: Iterable[tuple[str, pl.Series]], *, most: int) -> Iterator[tuple[list[str], pl.DataFrame]]:
    """Blocks with at most `most` rows together (a larger one alone), and their rows: doc_id, block, block_row."""
    blocks: list[str] = []
    frames: list[pl.DataFrame] = []
    rows = 0
    for block_id, doc_ids in missing:
        if blocks and rows + len(doc_ids) > most:
            yield blocks, pl.concat(frames)
            blocks, frames, rows = [], [], 0
        frames.append(_numbered(doc_ids, len(blocks), "block", "block_row"))
        blocks.append(block_id)
        rows += len(doc_ids)
    if blocks:
        yield blocks, pl.concat(frames)


def _search(store: Store, pending: pl.DataFrame, candidates: Sequence[str]) -> Iterator[pl.DataFrame]:
    left = max(FREE_LOOKS, LOOKS_PER_ROW * pending.height)
    start, size = 0, _SMALLEST_BATCH
    with ContextPool(_CONNECTIONS) as pool:
        while start < len(candidates) and left > 0 and not pending.is_empty():
            batch = candidates[start : start + size]
            start, size = start + size, min(_LARGEST_BATCH, 2 * size)
            columns = list(pool.map(lambda block: _doc_ids(store, block), batch))
            left -= sum(map(len, columns))
            held = pl.concat([_numbered(ids, place, "place", "from_row") for place, ids in enumerate(columns)])
            held = held.unique("doc_id", keep="first", maintain_order=True)
            found = pending.join(held, on="doc_id", how="inner")
            if not found.is_empty():
                pending = pending.join(held, on="doc_id", how="anti")
                source = pl.Series(batch, dtype=pl.String).gather(found["place"]).alias("from_block")
                yield found.with_columns(source).select(list(_FOUND))


def _numbered(doc_ids: pl.Series, place: int, *names: str) -> pl.DataFrame:
    block, row = names
    rows = pl.int_range(len(doc_ids), dtype=pl.UInt32, eager=True)
    return pl.DataFrame(
        {"doc_id": doc_ids, block: pl.repeat(place, len(doc_ids), dtype=pl.UInt32, eager=True), row: rows}
    )


def _doc_ids(store: Store, block_id: str) -> pl.Series:
    """doc_ids of a block; none where it cannot be read, so that its rows are computed."""
    with suppress(IntegrityError):
        return read_doc_ids(store, block_id)
    return pl.Series("doc_id", [], dtype=pl.String)
