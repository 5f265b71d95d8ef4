"""What an index directory of the reference implementation says about itself, held against what is there.

Everything here is of unknown origin: sizes are bounded before anything is read, names must be those of the format, and
whatever is wrong ends as one error that names the file and the field.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from pydantic import Field, TypeAdapter, ValidationError

from rise_ops.config import SketchConfig
from rise_ops.documents import Count
from rise_ops.errors import IntegrityError
from rise_ops.exchange import FORMAT, FORMAT_VERSION, MANIFEST, PLAN, WORKLOAD, npy_header, to_sketch
from rise_ops.filters import as_label
from rise_ops.shapes import Width

META = {"idx": pl.Int64, "length": pl.Int64, "tok_len": pl.Int64, "num_chunks": pl.Int64, "text": pl.String,
        "label": pl.String}  # fmt: skip
"""Columns of `ReferenceIndex.rows`; labels that are not text are JSON."""

_MANIFEST_BYTES = 256 * 2**20
_LINE_BYTES = 4 * 2**20
_VECTORS = re.compile(r"shards/vectors-[0-9]{5,9}\.npy")
_META = re.compile(r"shards/meta-[0-9]{5,9}\.jsonl")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTS = ("idx", "length", "tok_len", "num_chunks")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of vectors and its metadata."""

    file: str
    meta: str
    start: Count
    """Number of its first row."""
    rows: Count
    sha256: str
    """Of the file of vectors."""


@dataclass(frozen=True, slots=True)
class ReferenceModel:
    """What an index says about its model."""

    vocab_size: Annotated[int, Field(ge=2, le=2**24)]
    hidden_dim: Width
    name_or_path: str = ""
    backend: str = ""
    dtype: str = ""
    unembedding_probe: list[float] | None = None
    """Some entries of its LM head."""


@dataclass(frozen=True, slots=True)
class ReferenceData:
    """What an index says about its data file."""

    rows: Count
    file: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class _Attributes:
    workload: str
    config: dict[str, Any]
    model: ReferenceModel
    projections_sha256: str
    data: ReferenceData


@dataclass(frozen=True, slots=True)
class Manifest:
    """What is used of manifest.json."""

    num_rows: Count
    dim: Width
    dtype: str
    block_size: Annotated[int, Field(ge=1, lt=2**40)]
    num_blocks: Count
    attrs: _Attributes
    shards: list[Shard]


@dataclass(frozen=True, slots=True)
class Description:
    """A manifest that adds up."""

    manifest: Manifest
    sketch: SketchConfig
    data: bytes
    """The file."""


def read_manifest(folder: Path) -> Description:
    """The manifest of a finished index, with everything checked but the contents of vectors and metadata.

    Raises
    ------
    ConfigError
        Its sketch is one that our estimator does not compute.
    IntegrityError
        It is not finished, of a newer format, or something in it does not add up.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = "its build has not come to its end" if (folder / PLAN).is_file() else "it is no index directory"
        raise IntegrityError(f"{path} is missing: {begun}. Only a finished index can be read")
    data = _bytes(path)
    raw = _document(data, path)
    _refuse_other_format(raw, path)
    found: Manifest = _validated(Manifest, data, path)
    _refuse_other_plan(raw, folder / PLAN)
    sketch = to_sketch(found.attrs.config, where=str(path))
    _refuse_sums(found, sketch, path)
    for shard in found.shards:
        _refuse_shard(folder, shard, found.dim, path)
    return Description(found, sketch, data)


def _refuse_other_format(raw: dict[str, Any], path: Path) -> None:
    if raw.get("format") != FORMAT:
        raise IntegrityError(f"{path}: format is {str(raw.get('format'))[:80]!r}, expected was {FORMAT!r}")
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise IntegrityError(f"{path}: format_version is {str(version)[:80]!r}, which is no version")
    if version > FORMAT_VERSION:
        raise IntegrityError(
            f"{path}: format_version is {version}, this program reads up to {FORMAT_VERSION}; upgrade it, or export "
            "the index without compression"
        )
    attributes = raw.get("attrs")
    workload = attributes.get("workload") if isinstance(attributes, dict) else None
    if workload != WORKLOAD:
        raise IntegrityError(f"{path}: attrs.workload is {str(workload)[:80]!r}, expected was {WORKLOAD!r}")


def _refuse_other_plan(raw: dict[str, Any], path: Path) -> None:
    """The plan is part of the manifest, word for word."""
    if not path.is_file():
        raise IntegrityError(f"{path} is missing; copy the whole directory")
    for name, value in _document(_bytes(path), path).items():
        if raw.get(name) != value:
            raise IntegrityError(f"{path}: {name[:60]} is not what {MANIFEST} says; they belong to different builds")


def _refuse_sums(found: Manifest, sketch: SketchConfig, path: Path) -> None:
    if found.dtype != "float16":
        raise IntegrityError(f"{path}: dtype is {found.dtype[:40]!r}, expected was 'float16'")
    if found.dim != sketch.dim:
        raise IntegrityError(f"{path}: dim is {found.dim:,}, attrs.config makes {sketch.dim:,}")
    if found.attrs.data.rows != found.num_rows:
        raise IntegrityError(f"{path}: attrs.data.rows is {found.attrs.data.rows:,}, num_rows {found.num_rows:,}")
    if not len(found.shards) == found.num_blocks == -(-found.num_rows // found.block_size):
        raise IntegrityError(
            f"{path}: {len(found.shards):,} shards, num_blocks {found.num_blocks:,}: {found.num_rows:,} rows in blocks "
            f"of {found.block_size:,} are {-(-found.num_rows // found.block_size):,}"
        )
    start = 0
    for number, shard in enumerate(found.shards):
        expected = min(found.block_size, found.num_rows - start)
        if shard.start != start or shard.rows != expected:
            raise IntegrityError(
                f"{path}: shards.{number} has {shard.rows:,} rows from {shard.start:,} on, expected were {expected:,} "
                f"from {start:,} on"
            )
        start += shard.rows
    for name in ("file", "meta"):
        if len({getattr(shard, name) for shard in found.shards}) < len(found.shards):
            raise IntegrityError(f"{path}: two shards have the same {name}")


def _refuse_shard(folder: Path, shard: Shard, dim: int, manifest: Path) -> None:
    for name, value, pattern in (("file", shard.file, _VECTORS), ("meta", shard.meta, _META)):
        if not pattern.fullmatch(value):
            raise IntegrityError(
                f"{manifest}: the {name} of a shard is {value[:80]!r}, which is not a name of its format"
            )
        if not (folder / value).is_file():
            raise IntegrityError(f"{folder / value} is missing; copy the whole directory")
    if not _SHA256.fullmatch(shard.sha256):
        raise IntegrityError(f"{manifest}: the sha256 of {shard.file} is {shard.sha256[:80]!r}, which is none")
    if shard.rows:
        data_start(folder / shard.file, shard.rows, dim)


def data_start(path: Path, rows: int, dim: int) -> int:
    """Where the data of a file of vectors begins, which must be of this size."""
    try:
        with path.open("rb") as file:
            dtype, shape = npy_header(file, str(path))
            start = file.tell()
        size = path.stat().st_size
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing; copy the whole directory") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror})") from error
    if dtype != np.dtype("<f2") or shape != (rows, dim):
        raise IntegrityError(f"{path} is {dtype} {list(shape)}, {MANIFEST} says float16 {[rows, dim]}")
    if size != start + 2 * rows * dim:
        raise IntegrityError(
            f"{path} has {size:,} bytes, {rows:,} rows of {dim:,} take {start + 2 * rows * dim:,}; copy it again"
        )
    return start


def read_meta(path: Path, shard: Shard) -> pl.DataFrame:
    """Metadata of a shard's rows: the columns of META.

    Raises
    ------
    IntegrityError
        A line is missing, one too many, or not what it should be.
    """
    columns: dict[str, list[Any]] = {name: [] for name in META}
    try:
        with path.open("rb") as file:
            for number in range(shard.rows):
                line = file.readline(_LINE_BYTES)
                _add_meta(columns, line, f"{path}: line {number + 1}", idx=shard.start + number)
            if file.read(1):
                raise IntegrityError(f"{path} has more than {shard.rows:,} lines, which {MANIFEST} says")
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror})") from error
    return pl.DataFrame(columns, schema=META)


def _add_meta(columns: dict[str, list[Any]], line: bytes, where: str, *, idx: int) -> None:
    if not line.strip():
        raise IntegrityError(f"{where} is not there; {MANIFEST} counts it")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not valid JSON, or too long ({str(error)[:100]})") from error
    if not isinstance(row, dict):
        raise IntegrityError(f"{where} is not a JSON object")
    for name in _COUNTS:
        value = row.get(name)
        if type(value) is not int or not 0 <= value < 2**63:
            raise IntegrityError(f"{where}: {name} is {str(value)[:40]!r}, expected was a number of 0 or more")
        columns[name].append(value)
    if row["idx"] != idx:
        raise IntegrityError(f"{where}: idx is {row['idx']:,}, expected was {idx:,}")
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise IntegrityError(f"{where}: text is not text")
    label = as_label(row.get("label"))
    for name, found in (("text", text), ("label", label)):  # a lone surrogate is no text for Arrow
        columns[name].append(None if found is None else found.encode("utf-8", "replace").decode())


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MANIFEST_BYTES + 1)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror})") from error
    if len(data) > _MANIFEST_BYTES:
        raise IntegrityError(f"{path} has more than {_MANIFEST_BYTES // 2**20} MiB, which no index needs")
    return data


def _document(data: bytes, path: Path) -> dict[str, Any]:
    found: dict[str, Any] = _validated(dict[str, Any], data, path)
    return found


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _validated(shape: Any, data: bytes, path: Path) -> Any:
    try:
        return _adapter(shape).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:200]
        raise IntegrityError(f"{path}{f': {name}' if name else ''}: {first['msg'][:200]}") from None
