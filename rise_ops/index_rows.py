"""Rows of an index by number: in one pass over the chunks, or some of them from wherever they are.

Rows are numbered from 0 over all blocks, in the order of the blocks. Chunks are uncompressed rows of fixed length,
so a row is a range of bytes of an object, and is fetched alone. A range has no checksum in the block's record:
`fetch` takes the digests that the rows had when their whole chunk was read and checked, and refuses others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rise_ops.index import BlockRecord, Float16Array, read_chunk, read_counts, read_records, read_rows
from rise_ops.store import Store
from rise_ops.threads import read_ahead

DIGEST_BYTES = 16

Int64Array = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint64]


def row_digests(chunk: Float16Array) -> Digests:
    """The first 128 bits of each row's SHA-256, [rows, 2] uint64."""
    rows = np.ascontiguousarray(chunk).view(np.uint8)
    found = b"".join(hashlib.sha256(row).digest()[:DIGEST_BYTES] for row in rows)
    return np.frombuffer(found, np.uint64).reshape(len(chunk), 2)


class IndexRows:
    """The rows of some blocks of an index.

    Parameters
    ----------
    store, identity
        The index.
    blocks
        Ids of the blocks in order, or their records.

    Raises
    ------
    IntegrityError
        A block is not in the index.
    """

    def __init__(self, store: Store, identity: str, blocks: Sequence[str] | Sequence[BlockRecord]) -> None:
        self._store, self._identity = store, identity
        known = [block for block in blocks if isinstance(block, BlockRecord)]
        names = [block for block in blocks if isinstance(block, str)]
        self._records = known or list(read_records(store, identity, names).values())
        self._starts = np.cumsum([0, *(record.rows for record in self._records)])
        self.rows = int(self._starts[-1])
        self.dim = self._records[0].dim if self._records else 0

    def signed(self) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """Which rows have a signature, block by block: the first row's number, [rows]."""
        for start, record in zip(self._starts.tolist(), self._records, strict=False):
            yield start, read_counts(self._store, self._identity, record)[1] > 0

    def chunks(self, wanted: npt.NDArray[np.bool_], *, at_once: int) -> Iterator[tuple[int, Float16Array]]:
        """The chunks that hold a wanted row: the first row's number, [rows, dim] float16, checked.

        Parameters
        ----------
        wanted
            [all rows].
        at_once
            Chunks in memory at a time.

        Raises
        ------
        IntegrityError
            A chunk is missing or damaged.
        """
        return read_ahead(self._chunks(wanted), at_once)

    def _chunks(self, wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, Float16Array]]:
        for start, record in zip(self._starts.tolist(), self._records, strict=False):
            for chunk in range(-(-record.rows // record.chunk_rows)):
                first = start + chunk * record.chunk_rows
                if wanted[first : min(first + record.chunk_rows, start + record.rows)].any():
                    yield first, read_chunk(self._store, self._identity, record, chunk)

    def fetch(self, rows: Int64Array, digests: Digests) -> Float16Array:
        """Signatures of some rows, [rows, dim] float16, each by a request of its own.

        Raises
        ------
        IntegrityError
            A row is no longer what its digest says.
        """
        if not len(rows):
            return np.empty((0, self.dim), np.float16)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        places = [
            (self._records[number], row)
            for number, row in zip(numbers.tolist(), (rows - self._starts[numbers]).tolist(), strict=True)
        ]
        return read_rows(
            self._store, self._identity, places,
            is_known=lambda number, row: np.array_equal(row_digests(row[None])[0], digests[number]),
        )  # fmt: skip
