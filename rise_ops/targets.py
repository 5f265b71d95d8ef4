"""Targets: named sets of queries, and their signatures.

    targets/<target_id>.zarr       the same three arrays as an index block, one row a query
    targets/<target_id>.parquet    the canonical query rows, in the same order
    targets/<target_id>.json       completion record, written last

`target_id` covers the index and the queries' content in order, so a target is computed once whatever its
name or place.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.blocks import read_stored
from rise_ops.checksums import stored_crc32c
from rise_ops.config import LimitsConfig, TargetConfig
from rise_ops.corpus import read_rows
from rise_ops.errors import DamagedError, SourceError
from rise_ops.hashing import canonical_json, fingerprint
from rise_ops.index import checksums, write_signatures
from rise_ops.rows import CanonicalRow
from rise_ops.shapes import TargetShape
from rise_ops.store import Store, named_errors

if TYPE_CHECKING:
    from rise_ops.signatures import RowSignatures, Signer

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Target:
    """A set of queries with its signatures."""

    target_id: str
    queries: pl.DataFrame
    """doc_id, text, prompt, meta; one row a query."""
    signature: npt.NDArray[np.float32]
    """[queries, dim], unit length."""

    def head(self, count: int) -> Target:
        """The first queries."""
        return Target(self.target_id, self.queries.head(count), self.signature[:count])


def read_queries(target: TargetConfig, *, limits: LimitsConfig) -> list[CanonicalRow]:
    """Canonical rows of a target's queries.

    Raises
    ------
    SourceError
        No file, no row, or a row that cannot be read.
    """
    rows = read_rows(target.queries, target.fields, limits)
    if not rows:
        raise SourceError(f"{target.queries} has no queries")
    return rows


def target_id(identity: str, rows: Sequence[CanonicalRow]) -> str:
    """Identity of a target: the index it is for, and its queries with all their columns, in order."""
    return fingerprint([identity, [[row.doc_id, row.text_field, row.meta] for row in rows]])


def sign_target(store: Store, identity: str, rows: Sequence[CanonicalRow], *, signer: Signer) -> str:
    """Compute and store the signatures of queries unless the store has them. Returns the target's id.

    Raises
    ------
    SourceError
        A query is too short to predict a token.
    """
    name = target_id(identity, rows)
    if store.exists(f"targets/{name}.json"):
        return name
    write_signatures(store, f"targets/{name}.zarr", _signatures(rows, signer))
    buffer = io.BytesIO()
    _frame(rows).write_parquet(buffer)
    store.create(f"targets/{name}.parquet", buffer.getvalue())
    store.create_json(
        f"targets/{name}.json",
        {
            "format_version": FORMAT_VERSION,
            "target_id": name,
            "index_id": identity,
            "queries": len(rows),
            "crc32c": checksums(store, f"targets/{name}.zarr"),
            "queries_crc32c": stored_crc32c(store, f"targets/{name}.parquet"),
        },
    )
    return name


def sign_queries(rows: Sequence[CanonicalRow], *, signer: Signer, name: str) -> Target:
    """Queries with their signatures, held in memory only; as stored, they are rounded to float16."""
    return Target(name, _frame(rows), _signatures(rows, signer).signature.astype(np.float32))


def read_target(store: Store, name: str) -> Target:
    """A stored target.

    Raises
    ------
    MissingObjectError
        The store has no such target.
    IntegrityError
        Its signatures or queries are not what its record says.
    """
    record = store.get_json(f"targets/{name}.json", format_version=FORMAT_VERSION, shape=TargetShape)
    columns = ("doc_id", "text", "prompt", "meta")
    key, checksum = f"targets/{name}.parquet", record.get("queries_crc32c")
    if checksum is not None and store.checked(key, lambda: stored_crc32c(store, key)) != checksum:
        raise DamagedError(f"{store.url(key)} does not match its checksum; run again", store.url(key))
    queries = read_stored(store, key, columns=columns, known_format=FORMAT_VERSION)
    return Target(name, queries, store.checked(f"targets/{name}.zarr", lambda: _stored_signatures(store, name, record)))


def _stored_signatures(store: Store, name: str, record: dict[str, Any]) -> npt.NDArray[np.float32]:
    import zarr

    if checksums(store, f"targets/{name}.zarr") != record["crc32c"]:
        raise DamagedError(
            f"{store.url(f'targets/{name}.zarr')} does not match the checksums in its record; run again",
            store.url(f"targets/{name}.json"),
        )
    with named_errors(store, f"targets/{name}.zarr"):
        try:
            group = zarr.open_group(store.zarr(f"targets/{name}.zarr", read_only=True), mode="r")
            return np.asarray(group["signature"]).astype(np.float32)
        except ValueError as error:  # what zarr makes of a chunk or a description that is too short
            where = store.url(f"targets/{name}.zarr")
            raise DamagedError(f"{where} is damaged ({error}); run again", store.url(f"targets/{name}.json")) from error


def _signatures(rows: Sequence[CanonicalRow], signer: Signer) -> RowSignatures:
    signatures = signer.queries([row.text for row in rows], [row.prompt for row in rows])
    for row, chunks in zip(rows, signatures.chunks.tolist(), strict=True):
        if chunks == 0:
            raise SourceError(f"the query {row.text[:80]!r} has fewer than 2 tokens, so nothing predicts it; remove it")
    return signatures


def _frame(rows: Sequence[CanonicalRow]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "doc_id": [row.doc_id for row in rows],
            "text": [row.text for row in rows],
            "prompt": [row.prompt for row in rows],
            "meta": [canonical_json(row.columns) for row in rows],
        },
        schema={"doc_id": pl.String, "text": pl.String, "prompt": pl.String, "meta": pl.String},
    )
