"""The index directory of the reference RISE implementation, format version 1: names, configuration, tables.

    build_plan.json           format, rows, dim, block size, attributes; fixed when a build begins
    projections.npz           {h,r,g}_buckets int32, {h,r,g}_signs int8, {h,r,g}_out_dim int64
    shards/vectors-00000.npy  float16 [rows, dim], one file a block of `block_size` rows
    shards/meta-00000.jsonl   one line a row: idx, length, tok_len, num_chunks, text (its first 200 characters), label
    shards/block-00000.json   block, start, rows, sha256 of the vectors, stats; written when the other two are there
    manifest.json             the plan, shards, build_totals; written last: only a finished index has it

Both implementations compute the same estimator (arXiv 2604.16197) and draw the same tables from a seed, so vectors can
be exchanged bit by bit. `rise_ops.exchange_read` reads a directory, `exchange_import` takes its vectors into a store,
`exchange_write` writes one. What is here serves all three.

A row of such an index is named by its number in the data file, counted over all rows, also those that ingestion
rejected; blank lines are no rows.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from pydantic import ValidationError

from rise_ops.blocks import MAX_ROWS
from rise_ops.chunking import CHUNK_OVERLAP, CHUNK_TOKENS, MIN_TOKENS, QUERY_TOKENS, row_chunks
from rise_ops.config import SketchConfig
from rise_ops.corpus import SourceEntry
from rise_ops.errors import ConfigError, IntegrityError
from rise_ops.objects import places_key
from rise_ops.sketch import CountSketch, SketchTables
from rise_ops.store import Store
from rise_ops.tables import iter_table

FORMAT = "rise.signature-index"
FORMAT_VERSION = 1
WORKLOAD = "rise"
PLAN, MANIFEST, PROJECTIONS, SHARDS = "build_plan.json", "manifest.json", "projections.npz", "shards"
PREVIEW_CHARACTERS = 200
BOOST = 160
"""With RH alone, the reference raises a smaller `Kr` to `rh_only_Kr_boost`, which is this by default."""

CHANNELS = ("rh", "gh", "rg")
"""Order of the channels in a vector, whatever `fusion_mode` says."""

_DEFAULTS: Mapping[str, Any] = {
    "fusion_mode": "rh+gh",
    "lambda_rh": 1.0,
    "lambda_gh": 0.3,
    "lambda_rg": 0.5,
    "Kr": 128,
    "Kh": 128,
    "Kg": 64,
    "rh_only_Kr_boost": BOOST,
    "adaptive_topL": True,
    "topL_cum_prob": 0.92,
    "max_topL_cap": 256,
    "min_topL": 4,
    "fallback_topL": 32,
    "tau_fallback": 0.1,
    "eps": 1e-8,
    "seed": 42,
}
_FIXED: Mapping[str, Any] = {
    "adaptive_temperature": False,
    "embedding_type": "output",
    "seq_len": QUERY_TOKENS,
    "min_seq_len": MIN_TOKENS,
    "chunk_long_sequences": True,
    "chunk_size": CHUNK_TOKENS,
    "chunk_overlap": CHUNK_OVERLAP,
    "normalize_sample": True,
    "sample_format": "auto",
    "gt_slot": "replace",
    "l2_eps": "norm",
}
"""What our estimator does, and nothing else."""
_WITHOUT_EFFECT: Mapping[str, Any] = {"target_entropy": 4.8, "tau_min": 0.1, "tau_max": 2.5, "tau_search_steps": 15}
"""Of the adaptive temperature, which is off."""
_STORED = ("sketch_rng",)
"""How the tables were drawn; they are stored."""
_OURS: Mapping[str, str] = {
    "weight_rh": "lambda_rh",
    "weight_gh": "lambda_gh",
    "weight_rg": "lambda_rg",
    "dim_r": "Kr",
    "dim_h": "Kh",
    "dim_g": "Kg",
    "mass": "topL_cum_prob",
    "top_k": "max_topL_cap",
    "min_support": "min_topL",
    "adaptive_support": "adaptive_topL",
    "temperature": "tau_fallback",
    "seed": "seed",
    "eps": "eps",
    "channels": "fusion_mode",
}
_PROBES = 32
_NPY_HEADER = 4_096


def shard_names(block: int) -> tuple[str, str, str]:
    """Vectors, metadata and completion record of a block, below the directory."""
    return (f"{SHARDS}/vectors-{block:05d}.npy", f"{SHARDS}/meta-{block:05d}.jsonl", f"{SHARDS}/block-{block:05d}.json")


def to_sketch(config: Mapping[str, Any], *, where: str) -> SketchConfig:
    """Our configuration of the same estimator; fields that are absent have the reference's defaults.

    Parameters
    ----------
    config
        `attrs.config` of an index.
    where
        File, for messages.

    Raises
    ------
    ConfigError
        It asks for something that our estimator does not compute; the message names the field.
    """
    known = {*_DEFAULTS, *_FIXED, *_WITHOUT_EFFECT, *_STORED}
    for name, value in config.items():
        if name in _FIXED and (value != _FIXED[name] or isinstance(value, bool) != isinstance(_FIXED[name], bool)):
            raise ConfigError(
                f"{where}: config.{name} is {str(value)[:60]!r}; rise-ops computes signatures with {_FIXED[name]!r} "
                "only, so vectors of this index cannot be compared with its own"
            )
        if name not in known:
            raise ConfigError(
                f"{where}: config.{name[:60]} is not a field that rise-ops knows; it may mean another sketch"
            )
    found = {**_DEFAULTS, **config}
    fusion = found["fusion_mode"]
    asked = [part.strip() for part in fusion.split("+")] if isinstance(fusion, str) else []
    channels = tuple(channel for channel in CHANNELS if channel in asked)
    if not channels or sorted(channels) != sorted(asked):
        raise ConfigError(f"{where}: config.fusion_mode is {str(fusion)[:60]!r}; it must join some of rh, gh, rg by +")
    fields = {ours: found[theirs] for ours, theirs in _OURS.items() if ours != "channels"}
    if not found["adaptive_topL"]:
        fields["top_k"] = found["fallback_topL"]
    try:
        if channels == ("rh",):
            fields["dim_r"] = max(fields["dim_r"], found["rh_only_Kr_boost"])
        return SketchConfig.model_validate({"channels": channels, **fields}, strict=True)
    except (ValidationError, TypeError) as error:
        detail = error.errors(include_url=False, include_input=False)[0] if isinstance(error, ValidationError) else None
        name = _OURS.get(str(detail["loc"][0]), "") if detail else "rh_only_Kr_boost"
        problem = str(detail["msg"]) if detail else "must be a number"
        raise ConfigError(f"{where}: config.{name} is {str(found.get(name))[:60]!r}: {problem}") from None


def from_sketch(sketch: SketchConfig) -> dict[str, Any]:
    """The reference's configuration of the same estimator, all fields.

    Raises
    ------
    ConfigError
        The channels are in another order than the reference's, which is part of the vectors' layout.
    """
    if sketch.channels != tuple(channel for channel in CHANNELS if channel in sketch.channels):
        raise ConfigError(
            f"sketch.channels is {list(sketch.channels)}; the reference's vectors have them in the order "
            f"{', '.join(CHANNELS)}, so this index cannot be exported"
        )
    found = {theirs: getattr(sketch, ours) for ours, theirs in _OURS.items() if ours != "channels"}
    if not sketch.adaptive_support:
        found["fallback_topL"] = sketch.top_k
    boost = min(BOOST, sketch.dim_r) if sketch.channels == ("rh",) else BOOST
    own = {"fusion_mode": "+".join(sketch.channels), "rh_only_Kr_boost": boost}
    fixed = {name: _FIXED[name] for name in _FIXED if name not in ("sample_format", "gt_slot", "l2_eps")}
    # the last three are left out at their defaults by the reference, too
    return {**_DEFAULTS, **_WITHOUT_EFFECT, **fixed, **found, **own}


def effective(sketch: SketchConfig) -> dict[str, Any]:
    """The fields of a sketch that decide on its vectors and tables: with equal ones, both are the same."""
    unused = {f"weight_{channel}" for channel in CHANNELS if channel not in sketch.channels}
    if not sketch.adaptive_support:
        unused |= {"mass", "min_support"}
    return {name: value for name, value in sketch.model_dump().items() if name not in unused}


def projections_sha256(tables: SketchTables) -> str:
    """The reference's hash of tables: over names and bytes of the nine arrays, in sorted order of names."""
    digest = hashlib.sha256()
    for name, array in sorted(projection_arrays(tables).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def projection_arrays(tables: SketchTables) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `projections.npz`."""
    widths = {f"{name}_out_dim": np.array(width, "<i8") for name, width in tables.widths.items()}
    return {**{name: array.astype(array.dtype.newbyteorder("<")) for name, array in tables.arrays().items()}, **widths}


def read_projections(path: Path, sketch: SketchConfig, *, vocab_size: int, hidden_dim: int) -> SketchTables:
    """The tables of an index; nothing is unpickled, and no array is larger than model and sketch allow.

    Raises
    ------
    IntegrityError
        The file is missing, damaged, or holds other tables than those of such a model and sketch.
    """
    inputs = {"h": hidden_dim, "g": hidden_dim, "r": vocab_size}
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, count in inputs.items():
                width = int(_npy(archive, path, f"{name}_out_dim", "<i8", ())[()])
                if width != (wanted := getattr(sketch, f"dim_{name}")):
                    raise IntegrityError(f"{path}: {name}_out_dim is {width}, the configuration says {wanted}")
                buckets = _npy(archive, path, f"{name}_buckets", "<i4", (count,)).astype(np.int64)
                signs = _npy(archive, path, f"{name}_signs", "|i1", (count,))
                if buckets.min(initial=0) < 0 or buckets.max(initial=0) >= width:
                    raise IntegrityError(f"{path}: {name}_buckets has entries outside 0 to {width - 1}")
                if not np.isin(signs, (-1, 1)).all():
                    raise IntegrityError(f"{path}: {name}_signs has entries that are neither 1 nor -1")
                found[name] = CountSketch(torch.from_numpy(buckets), torch.from_numpy(signs.copy()), width)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; copy the whole directory") from None
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise IntegrityError(f"{path} is damaged ({error}); copy it again") from error
    return SketchTables(**found)


def _npy(archive: zipfile.ZipFile, path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """One array of an archive, which must be of this type and shape."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    try:
        held = archive.getinfo(f"{name}.npy").file_size
    except KeyError:
        raise IntegrityError(f"{path} has no array {name}; copy it again") from None
    if not size < held <= size + _NPY_HEADER:
        raise IntegrityError(f"{path}: {name} has {held:,} bytes, expected were {size:,} and a header")
    with archive.open(f"{name}.npy") as file:
        header = npy_header(file, f"{path}: {name}")
        if header != (np.dtype(dtype), shape):
            raise IntegrityError(f"{path}: {name} is {header[0]} {list(header[1])}, expected was {dtype} {list(shape)}")
        data = file.read()
    if len(data) != size:
        raise IntegrityError(f"{path}: {name} has {len(data):,} bytes of data, expected were {size:,}")
    return np.frombuffer(data, dtype).reshape(shape)


def npy_header(file: Any, where: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape that an .npy file declares; it is left at its data.

    Raises
    ------
    IntegrityError
        It is no such file, or its rows are not one after the other.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_columns, dtype = read(file, max_header_size=_NPY_HEADER)
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise IntegrityError(f"{where} is not an .npy file ({str(error)[:100]}); copy it again") from error
    if dtype.hasobject:
        raise IntegrityError(f"{where} holds pickled objects, which are not read")
    if by_columns and len(shape) > 1:
        raise IntegrityError(f"{where} is stored column by column; it must be row by row")
    return dtype, shape


def unembedding_probe(weight: torch.Tensor) -> list[float]:
    """Some entries of an LM head [V, D] by which the reference tells models apart, at places drawn with seed 0."""
    draw = np.random.default_rng(0)
    rows = torch.from_numpy(draw.integers(0, weight.shape[0], _PROBES))
    columns = torch.from_numpy(draw.integers(0, weight.shape[1], _PROBES))
    picked: list[float] = weight.detach()[rows.to(weight.device), columns.to(weight.device)].float().cpu().tolist()
    return picked


def chunk_counts(tokens: int) -> tuple[int, int]:
    """Chunks of a row of so many tokens, and their tokens; overlaps count twice."""
    chunks = row_chunks(0, tokens)
    return len(chunks), sum(len(chunk) for chunk in chunks)


def iter_places(store: Store, entry: SourceEntry) -> Iterator[pl.DataFrame]:
    """Where the accepted rows of a source object are: block_id, block_row, idx (number in the file), in its order.

    A frame holds rows of one block, and is at most a block long.

    Raises
    ------
    IntegrityError
        The record of the object is missing or damaged.
    """
    key = places_key(entry.record)
    rejected = np.empty(0, np.int64)
    for frame in iter_table(store, key, columns=("source_row", "reason"), rows=MAX_ROWS):
        held = frame.filter(pl.col("reason").is_not_null())["source_row"].to_numpy()
        rejected = np.concatenate([rejected, held]) if len(held) else rejected
    rejected.sort()
    columns = ("block_id", "block_row", "source_row")
    if entry.pack is None:
        frames = (frame.drop_nulls("block_id") for frame in iter_table(store, key, columns=columns, rows=MAX_ROWS))
    else:
        mine = pl.col("object_sha") == entry.object_sha
        table = iter_table(store, places_key(entry.pack), columns=(*columns, "object_sha"), rows=MAX_ROWS)
        frames = (frame.filter(mine).drop("object_sha") for frame in table)
    done = 0
    for frame in frames:
        if frame.height:
            behind = np.searchsorted(rejected, frame["source_row"].to_numpy())
            numbers = done + np.arange(frame.height, dtype=np.int64) + behind
            done += frame.height
            yield frame.drop("source_row").with_columns(idx=pl.Series(numbers))
