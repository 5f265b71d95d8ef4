"""The compressed index: SimHash codes of an index, block by block.

    indexes/<index_id>/codes/<bits>-<seed>/simhash.npz       the rotation (`rise_ops.simhash`), written first
    indexes/<index_id>/codes/<bits>-<seed>/<block_id>.bin    [rows, bits/8] uint8
    indexes/<index_id>/codes/<bits>-<seed>/<block_id>.json   rows, rotation and CRC-32C; last

Codes are made from the float signatures of the index, without the model. At the default width and 8,192 bits they are
48 times smaller. Where a row has no signature its code means nothing, and searches leave it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rise_ops.alive import alive_if_possible
from rise_ops.checksums import crc32c
from rise_ops.config import CurationConfig, SimHashConfig
from rise_ops.counters import count
from rise_ops.damage import noted_keys, settle
from rise_ops.errors import DamagedError, IntegrityError, MissingObjectError
from rise_ops.index import read_chunk, read_records
from rise_ops.logs import each_block
from rise_ops.progress import Progress, silent
from rise_ops.session import block_rows, open_indexed
from rise_ops.shapes import CodesShape
from rise_ops.simhash import Codes, SimHash
from rise_ops.store import Store
from rise_ops.trunk import pick_device
from rise_ops.tuning import settled

FORMAT_VERSION = 1


def codes_folder(identity: str, config: SimHashConfig) -> str:
    """Where the codes of an index are."""
    return f"indexes/{identity}/codes/{config.bits}-{config.seed}"


def open_simhash(store: Store, identity: str, config: SimHashConfig, *, dim: int) -> SimHash:
    """The rotation of some codes; drawn and stored now where the store has none, or one that is noted as damaged.

    Where it was lost and another PyTorch draws another one, codes of the lost one are removed.

    Raises
    ------
    IntegrityError
        What is stored is no rotation, or one for signatures of another length.
    """
    folder = codes_folder(identity, config)
    key = f"{folder}/simhash.npz"
    if noted_keys(store, key):
        store.delete([key])
    if not store.exists(key) and store.create(key, SimHash.from_seed(dim, config.bits, config.seed).to_bytes()):
        simhash = read_simhash(store, identity, config, dim=dim)
        for record in [name for name, _ in store.list(f"{folder}/") if name.endswith(".json")]:
            if store.get_json(record, shape=CodesShape)["simhash"] != simhash.identity:
                _remove(store, record.removesuffix(".json"))
        return simhash
    return read_simhash(store, identity, config, dim=dim)


def _remove(store: Store, stem: str) -> None:
    store.delete([f"{stem}.json"])  # what vouches for others goes first
    store.delete([f"{stem}.bin"])


def read_simhash(store: Store, identity: str, config: SimHashConfig, *, dim: int) -> SimHash:
    """The stored rotation.

    Raises
    ------
    MissingObjectError
        There are no such codes.
    IntegrityError
        What is stored is no rotation, or one for signatures of another length.
    """
    key = f"{codes_folder(identity, config)}/simhash.npz"
    try:
        found = SimHash.from_bytes(bytes(store.get(key)), where=store.url(key))
    except IntegrityError as error:
        raise DamagedError(
            f"{error}; run `curate verify`, which notes it, and `curate compress`", store.url(key)
        ) from error
    if (found.dim, found.bits) != (dim, config.bits):
        raise DamagedError(
            f"{store.url(key)} makes {found.bits:,} bits of {found.dim:,} numbers, expected were {config.bits:,} of "
            f"{dim:,}; remove the folder and run `curate compress`",
            store.url(key),
        )
    return found


def missing_codes(store: Store, identity: str, rows_of: Mapping[str, int], config: SimHashConfig) -> list[str]:
    """Blocks of `rows_of` (block id to rows) without whole codes, by one listing, or with codes noted as damaged."""
    prefix = f"{codes_folder(identity, config)}/"
    sizes = {key.removeprefix(prefix): size for key, size in store.list(prefix)}
    if "simhash.npz" not in sizes:
        return list(rows_of)
    noted = {key.removeprefix(prefix).partition(".")[0] for key in noted_keys(store, prefix)}
    return [
        block_id
        for block_id, rows in rows_of.items()
        if block_id in noted
        or f"{block_id}.json" not in sizes
        or sizes.get(f"{block_id}.bin") != rows * config.bits // 8
    ]


def write_codes(store: Store, identity: str, block_ids: Sequence[str], config: SimHashConfig, *, dim: int,
                device: str = "auto", progress: Progress = silent) -> int:  # fmt: skip
    """Make and store the codes of blocks that are in the index. Returns the number of rows.

    One chunk of signatures and the codes of one block are in memory at a time. What is there already but not whole,
    or not what its record says, is written again.

    Raises
    ------
    IntegrityError
        A block is not in the index, or damaged.
    """
    simhash, place = open_simhash(store, identity, config, dim=dim), pick_device(device)
    folder, rotation = codes_folder(identity, config), simhash.identity
    done, row = 0, config.bits // 8
    for block_id, record in each_block(read_records(store, identity, block_ids).items(), lambda item: item[0]):
        done += record.rows
        if store.exists(f"{folder}/{block_id}.json") and _is_whole(store, f"{folder}/{block_id}", record.rows * row):
            continue
        codes = np.empty((record.rows, row), np.uint8)
        for chunk in range(-(-record.rows // record.chunk_rows)):
            signatures = read_chunk(store, identity, record, chunk)
            start = chunk * record.chunk_rows
            codes[start : start + len(signatures)] = simhash.codes(signatures, device=place)
        _write(store, f"{folder}/{block_id}", codes, block_id, rotation)
        progress(done, None)
    count("rows", done)
    return done


def _write(store: Store, stem: str, codes: Codes, block_id: str, rotation: str) -> None:
    """Store codes and then their record, unless they are there; what another worker wrote is as good."""
    data = codes.tobytes()
    if not store.create(f"{stem}.bin", data) and not _is_whole(store, stem, len(data)):
        _remove(store, stem)
        store.create(f"{stem}.bin", data)
    stored = crc32c(store.get_buffer(f"{stem}.bin", size=len(data)))
    record = {"block_id": block_id, "rows": len(codes), "simhash": rotation, "crc32c": stored}
    store.create_json(f"{stem}.json", {"format_version": FORMAT_VERSION, **record})


def _is_whole(store: Store, stem: str, size: int) -> bool:
    """Whether stored codes are what their record says, or of the right size where they have none yet."""
    try:
        data = store.get_buffer(f"{stem}.bin")
    except MissingObjectError:
        return False
    try:
        expected = store.get_json(f"{stem}.json", shape=CodesShape)["crc32c"]
    except MissingObjectError:
        return len(data) == size
    except IntegrityError:
        return False
    return len(data) == size and crc32c(data) == expected


def compress_corpus(store: Store, config: CurationConfig, *, progress: Progress = silent) -> dict[str, Any]:
    """Write the codes that the configured corpus lacks.

    Returns
    -------
    dict
        {index_id, folder, rows, rows_written, bits, bytes, index_bytes}

    Raises
    ------
    SourceError, ModelError
        Nothing was ingested, or the corpus is not wholly in the index of this model and sketch.
    """
    codes = config.simhash or SimHashConfig()
    with alive_if_possible(store, "compression"):
        config = settled(store, config)
        indexed = open_indexed(store, config)
        rows_of = block_rows(store, indexed.version)
        missing = missing_codes(store, indexed.index_id, rows_of, codes)
        written = write_codes(store, indexed.index_id, missing, codes, dim=config.sketch.dim,
                              device=config.model.device, progress=progress)  # fmt: skip
        settle(store, prefix=f"{codes_folder(indexed.index_id, codes)}/")
    rows = sum(rows_of.values())
    return {
        "index_id": indexed.index_id,
        "folder": store.url(codes_folder(indexed.index_id, codes)),
        "rows": rows,
        "rows_written": written,
        "bits": codes.bits,
        "bytes": rows * codes.bits // 8,
        "index_bytes": rows * config.sketch.dim * 2,
    }


def read_codes(store: Store, identity: str, block_id: str, config: SimHashConfig, *, rotation: str) -> Codes:
    """The codes of a block, uint8 [rows, bits/8], checked.

    Parameters
    ----------
    rotation
        `SimHash.identity` of the rotation that queries are turned with.

    Raises
    ------
    DamagedError
        They are missing, or not what their record says, or of another rotation.
    """
    key = f"{codes_folder(identity, config)}/{block_id}"
    shape = CodesShape

    def read() -> Codes:
        try:
            record = store.get_json(
                f"{key}.json", format_version=FORMAT_VERSION, shape=shape, holds={"block_id": block_id}
            )
            data = store.get_buffer(f"{key}.bin")
        except MissingObjectError:
            raise DamagedError(
                f"{store.url(key)}.* has no codes of block {block_id}; run `curate compress`", store.url(f"{key}.json")
            ) from None
        if len(data) != record["rows"] * config.bits // 8 or crc32c(data) != record["crc32c"]:
            raise DamagedError(
                f"{store.url(key)}.bin does not match its record; run `curate verify --deep`, which notes it, and then "
                "`curate compress`",
                store.url(f"{key}.bin"),
            )
        if record["simhash"] != rotation:
            raise DamagedError(
                f"{store.url(key)}.json: these codes were made with another rotation; remove {store.url(key)}.* and "
                "run `curate compress`",
                store.url(f"{key}.json"),
            )
        return np.frombuffer(data, np.uint8).reshape(record["rows"], config.bits // 8)

    return store.checked(f"{key}.bin", read)
