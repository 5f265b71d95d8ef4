"""Filling an index: the rows of a block that the index holds elsewhere are copied, the others computed.

While the signatures of one block are computed, those of the last are written and the next is read and tokenised, where
there is memory for both; else one is held at a time. A copied row is bit by bit the one it is copied from, and checked
against the checksum of its chunk; where that fails, the row is computed, and the damaged block is left for `curate
verify`. The model is only asked for when a row has to be computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl

from rise_ops.blocks import read_texts
from rise_ops.counters import count
from rise_ops.errors import IntegrityError
from rise_ops.index import BlockRecord, completed_block, read_chunk, read_counts, read_record, write_block
from rise_ops.logs import each_block
from rise_ops.memory import FRESH_ROWS
from rise_ops.progress import Progress, silent
from rise_ops.signatures import RowSignatures, Signer
from rise_ops.store import Store
from rise_ops.threads import ContextPool, read_ahead
from rise_ops.trunk import Encoded

_logger = logging.getLogger(__name__)


def sketch_blocks(store: Store, identity: str, block_ids: Sequence[str], *, dim: int, signer: Callable[[], Signer],
                  reuse: Mapping[str, pl.DataFrame] | None = None, at_once: int = 1,
                  progress: Progress = silent) -> list[BlockRecord]:  # fmt: skip
    """Compute and store the signatures of blocks, one after the other.

    A block is visible when its record is; stopping in between loses `at_once` blocks at most. One that is complete by
    now, from an earlier try or another run, is taken as it is.

    Parameters
    ----------
    dim
        Length of a signature.
    signer
        Opens the model; called where a row has to be computed.
    reuse
        By block, the rows whose signatures stand elsewhere: block_row, from_block, from_row.
    at_once
        Blocks of signatures in memory, one or two (`memory.blocks_at_once`).
    progress
        Counts rows that are stored, copied ones too.

    Raises
    ------
    IntegrityError
        A block is missing or damaged.
    ModelError, LimitError
        As `Signer.rows`.
    """
    work = _Work(store, identity, dim, signer, reuse or {}, ahead=at_once > 1)
    records: list[BlockRecord] = []
    done = 0

    def written(block: Future[BlockRecord]) -> None:
        nonlocal done
        records.append(block.result())
        done += records[-1].rows
        progress(done, None)

    with ExitStack() as stack:
        blocks: Iterable[_Block] = map(work.read, block_ids)
        if at_once > 1:
            blocks = stack.enter_context(closing(read_ahead(blocks, 2)))
        pool = stack.enter_context(ContextPool(1))
        writing: Future[BlockRecord] | None = None
        for block in each_block(blocks, lambda block: block.block_id):
            write = work.write(block)
            if writing is not None:
                written(writing)
            writing = pool.submit(write)
            del block, write  # or its signatures would be held while those of the next one are computed
            if at_once == 1:
                written(writing)
                writing = None
        if writing is not None:
            written(writing)
    return records


@dataclass(frozen=True, slots=True)
class _Block:
    """A block on its way into the index."""

    block_id: str
    texts: list[str]
    record: BlockRecord | None
    """Where it is complete by now."""
    encoded: list[Encoded] | None
    """Its tokens, where all rows are to be computed and there was time."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is done with a block, each step in a thread of its own."""

    store: Store
    identity: str
    dim: int
    signer: Callable[[], Signer]
    reuse: Mapping[str, pl.DataFrame]
    ahead: bool
    """Whether blocks are read while others are computed."""

    def read(self, block_id: str) -> _Block:
        """Texts, and tokens where the processor has time for them because the model is busy."""
        texts = read_texts(self.store, block_id)
        record = completed_block(self.store, self.identity, block_id, rows=len(texts), dim=self.dim)
        wanted = self.ahead and record is None and block_id not in self.reuse
        return _Block(block_id, texts, record, self.signer().trunk.encode(texts) if wanted else None)

    def write(self, block: _Block) -> Callable[[], BlockRecord]:
        """Compute a block's signatures, unless it is complete; what comes back stores them."""
        if block.record is not None:
            return partial(_as_it_is, block.record)
        started = time.perf_counter()
        computed: Sequence[int] = range(len(block.texts))
        if block.encoded is not None:
            signatures = self.signer().encoded_rows(block.encoded)
        else:
            signatures, computed = _signatures(
                self.store, self.identity, block.texts, self.reuse.get(block.block_id), dim=self.dim, signer=self.signer
            )
        seconds = time.perf_counter() - started
        return partial(self._store, block.block_id, signatures, computed, seconds)

    def _store(self, block_id: str, signatures: RowSignatures, computed: Sequence[int], seconds: float) -> BlockRecord:
        producer = _producer(self.signer()) if computed else {}
        record = write_block(
            self.store, self.identity, block_id, signatures, seconds=seconds, producer=producer, sketched=computed
        )
        count("rows", len(computed))
        count("tokens", int(signatures.tokens[list(computed)].sum()))
        return record


def _as_it_is(record: BlockRecord) -> BlockRecord:
    return record


def _producer(signer: Signer) -> dict[str, str]:
    trunk = signer.trunk
    halvings = {"out_of_memory": str(signer.halvings)} if signer.halvings else {}
    return {"device": str(trunk.device), "dtype": str(trunk.dtype).removeprefix("torch."), **halvings}


def _signatures(store: Store, identity: str, texts: Sequence[str], found: pl.DataFrame | None, *, dim: int,
                signer: Callable[[], Signer]) -> tuple[RowSignatures, list[int]]:  # fmt: skip
    """Signatures of all rows of a block, and which of them were computed."""
    if found is None:
        return signer().rows(texts), list(range(len(texts)))
    rows = len(texts)
    result = RowSignatures(np.zeros((rows, dim), np.float16), np.zeros(rows, np.int32), np.zeros(rows, np.int32))
    todo = np.ones(rows, dtype=np.bool_)
    for (source,), part in found.partition_by("from_block", as_dict=True).items():
        block_rows, from_rows = part["block_row"].to_numpy(), part["from_row"].to_numpy()
        try:
            _copy(store, identity, str(source), from_rows, result, block_rows)
        except IntegrityError as error:
            _logger.warning("%d rows are computed, not copied: %s", len(block_rows), error)
        else:
            todo[block_rows] = False
    computed: list[int] = np.flatnonzero(todo).tolist()
    for start in range(0, len(computed), FRESH_ROWS):
        places = computed[start : start + FRESH_ROWS]
        fresh = signer().rows([texts[row] for row in places])
        for name in ("signature", "tokens", "chunks"):
            getattr(result, name)[places] = getattr(fresh, name)
    return result, computed


def _copy(store: Store, identity: str, block_id: str, rows: np.ndarray[tuple[int], np.dtype[np.uint32]],
          result: RowSignatures, places: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> None:  # fmt: skip
    """Copy rows of an indexed block to places of the result, chunk by chunk."""
    record = read_record(store, identity, block_id)
    tokens, chunks = read_counts(store, identity, record)
    result.tokens[places], result.chunks[places] = tokens[rows], chunks[rows]
    holds = rows // record.chunk_rows
    for chunk in np.unique(holds).tolist():
        here = holds == chunk
        content = read_chunk(store, identity, record, chunk)
        result.signature[places[here]] = content[rows[here] - chunk * record.chunk_rows]
