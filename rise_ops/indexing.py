"""Filling an index: the rows of a block that the index holds elsewhere are copied, the others computed.

One block is held at a time. A copied row is bit by bit the one it is copied from, and checked against the
checksum of its chunk; where that fails, the row is computed, and the damaged block is left for `curate verify`.
The model is only asked for when a row has to be computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

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

_logger = logging.getLogger(__name__)


def sketch_blocks(store: Store, identity: str, block_ids: Sequence[str], *, dim: int, signer: Callable[[], Signer],
                  reuse: Mapping[str, pl.DataFrame] | None = None,
                  progress: Progress = silent) -> list[BlockRecord]:  # fmt: skip
    """Compute and store the signatures of blocks, one after the other.

    A block is visible when its record is; stopping in between loses one block. One that is complete by now, from an
    earlier try or another run, is taken as it is.

    Parameters
    ----------
    dim
        Length of a signature.
    signer
        Opens the model; called where a row has to be computed.
    reuse
        By block, the rows whose signatures stand elsewhere: block_row, from_block, from_row.
    progress
        Counts rows, copied ones too.

    Raises
    ------
    IntegrityError
        A block is missing or damaged.
    ModelError, LimitError
        As `Signer.rows`.
    """
    records = []
    done = 0
    for block_id in each_block(block_ids, str):
        started = time.perf_counter()
        texts = read_texts(store, block_id)
        record = completed_block(store, identity, block_id, rows=len(texts), dim=dim)
        if record is None:
            found = (reuse or {}).get(block_id)
            signatures, computed = _signatures(store, identity, texts, found, dim=dim, signer=signer)
            record = write_block(
                store,
                identity,
                block_id,
                signatures,
                seconds=time.perf_counter() - started,
                producer=_producer(signer()) if computed else {},
                sketched=computed,
            )
            count("rows", len(computed))
            count("tokens", int(signatures.tokens[computed].sum()))
            del signatures  # or those of the next block would be computed beside them
        records.append(record)
        done += len(texts)
        del texts
        progress(done, None)
    return records


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
