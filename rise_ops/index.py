"""The signature index: one Zarr v3 group per block, under one model and one sketch.

    indexes/<index_id>/index.json                what made it: model, sketch, estimator version, table hash
    indexes/<index_id>/tables.zarr               the CountSketch tables
    indexes/<index_id>/blocks/<block_id>.zarr    `signature [rows, dim] float16`, `tokens [rows]`, `chunks [rows]`
    indexes/<index_id>/blocks/<block_id>.json    completion record, written last

Chunks are full-width, uncompressed (float16 signatures do not compress) and at most 16 MiB, so a chunk is
one contiguous object that is read with one request and checked against the CRC-32C in the completion
record. A block without a record does not exist for readers. Rows stand in block order. (Chunk sizes, several at
a time, zarr and clients are compared by `tests/benchmarks/storage.py`.)

Two workers may compute the same block: every key is created exclusively and the record's checksums are
taken of what is stored, so whoever wrote which chunk, the finished block is consistent. A block that is
damaged after its record was written is repaired by `write_block`; readers only refuse it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from rise_ops.checksums import crc32c, stored_crc32c
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import DamagedError, IntegrityError, MissingObjectError, ModelError, StoreError
from rise_ops.hashing import fingerprint
from rise_ops.shapes import BlockShape, IndexShape
from rise_ops.store import Store, zarr_errors
from rise_ops.threads import ContextPool

if TYPE_CHECKING:
    from rise_ops.signatures import RowSignatures, Signer

FORMAT_VERSION = 1
CHUNK_BYTES = 16 * 2**20
"""Part of the format: blocks chunked otherwise read as incomplete."""
_READERS = 16
CHUNKS_AT_ONCE = 4
"""Written at the same time, without a copy."""
_READ_BACK = 2
"""Chunks read back at the same time; over a network each of them takes memory."""
_NORM_ERROR = 0.02

Float16Array = npt.NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """Completion record of one indexed block."""

    block_id: str
    rows: int
    dim: int
    tokens: int
    """Sum over the rows."""
    chunk_rows: int
    """Rows of one stored chunk; the last chunk is padded."""
    crc32c: Mapping[str, int]
    """Checksum of every stored object of the group, by its key below the group."""
    seconds: float
    """Time that computing it took."""
    rows_sketched: int
    """Rows that were computed; the signatures of the others were copied from blocks that had them."""
    tokens_sketched: int
    """Their tokens."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BlockRecord:
        """Read the JSON form."""
        before_reuse = {"rows_sketched": value["rows"], "tokens_sketched": value["tokens"]}
        return cls(**{name: value[name] if name in value else before_reuse[name] for name in cls.__slots__})


def index_id(model_fingerprint: str, sketch: SketchConfig) -> str:
    """Identity of an index: model, sketch and estimator version."""
    from rise_ops.signatures import ESTIMATOR_VERSION

    return fingerprint([model_fingerprint, sketch.fingerprint, ESTIMATOR_VERSION])


def index_key(identity: str) -> str:
    """Where the description of an index is in the store."""
    return f"indexes/{identity}/index.json"


def prepare_index(store: Store, signer: Signer, *, model: ModelConfig) -> str:
    """Create the index of a model and a sketch, or check the one that is there. Returns its id.

    Raises
    ------
    IntegrityError
        An index with this id was made with other sketch tables.
    """
    from rise_ops.signatures import ESTIMATOR_VERSION

    trunk = signer.trunk
    identity = index_id(trunk.fingerprint, signer.sketch)
    key = index_key(identity)
    if store.exists(key):
        _refuse_other_tables(store, identity, signer)
    signer.tables.save(store, f"indexes/{identity}/tables.zarr")
    document = {
        "format_version": FORMAT_VERSION,
        "index_id": identity,
        "model": {"name": model.name, "revision": model.revision, "fingerprint": trunk.fingerprint},
        "sketch": signer.sketch.model_dump(mode="json"),
        "sketch_fingerprint": signer.sketch.fingerprint,
        "estimator_version": ESTIMATOR_VERSION,
        "tables_sha256": signer.tables.sha256,
        "dim": signer.sketch.dim,
        "dtype": "float16",
    }
    if not store.create_json(key, document):
        _refuse_other_tables(store, identity, signer)
    return identity


def tables_key(identity: str) -> str:
    """What is written last of an index' sketch tables."""
    return f"indexes/{identity}/tables.zarr/zarr.json"


def _refuse_other_tables(store: Store, identity: str, signer: Signer) -> None:
    if describe_index(store, identity)["tables_sha256"] != signer.tables.sha256:
        raise IntegrityError(
            f"{store.url(index_key(identity))} was made with other sketch tables than this PyTorch draws from seed "
            f"{signer.sketch.seed}; use the PyTorch it was made with, or another seed"
        )


def read_index(store: Store, identity: str, *, model: ModelConfig) -> dict[str, Any]:
    """The description of an index.

    Raises
    ------
    ModelError
        The store has no index of this model and sketch; the message says which it has.
    """
    try:
        return describe_index(store, identity)
    except MissingObjectError:
        others = [describe_index(store, name) for name in list_indexes(store)]
        known = "; ".join(
            f"{item['model']['name']} ({item['model']['fingerprint'][:12]}), temperature "
            f"{item['sketch']['temperature']}, {item['dim']} wide"
            for item in others
        )
        raise ModelError(
            f"{store.uri} has no index of model {model.name} with this sketch ({identity[:12]}). It has: "
            f"{known or 'none'}. Run `curate index` first, or use the model and sketch of an index that exists"
        ) from None


def describe_index(store: Store, identity: str) -> dict[str, Any]:
    """The description of an index that is there."""
    options: dict[str, Any] = {"shape": IndexShape, "holds": {"index_id": identity}}
    return store.get_json(index_key(identity), format_version=FORMAT_VERSION, **options)


def list_indexes(store: Store) -> list[str]:
    """Ids of the indexes in a store. One whose creation was interrupted is not there."""
    return [name for name in store.children("indexes") if store.exists(index_key(name))]


class IndexListing:
    """One listing of an index: which blocks are there, and which of them are complete. No data is read.

    Parameters
    ----------
    store, identity
        The index.
    """

    def __init__(self, store: Store, identity: str) -> None:
        prefix = f"indexes/{identity}/blocks/"
        self._sizes = {key.removeprefix(prefix): size for key, size in store.list(prefix)}

    @property
    def recorded(self) -> list[str]:
        """Blocks with a completion record, sorted."""
        return sorted(name.removesuffix(".json") for name in self._sizes if name.endswith(".json") and "/" not in name)

    def complete(self, rows_of: Mapping[str, int], *, dim: int) -> set[str]:
        """Blocks of `rows_of` (block id to rows) that are recorded, with every object there in full size."""
        sizes = self._sizes
        return {
            block_id
            for block_id, rows in rows_of.items()
            if f"{block_id}.json" in sizes and _is_whole(sizes, f"{block_id}.zarr/", rows, dim)
        }

    def kept_rows(self, block_id: str, rows: int, *, dim: int) -> list[int]:
        """Rows of an incomplete block whose signatures are there: it is recorded, and these chunks are whole."""
        sizes, prefix = self._sizes, f"{block_id}.zarr/"
        expected = _sizes(rows, dim)
        there = {name for name, size in expected.items() if sizes.get(f"{prefix}{name}") == size}
        if f"{block_id}.json" not in sizes or not there.issuperset(("tokens/c/0", "chunks/c/0")):
            return []
        chunk_rows, _ = _chunking(rows, dim)
        return [row for row in range(rows) if f"signature/c/{row // chunk_rows}/0" in there]


def list_indexed(store: Store, identity: str, rows_of: Mapping[str, int], *, dim: int) -> set[str]:
    """`IndexListing.complete` of a fresh listing."""
    return IndexListing(store, identity).complete(rows_of, dim=dim)


def completed_block(store: Store, identity: str, block_id: str, *, rows: int, dim: int) -> BlockRecord | None:
    """The record of a block that is complete by now; None where something of it is missing."""
    group_key = f"indexes/{identity}/blocks/{block_id}.zarr/"
    if not store.exists(f"indexes/{identity}/blocks/{block_id}.json"):
        return None
    whole = _is_whole(dict(store.list(group_key)), group_key, rows, dim)
    return read_record(store, identity, block_id) if whole else None


def write_block(store: Store, identity: str, block_id: str, signatures: RowSignatures, *, seconds: float,
                producer: Mapping[str, str], sketched: Sequence[int] | None = None) -> BlockRecord:  # fmt: skip
    """Store a block's signatures; its completion record comes last. Returns the record.

    A block that is complete stays as it is. Of an incomplete one, every object that is as it should be stays.

    Parameters
    ----------
    seconds
        Time that computing the signatures took.
    producer
        What computed them.
    sketched
        Rows that were computed; all where None.

    Raises
    ------
    StoreError, TransientError
    """
    group_key = f"indexes/{identity}/blocks/{block_id}.zarr"
    rows, dim = signatures.signature.shape
    key = f"indexes/{identity}/blocks/{block_id}.json"
    complete = completed_block(store, identity, block_id, rows=rows, dim=dim)
    if complete is not None:
        return complete
    sizes = dict(store.list(f"{group_key}/"))
    _discard_damaged(store, identity, block_id, sizes, _sizes(rows, dim))
    write_signatures(store, group_key, signatures)
    computed = np.arange(rows) if sketched is None else np.asarray(sketched, dtype=np.int64)
    record = {
        "format_version": FORMAT_VERSION,
        "block_id": block_id,
        "rows": rows,
        "dim": dim,
        "tokens": int(signatures.tokens.sum()),
        "rows_sketched": len(computed),
        "tokens_sketched": int(signatures.tokens[computed].sum()),
        "chunk_rows": _chunking(rows, dim)[0],
        "crc32c": checksums(store, group_key),
        "seconds": round(seconds, 3),
        "producer": dict(producer),
    }
    store.create_json(key, record)
    return read_record(store, identity, block_id)


def write_signatures(store: Store, group_key: str, signatures: RowSignatures) -> None:
    """Write the three arrays of a group; what another worker has written of it stays.

    zarr describes them. A chunk is stored without zarr, as the bytes of its rows, which is what zarr would store.

    Raises
    ------
    StoreError, TransientError
    """
    store.checked(group_key, lambda: _describe_arrays(store, group_key, signatures))

    def write(chunk: tuple[str, memoryview]) -> bool:
        name, data = chunk
        return store.create(f"{group_key}/{name}", data)

    with ContextPool(CHUNKS_AT_ONCE) as pool:
        for _ in pool.ahead(write, _stored_chunks(signatures), CHUNKS_AT_ONCE):
            pass


def _describe_arrays(store: Store, group_key: str, signatures: RowSignatures) -> None:
    import zarr
    from zarr.errors import ContainsArrayError, ContainsGroupError

    rows, dim = signatures.signature.shape
    chunk_rows, _ = _chunking(rows, dim)
    arrays: list[tuple[str, npt.NDArray[Any], tuple[int, ...], float]] = [
        ("signature", signatures.signature, (chunk_rows, dim), float("nan")),
        ("tokens", signatures.tokens, (rows,), -1),
        ("chunks", signatures.chunks, (rows,), -1),
    ]
    with zarr_errors(store, group_key):
        try:
            group = zarr.open_group(store.zarr(group_key), mode="a", zarr_format=3)
        except ContainsGroupError:  # another worker made it between zarr's look and its own write
            group = zarr.open_group(store.zarr(group_key), mode="r+")
        for name, data, chunks, fill in arrays:
            # where it exists, from another worker or an interrupted attempt, it has the same metadata
            with suppress(ContainsArrayError):
                group.create_array(
                    name, shape=data.shape, dtype=data.dtype, chunks=chunks, compressors=None, fill_value=fill
                )


def _stored_chunks(signatures: RowSignatures) -> Iterator[tuple[str, memoryview]]:
    """The chunks of the three arrays as they are stored, by their keys below the group."""
    rows, dim = signatures.signature.shape
    chunk_rows, _ = _chunking(rows, dim)
    for chunk, start in enumerate(range(0, rows, chunk_rows)):
        part = signatures.signature[start : start + chunk_rows]
        if len(part) < chunk_rows:
            part = np.concatenate([part, np.full((chunk_rows - len(part), dim), np.nan, part.dtype)])
        yield f"signature/c/{chunk}/0", _stored(part, "<f2")
    yield "tokens/c/0", _stored(signatures.tokens, "<i4")
    yield "chunks/c/0", _stored(signatures.chunks, "<i4")


def _stored(values: npt.NDArray[Any], dtype: str) -> memoryview:
    return np.ascontiguousarray(values, dtype=dtype).data.cast("B")


def checksums(store: Store, group_key: str) -> dict[str, int]:
    """CRC-32C of every stored object of a group, by its key below the group."""
    prefix = f"{group_key}/"
    # with the size: the checksum of a body that was cut would be recorded, and refuse the whole one for ever
    found = sorted(store.list(prefix))
    with ContextPool(_READ_BACK) as pool:
        sums = pool.ahead(lambda item: stored_crc32c(store, item[0], size=item[1]), found, _READ_BACK)
        return {key.removeprefix(prefix): value for (key, _), value in zip(found, sums, strict=True)}


def read_record(store: Store, identity: str, block_id: str) -> BlockRecord:
    """Completion record of a block.

    Raises
    ------
    IntegrityError
        The block is not in the index.
    """
    key = f"indexes/{identity}/blocks/{block_id}.json"
    try:
        found = store.get_json(key, format_version=FORMAT_VERSION, shape=BlockShape, holds={"block_id": block_id})
        return BlockRecord.from_json(found)
    except MissingObjectError:
        raise DamagedError(
            f"block {block_id} is not in index {identity[:12]}; run `curate index`", store.url(key)
        ) from None


def read_records(store: Store, identity: str, block_ids: Iterable[str]) -> dict[str, BlockRecord]:
    """Completion records of many blocks."""
    wanted = list(block_ids)
    with ContextPool(_READERS) as pool:
        return dict(zip(wanted, pool.map(lambda block: read_record(store, identity, block), wanted), strict=True))


def read_counts(store: Store, identity: str, record: BlockRecord,
                ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:  # fmt: skip
    """Tokens and chunks of a block's rows, each [rows] int32, checked.

    Raises
    ------
    IntegrityError
        A stored object is missing or differs from its checksum.
    """
    tokens, chunks = (_read_checked(store, identity, record, f"{name}/c/0") for name in ("tokens", "chunks"))
    return np.frombuffer(tokens, dtype="<i4"), np.frombuffer(chunks, dtype="<i4")


def iter_signatures(store: Store, identity: str, record: BlockRecord) -> Iterator[Float16Array]:
    """A block's signatures chunk by chunk, each [chunk_rows or fewer, dim] float16, checked on the way.

    Raises
    ------
    IntegrityError
        A chunk is missing or differs from its checksum.
    """
    for chunk in range(-(-record.rows // record.chunk_rows)):
        yield read_chunk(store, identity, record, chunk)


def read_chunk(store: Store, identity: str, record: BlockRecord, chunk: int) -> Float16Array:
    """The rows of one chunk, [chunk_rows or fewer, dim] float16, checked.

    Reads the stored object itself: uncompressed little-endian rows, which NumPy can use in place.

    Raises
    ------
    IntegrityError
        The chunk is missing or differs from its checksum.
    """
    return _rows_of(_read_checked(store, identity, record, f"signature/c/{chunk}/0"), record, chunk)


def map_chunk(
    store: Store, identity: str, record: BlockRecord, chunk: int
) -> tuple[Float16Array, Callable[[int], None]]:
    """The rows of one chunk of a store on a disk, where the system has them, and what holds their checksum.

    The function takes the CRC-32C of the rows' bytes, and raises IntegrityError where it is not what was written.

    Raises
    ------
    IntegrityError
        The chunk is missing or has another size.
    """
    key = _chunk_key(identity, record, chunk)
    with _named(store, key):
        data = store.mapped(key)
    due = 2 * record.chunk_rows * record.dim
    if len(data) != due:
        raise DamagedError(
            f"{store.url(key)} has {len(data):,} bytes, {due:,} were written; `curate verify --deep` notes it, and the "
            "next run computes it again",
            store.url(key),
        )
    rows = _rows_of(data, record, chunk)

    def check(value: int) -> None:
        if crc32c(data[rows.nbytes :], value) != record.crc32c.get(f"signature/c/{chunk}/0"):
            _refuse(store, key)

    return rows, check


def _rows_of(data: memoryview, record: BlockRecord, chunk: int) -> Float16Array:
    rows = min(record.chunk_rows, record.rows - chunk * record.chunk_rows)
    return np.frombuffer(data, dtype="<f2").reshape(record.chunk_rows, record.dim)[:rows]


def _chunk_key(identity: str, record: BlockRecord, chunk: int) -> str:
    return f"indexes/{identity}/blocks/{record.block_id}.zarr/signature/c/{chunk}/0"


def read_rows(store: Store, identity: str, places: Sequence[tuple[BlockRecord, int]], *,
              is_known: Callable[[int, Float16Array], bool] | None = None) -> Float16Array:  # fmt: skip
    """Some rows, each named by its block and its place there, [places, dim] float16, by a range of bytes each.

    A range has no checksum of its own; what is not of unit length, or zero, is refused.

    Parameters
    ----------
    is_known
        Of a number in `places` and the row that stands there: whether it is the one that the caller has seen before.
        Rows are then held against that instead.

    Raises
    ------
    IntegrityError
        A chunk is missing, or what stands there is no signature, or not the known one.
    """

    def read(number: int) -> Float16Array:
        record, place = places[number]
        chunk, row = divmod(place, record.chunk_rows)
        key = _chunk_key(identity, record, chunk)

        def look() -> Float16Array:
            data = _read_range(store, key, 2 * row * record.dim, 2 * record.dim)
            if len(data) == record.dim and (is_known(number, data) if is_known else _is_signature(data)):
                return data
            where = store.url(key)
            raise DamagedError(
                f"row {place} of {where} is not what it was a moment ago; `curate verify --deep` notes it, and the "
                "next run computes it again"
                if is_known
                else f"{where} has no signature of row {place}; run `curate verify --deep`, which notes what is "
                "damaged, and `curate index`",
                where,
            )

        return store.checked(key, look)

    if store.is_local:  # threads would only wait for each other
        rows = [read(number) for number in range(len(places))]
    else:
        with ContextPool(_READERS) as pool:
            rows = list(pool.map(read, range(len(places))))
    return np.stack(rows)


def _read_range(store: Store, key: str, start: int, length: int) -> Float16Array:
    """Part of an object; nothing where the object is missing or ends before it."""
    try:
        return np.frombuffer(store.get_range(key, start, length), "<f2")
    except MissingObjectError:
        return np.empty(0, np.float16)
    except StoreError:
        if (store.size(key) or 0) >= start + length:
            raise
        return np.empty(0, np.float16)


def _is_signature(data: Float16Array) -> bool:
    norm = float(np.linalg.norm(data.astype(np.float64)))
    return abs(norm - 1) < _NORM_ERROR or norm == 0


def _read_checked(store: Store, identity: str, record: BlockRecord, name: str) -> memoryview:
    """A stored object of a block, which must be what its record says."""
    key = f"indexes/{identity}/blocks/{record.block_id}.zarr/{name}"
    return store.checked(key, lambda: _read_once(store, key, record.crc32c.get(name)))


def _read_once(store: Store, key: str, expected: int | None) -> memoryview:
    with _named(store, key):
        data = store.get_buffer(key)
    if crc32c(data) != expected:
        _refuse(store, key)
    return data


@contextmanager
def _named(store: Store, key: str) -> Iterator[None]:
    try:
        yield
    except MissingObjectError:
        raise DamagedError(
            f"{store.url(key)} is missing; run `curate index` to compute it again", store.url(key)
        ) from None


def _refuse(store: Store, key: str) -> NoReturn:
    raise DamagedError(
        f"{store.url(key)} does not match the checksum in its block's record; `curate verify --deep` notes it, and "
        "the next run computes it again",
        store.url(key),
    )


def _is_whole(sizes: Mapping[str, int], prefix: str, rows: int, dim: int) -> bool:
    """Whether a listing shows every object of a group, in full size."""
    nodes = ("zarr.json", "signature/zarr.json", "tokens/zarr.json", "chunks/zarr.json")
    return all(f"{prefix}{name}" in sizes for name in nodes) and all(
        sizes.get(f"{prefix}{name}") == size for name, size in _sizes(rows, dim).items()
    )


def _sizes(rows: int, dim: int) -> dict[str, int]:
    """Bytes of every stored chunk of a group, by its key below the group."""
    chunk_rows, chunks = _chunking(rows, dim)
    signature = {f"signature/c/{chunk}/0": chunk_rows * dim * 2 for chunk in range(chunks)}
    return signature | {"tokens/c/0": rows * 4, "chunks/c/0": rows * 4}


def _chunking(rows: int, dim: int) -> tuple[int, int]:
    """Rows of a chunk and number of chunks: as few chunks of at most CHUNK_BYTES as hold the rows, evenly.

    A row that is longer has a chunk of its own.
    """
    most = max(1, CHUNK_BYTES // (2 * dim))
    chunk_rows = -(-rows // -(-rows // most))
    return chunk_rows, -(-rows // chunk_rows)


def _discard_damaged(store: Store, identity: str, block_id: str, sizes: Mapping[str, int],
                     expected: Mapping[str, int]) -> None:  # fmt: skip
    """Remove what cannot be right of an incomplete block: chunks of a wrong size, and, where there is a record,
    objects that differ from it, and the record, last.

    All else stays: an object store shows an object whole or not at all, so what an interrupted attempt left is
    good, and another worker may be writing right now.
    """
    prefix = f"indexes/{identity}/blocks/{block_id}.zarr/"
    key = f"indexes/{identity}/blocks/{block_id}.json"
    recorded = read_record(store, identity, block_id).crc32c if store.exists(key) else None
    for name, size in {key.removeprefix(prefix): size for key, size in sizes.items()}.items():
        misshapen = expected.get(name, size) != size
        if misshapen or (recorded and crc32c(store.get_buffer(f"{prefix}{name}")) != recorded.get(name)):
            store.delete([f"{prefix}{name}"])
    if recorded is not None:
        store.delete([key])
