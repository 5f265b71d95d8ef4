"""Taking the vectors of a reference index into a store, without forward passes for the rows that it has.

For a corpus that has the very file which the index was made of. Rows are matched by their numbers in the file. Before
anything is written, the whole index is verified, every row's text is tokenized and held against what the index says of
it (characters, beginning, tokens, chunks), and some rows are computed with the configured model and compared: an index
of this format names its model, but does not prove it.

Written are the blocks of our index whose rows are all in the file. Rows of theirs that the index has otherwise than
ours (another text, no vector) are computed. Blocks that hold rows of other files as well, and blocks of other files,
are left to `curate index`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.alive import alive_if_possible
from rise_ops.blocks import read_texts
from rise_ops.chunking import QUERY_TOKENS
from rise_ops.config import CurationConfig
from rise_ops.corpus import CorpusVersion, SourceEntry
from rise_ops.counters import count
from rise_ops.errors import ConfigError, IntegrityError, ModelError, SourceError
from rise_ops.exchange import MANIFEST, PROJECTIONS, chunk_counts, effective, iter_places
from rise_ops.exchange_read import ReferenceIndex, open_reference_index
from rise_ops.index import index_id, list_indexed, prepare_index, tables_key, write_block
from rise_ops.logs import each_block
from rise_ops.memory import sketch_memory
from rise_ops.progress import Progress, silent
from rise_ops.session import block_rows, open_corpus
from rise_ops.signatures import RowSignatures, Signer
from rise_ops.sketch import load_tables
from rise_ops.spool import spool
from rise_ops.store import Store
from rise_ops.tuning import settled

SAMPLE_ROWS = 32
"""Rows that are computed and compared."""
TOLERANCE = 0.999
"""Least cosine of a computed row with its vector. In 16-bit, and at low temperatures, single rows move more."""
_MOST_DIFFERENT = 0.1

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did; counts are of the corpus version's blocks and rows."""

    index_id: str
    rows: int
    """Of the file."""
    rows_imported: int
    """Whose vectors were taken over."""
    rows_computed: int
    """That stand in imported blocks, but had no vector, or one of another text."""
    rows_there: int
    """That our index had already."""
    rows_left: int
    """Of the corpus, that `curate index` has to look at."""
    blocks_imported: int
    blocks_left: int
    sample_rows: int
    cosine_min: float | None
    """Of the sample; None where nothing was to be imported."""
    cosine_median: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of ours that the file holds whole; what is known of its rows lies in a file."""

    block_id: str
    rows: int
    different: int
    """Rows that the index does not have as we do."""
    usable: int
    """Rows that it has, with a signature."""
    path: Path

    def load(self) -> _Rows:
        """What is known of the rows."""
        idx, tokens, chunks, different = np.load(self.path, allow_pickle=False)
        return _Rows(idx, tokens.astype(np.int32), chunks.astype(np.int32), different.astype(np.bool_))


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a block, in its order, each [rows]."""

    idx: Rows
    """Number in the file."""
    tokens: npt.NDArray[np.int32]
    chunks: npt.NDArray[np.int32]
    different: npt.NDArray[np.bool_]


def import_reference_index(store: Store, config: CurationConfig, folder: str | Path, *, tolerance: float = TOLERANCE,
                           any_name: bool = False, progress: Progress = silent) -> Imported:  # fmt: skip
    """Fill our index of the configured corpus from a reference index of one of its source objects.

    Parameters
    ----------
    tolerance
        Least cosine between a row that is computed for comparison and its vector.
    any_name
        Take an index whose model has another name; its dimensions, its LM head and the sample must agree all the same.
    progress
        Counts rows, first verified and then written.

    Raises
    ------
    ConfigError
        The index has another sketch than the configuration.
    IntegrityError
        The index is damaged or unfinished, or has other tables than our index of this model and sketch.
    SourceError
        The corpus has no object with these bytes, or its rows are others.
    ModelError
        The configured model is not the one that the index was built with.
    LimitError
        A block of signatures does not fit in `limits.memory`.
    """
    started = time.perf_counter()
    config = settled(store, config)
    index = open_reference_index(folder)
    _refuse_other_sketch(index, config)
    _, memory = sketch_memory(int(config.limits.memory), dim=config.sketch.dim)
    with alive_if_possible(store, "import"), spool() as place:
        version = open_corpus(store, config)
        entry = _entry(index, version)
        # with the user's own fields: those without effect are part of an index' name, too
        signer = index.signer(config.model, memory=memory, sketch=config.sketch, any_name=any_name)
        identity = index_id(signer.trunk.fingerprint, config.sketch)
        _refuse_other_tables(store, identity, index)
        rows_of = block_rows(store, version)
        there = list_indexed(store, identity, rows_of, dim=config.sketch.dim)
        index.verify(progress=progress)
        blocks = [
            _checked(store, index, signer, block_id, idx, path=place / f"{block_id}.npy")
            for block_id, idx in each_block(_whole_blocks(store, entry, rows_of, there), lambda pair: pair[0])
        ]
        _refuse_other_texts(index, entry, blocks)
        cosines = _compare(store, index, signer, blocks, tolerance=tolerance)
        if blocks:
            prepare_index(store, signer, model=config.model)
        done = 0
        for block in each_block(blocks, lambda block: block.block_id):
            _write(store, identity, index, signer, block)
            done += block.rows
            progress(done, None)
    held, computed = sum(block.rows for block in blocks), sum(block.different for block in blocks)
    written = there | {block.block_id for block in blocks}
    return Imported(
        index_id=identity,
        rows=index.num_rows,
        rows_imported=held - computed,
        rows_computed=computed,
        rows_there=sum(rows_of[block_id] for block_id in there),
        rows_left=sum(rows for block_id, rows in rows_of.items() if block_id not in written),
        blocks_imported=len(blocks),
        blocks_left=len(rows_of) - len(written),
        sample_rows=len(cosines),
        cosine_min=float(cosines.min()) if len(cosines) else None,
        cosine_median=float(np.median(cosines)) if len(cosines) else None,
        seconds=round(time.perf_counter() - started, 3),
    )


def _refuse_other_sketch(index: ReferenceIndex, config: CurationConfig) -> None:
    ours, theirs = effective(config.sketch), effective(index.sketch)
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"{index.folder} has sketch.{name} {theirs.get(name)}, configured is {ours.get(name)}; configure the "
                "index' own sketch, which is another index of ours"
            )


def _refuse_other_tables(store: Store, identity: str, index: ReferenceIndex) -> None:
    if store.exists(tables_key(identity)):
        ours = load_tables(store, f"indexes/{identity}/tables.zarr")
        if ours.sha256 != index.tables.sha256:
            raise IntegrityError(
                f"{index.folder / PROJECTIONS} holds other tables than our index {identity[:12]} of this model and "
                "sketch; their vectors cannot be compared. Import into another store, or with another seed"
            )


def _entry(index: ReferenceIndex, version: CorpusVersion) -> SourceEntry:
    """The source object that an index was made of."""
    where = index.folder / MANIFEST
    if index.data.sha256 is None:
        raise SourceError(
            f"{where}: attrs.data.sha256 is missing, so it cannot be told which rows its vectors belong to; build the "
            "index from a file, with its hash"
        )
    found = [entry for entry in version.sources if entry.object_sha == index.data.sha256]
    if not found:
        raise SourceError(
            f"corpus {version.corpus} version {version.version} has no object with the bytes of "
            f"{str(index.data.file)[:200]} ({where}: attrs.data.sha256 {index.data.sha256[:12]}…); add that very file "
            "to corpus.sources, uncompressed if it was, and run `curate ingest`"
        )
    rows = found[0].rows + found[0].rejected
    if rows != index.num_rows:
        raise SourceError(
            f"{found[0].uri} has {rows:,} rows, {where}: num_rows is {index.num_rows:,}; build the index of all rows"
        )
    return found[0]


def _whole_blocks(store: Store, entry: SourceEntry, rows_of: dict[str, int], there: set[str],
                  ) -> Iterator[tuple[str, Rows]]:  # fmt: skip
    """Blocks that our index lacks and the file has all rows of, each once, with the rows' numbers in it."""
    seen = set(there)
    for frame in iter_places(store, entry):
        block_id = str(frame["block_id"][0])
        if block_id not in seen and frame.height == rows_of[block_id]:
            seen.add(block_id)
            yield block_id, frame.sort("block_row")["idx"].to_numpy()


def _checked(store: Store, index: ReferenceIndex, signer: Signer, block_id: str, idx: Rows, *, path: Path) -> _Block:
    """Hold texts against what the index says of them; nothing but the tokenizer is run."""
    texts = read_texts(store, block_id)
    tokens = np.array([len(found.ids) for found in signer.trunk.encode(texts)], np.int32)
    chunks = np.array([chunk_counts(number)[0] for number in tokens.tolist()], np.int32)
    meta = pl.concat([_rows_of(index, shard)[rows] for shard, rows in _by_shard(index, idx)])
    said = zip(texts, tokens.tolist(), chunks.tolist(), meta.iter_rows(named=True), strict=True)
    same = [
        len(text) == row["length"]
        and text.startswith(row["text"] or "")
        and row["tok_len"] in (number, min(number, QUERY_TOKENS))  # the reference counts up to its seq_len
        and row["num_chunks"] == parts
        for text, number, parts, row in said
    ]
    empty = np.concatenate([~(index.vectors(shard)[rows] != 0).any(axis=1) for shard, rows in _by_shard(index, idx)])
    different = ~np.array(same) | (empty != (chunks == 0))
    np.save(path, np.stack([idx, tokens, chunks, different]).astype(np.int64), allow_pickle=False)
    return _Block(block_id, len(idx), int(different.sum()), int((~different & (chunks > 0)).sum()), path)


@lru_cache(2)
def _rows_of(index: ReferenceIndex, shard: int) -> pl.DataFrame:
    return index.rows_of(shard)


def _by_shard(index: ReferenceIndex, idx: Rows) -> list[tuple[int, Rows]]:
    """Rows of a block by shard: their places in it. Rows come in the order of the file, so a shard comes once."""
    shards = index.shard_of(idx)
    bounds = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(idx)]
    return [
        (int(shards[start]), idx[start:stop] - index.shards[int(shards[start])].start)
        for start, stop in pairwise(bounds)
    ]


def _refuse_other_texts(index: ReferenceIndex, entry: SourceEntry, blocks: Sequence[_Block]) -> None:
    rows, different = sum(block.rows for block in blocks), sum(block.different for block in blocks)
    if different > _MOST_DIFFERENT * rows:
        held = next(block for block in blocks if block.different).load()
        number = int(held.idx[held.different][0])
        raise SourceError(
            f"{different:,} of {rows:,} rows of {entry.uri} differ from what {index.folder} says of their characters, "
            f"beginnings, tokens or chunks, the first at row {number}; is corpus.fields as it was for the index, and "
            "the tokenizer the same?"
        )


def _compare(store: Store, index: ReferenceIndex, signer: Signer, blocks: Sequence[_Block], *, tolerance: float,
             ) -> npt.NDArray[np.float64]:  # fmt: skip
    """Cosines of some rows that are computed with their vectors, spread evenly over the blocks."""
    bounds = np.cumsum([0, *(block.usable for block in blocks)])
    picked = np.unique(np.linspace(0, bounds[-1] - 1, SAMPLE_ROWS).astype(np.int64)) if bounds[-1] else np.empty(0, int)
    texts: list[str] = []
    vectors: list[npt.NDArray[np.float64]] = []
    for number, block in enumerate(blocks):
        places = picked[(picked >= bounds[number]) & (picked < bounds[number + 1])] - bounds[number]
        if len(places):
            known, held = block.load(), read_texts(store, block.block_id)
            mine = np.flatnonzero(~known.different & (known.chunks > 0))[places]
            texts += [held[row] for row in mine.tolist()]
            vectors += [
                np.asarray(index.vectors(shard)[rows], np.float64) for shard, rows in _by_shard(index, known.idx[mine])
            ]
    if not texts:
        return np.empty(0)
    theirs, ours = np.concatenate(vectors), signer.rows(texts).signature.astype(np.float64)
    norms = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
    cosines = np.einsum("ij,ij->i", theirs, ours) / np.maximum(norms, 1e-8)
    if not (cosines >= tolerance).all():
        raise ModelError(
            f"{int((cosines < tolerance).sum())} of {len(cosines)} rows that were computed with model "
            f"{signer.trunk.name} have a cosine below {tolerance:g} with their vectors in {index.folder} (lowest "
            f"{cosines.min():.4f}, median {np.median(cosines):.4f}); nothing was written. The index names the model "
            f"{index.model.name_or_path[:200] or '(none)'} in {index.model.dtype[:40] or 'an unknown dtype'}; if only "
            "16-bit arithmetic tells them apart, give a lower tolerance"
        )
    return np.asarray(cosines)


def _write(store: Store, identity: str, index: ReferenceIndex, signer: Signer, block: _Block) -> None:
    started = time.perf_counter()
    known = block.load()
    signature = np.empty((block.rows, index.dim), np.float16)
    start = 0
    for shard, places in _by_shard(index, known.idx):
        signature[start : start + len(places)] = index.vectors(shard)[places]
        start += len(places)
    computed = np.flatnonzero(known.different).tolist()
    if computed:
        texts = read_texts(store, block.block_id)
        signature[computed] = signer.rows([texts[row] for row in computed]).signature
    write_block(
        store,
        identity,
        block.block_id,
        RowSignatures(signature, known.tokens, known.chunks),
        seconds=time.perf_counter() - started,
        producer={"imported": index.sha256, "model": index.model.name_or_path[:200], "dtype": index.model.dtype[:40]},
        sketched=computed,
    )
    count("rows", block.rows)
