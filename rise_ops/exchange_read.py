"""Reading an index directory of the reference implementation (`rise_ops.exchange`) where it stands.

Vectors are mapped into memory and never unpickled, metadata is read a shard at a time, so an index of any size can be
looked at and searched. What a directory says about itself is held against what is there: opening it checks names,
counts and sizes, and `ReferenceIndex.verify` every byte of the vectors.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field, TypeAdapter, ValidationError

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.documents import Count
from rise_ops.errors import ConfigError, IntegrityError, ModelError
from rise_ops.exchange import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    PROJECTIONS,
    WORKLOAD,
    npy_header,
    projections_sha256,
    read_projections,
    to_sketch,
    unembedding_probe,
)
from rise_ops.filters import as_label
from rise_ops.memory import TILE_ROWS
from rise_ops.progress import Progress, silent
from rise_ops.scan import Float32Array, smallest
from rise_ops.shapes import Width
from rise_ops.signatures import Signer
from rise_ops.sketch import SketchTables
from rise_ops.trunk import load_trunk

Float16Array = npt.NDArray[np.float16]

META = {"idx": pl.Int64, "length": pl.Int64, "tok_len": pl.Int64, "num_chunks": pl.Int64, "text": pl.String,
        "label": pl.String}  # fmt: skip
"""Columns of `ReferenceIndex.rows`; labels that are not text are JSON."""

_MANIFEST_BYTES = 256 * 2**20
_LINE_BYTES = 4 * 2**20
_HASHED_AT_ONCE = 8 * 2**20
_NORM_ERROR = 0.02
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
class _Manifest:
    num_rows: Count
    dim: Width
    dtype: str
    block_size: Annotated[int, Field(ge=1, lt=2**40)]
    num_blocks: Count
    attrs: _Attributes
    shards: list[Shard]


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceIndex:
    """A finished index of the reference implementation. Use `open_reference_index`.

    Examples
    --------
    >>> index = open_reference_index("indexes/howdy")           # doctest: +SKIP
    >>> index.search(signatures, k=10)                          # doctest: +SKIP
    >>> index.rows().filter(pl.col("label") == "x").collect()   # doctest: +SKIP
    """

    folder: Path
    sketch: SketchConfig
    """Its configuration, as ours."""
    tables: SketchTables = field(repr=False)
    """Its random projections, as stored."""
    model: ReferenceModel = field(repr=False)
    data: ReferenceData
    num_rows: int
    dim: int
    shards: tuple[Shard, ...] = field(repr=False)
    sha256: str
    """Of its manifest: names the index."""

    def vectors(self, shard: int) -> Float16Array:
        """Vectors of a shard, float16 [rows, dim], mapped into memory.

        Raises
        ------
        IntegrityError
            The file is not what the manifest says.
        """
        found = self.shards[shard]
        path = self.folder / found.file
        if not found.rows:
            return np.empty((0, self.dim), np.float16)
        return np.memmap(path, "<f2", "r", _data_start(path, found.rows, self.dim), (found.rows, self.dim))

    def shard_of(self, idx: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """In which shard rows are, by their numbers."""
        starts = np.array([shard.start for shard in self.shards], np.int64)
        return np.searchsorted(starts, idx, side="right").astype(np.int64) - 1

    def rows_of(self, shard: int) -> pl.DataFrame:
        """Metadata of a shard's rows: the columns of META.

        Raises
        ------
        IntegrityError
            A line is not what it should be; the message names it.
        """
        return _read_meta(self.folder / self.shards[shard].meta, self.shards[shard])

    def rows(self) -> pl.LazyFrame:
        """Metadata of all rows, a shard at a time: idx, length, tok_len, num_chunks, text (its beginning), label."""
        from polars.io.plugins import register_io_source

        def frames(
            columns: list[str] | None, predicate: pl.Expr | None, n_rows: int | None, batch_size: int | None
        ) -> Iterator[pl.DataFrame]:
            left = self.num_rows if n_rows is None else n_rows
            for number in range(len(self.shards)):
                if left <= 0:
                    return
                frame = self.rows_of(number).head(left)
                left -= frame.height
                frame = frame if columns is None else frame.select(columns)
                yield frame if predicate is None else frame.filter(predicate)

        return register_io_source(frames, schema=META)

    def verify(self, *, progress: Progress = silent) -> None:
        """Hash all vectors again, and look at each: finite, and of unit length or zero.

        Parameters
        ----------
        progress
            Counts rows.

        Raises
        ------
        IntegrityError
            Naming the file, and the row where it is one.
        """
        done = 0
        for shard in self.shards:
            for rows in self._verified(shard):
                done += rows
                progress(done, self.num_rows)

    def _verified(self, shard: Shard) -> Iterator[int]:
        path = self.folder / shard.file
        digest = hashlib.sha256()
        start = _data_start(path, shard.rows, self.dim)
        step = max(1, _HASHED_AT_ONCE // (2 * self.dim))
        with path.open("rb") as file:
            digest.update(file.read(start))
            for first in range(0, shard.rows, step):
                data = file.read(2 * self.dim * min(step, shard.rows - first))
                digest.update(data)
                if len(data) % (2 * self.dim):
                    raise IntegrityError(f"{path} ends early; copy it again")
                rows = np.frombuffer(data, "<f2").reshape(-1, self.dim).astype(np.float32)
                with np.errstate(all="ignore"):  # what is not finite is named below
                    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
                wrong = np.flatnonzero(~((np.abs(norms - 1) < _NORM_ERROR) | (norms == 0)))  # also where NaN
                if len(wrong):
                    raise IntegrityError(
                        f"{path}: row {shard.start + first + int(wrong[0])} is no signature (its length is "
                        f"{norms[wrong[0]]:.3g}, not 1 or 0)"
                    )
                yield len(rows)
        if digest.hexdigest() != shard.sha256:
            raise IntegrityError(
                f"{path} does not match the sha256 in {MANIFEST} ({shard.sha256[:12]}…, it has "
                f"{digest.hexdigest()[:12]}…); copy it again"
            )

    def search(self, queries: Float32Array, *, k: int = 10, bottom: bool = False,
               progress: Progress = silent) -> pl.DataFrame:  # fmt: skip
        """The k rows of highest (or lowest) influence on each query, without importing anything.

        Scores are summed in float64 and rounded once. Rows without a signature are left out; equal scores are in the
        order of the rows.

        Parameters
        ----------
        queries
            Unit signatures, [queries, dim]; `signer` makes them.
        progress
            Counts rows.

        Returns
        -------
        polars.DataFrame
            query, rank, idx, score, text (its beginning), label.

        Raises
        ------
        ConfigError
            The queries are of another width.
        IntegrityError
            A vector has entries that are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ConfigError(f"queries are {list(queries.shape)}; {self.folder} has signatures of width {self.dim:,}")
        exact = np.asarray(queries, np.float64).T
        best, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        sign = 1 if bottom else -1
        for number, shard in enumerate(self.shards):
            vectors = self.vectors(number)
            for first in range(0, shard.rows, TILE_ROWS):
                own = vectors[first : first + TILE_ROWS]
                usable = np.flatnonzero((own != 0).any(axis=1))
                with np.errstate(all="ignore"):  # what is not finite is named below
                    scores = (own[usable].astype(np.float64) @ exact).astype(np.float32)
                if not np.isfinite(scores).all():
                    row = shard.start + first + int(usable[np.flatnonzero(~np.isfinite(scores).all(axis=1))[0]])
                    raise IntegrityError(f"{self.folder / shard.file}: row {row} has entries that are not finite")
                numbers = np.broadcast_to(shard.start + first + usable, (len(queries), len(usable)))
                best, rows = smallest(k, best, rows, np.ascontiguousarray(scores.T), numbers, sign=sign)
                progress(shard.start + first + len(own), self.num_rows)
        return self._hits(best, rows)

    def _hits(self, scores: Float32Array, rows: npt.NDArray[np.int64]) -> pl.DataFrame:
        queries, width = rows.shape
        hits = pl.DataFrame(
            {
                "query": np.repeat(np.arange(queries, dtype=np.uint32), width),
                "rank": np.tile(np.arange(1, width + 1, dtype=np.uint32), queries),
                "idx": rows.ravel(),
                "score": scores.ravel(),
            }
        )
        wanted = pl.col("idx").is_in(np.unique(rows).tolist())
        shards = np.unique(self.shard_of(rows.ravel())).tolist()
        held = [self.rows_of(number).filter(wanted).select("idx", "text", "label") for number in shards]
        empty = pl.DataFrame(schema={name: META[name] for name in ("idx", "text", "label")})
        return hits.join(pl.concat([empty, *held]), on="idx", how="left", maintain_order="left")

    def signer(self, model: ModelConfig, *, memory: int, sketch: SketchConfig | None = None,
               any_name: bool = False) -> Signer:  # fmt: skip
        """Makes signatures that can be compared with those of this index.

        Parameters
        ----------
        model
            The model that the index was built with.
        memory
            Working memory in bytes, beside the model's weights.
        sketch
            A configuration that is the index' own in effect (`rise_ops.exchange.effective`), to be used in its place.
        any_name
            Take a model of another name, if its dimensions and its LM head are right.

        Raises
        ------
        ModelError
            It is another model; the message says in what they differ.
        """
        trunk = load_trunk(model)
        for name in ("vocab_size", "hidden_dim"):
            ours, theirs = getattr(trunk, name), getattr(self.model, name)
            if ours != theirs:
                raise ModelError(
                    f"{self.folder / MANIFEST}: attrs.model.{name} is {theirs:,}, that of model {model.name} {ours:,}; "
                    "configure the model that the index was built with"
                )
        self._refuse_other_head(trunk.model.get_output_embeddings().weight, model.name)
        named = self.model.name_or_path
        if named and not any_name and _last_part(named) != _last_part(model.name):
            raise ModelError(
                f"{self.folder / MANIFEST}: attrs.model.name_or_path is {named[:200]}, the configured model is "
                f"{model.name}; if they are the same weights, say so (--any-name)"
            )
        return Signer(trunk, sketch or self.sketch, tables=self.tables, memory=memory)

    def _refuse_other_head(self, weight: Any, name: str) -> None:
        """Entries of the LM head may be rounded, as by loading in another dtype, but not others."""
        if self.model.unembedding_probe is None:
            return
        theirs, ours = np.asarray(self.model.unembedding_probe), np.asarray(unembedding_probe(weight))
        if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=0.02, atol=0.002):
            worst = float(np.abs(theirs - ours).max()) if theirs.shape == ours.shape else float("nan")
            raise ModelError(
                f"{self.folder / MANIFEST}: attrs.model.unembedding_probe differs from the LM head of model {name} by "
                f"up to {worst:.3g}; configure the weights that the index was built with"
            )


def open_reference_index(folder: str | Path) -> ReferenceIndex:
    """A finished index directory of the reference implementation, checked but for the content of its vectors.

    Parameters
    ----------
    folder
        A local folder.

    Raises
    ------
    ConfigError
        There is no such folder, or its sketch is one that our estimator does not compute.
    IntegrityError
        It is not finished, of a newer format, or something in it does not add up; the message names file and field.
    """
    place = Path(folder).expanduser()
    if "://" in str(folder) or not place.is_dir():
        raise ConfigError(f"{folder} is not a folder; give the index directory, copied to a local disk")
    path = place / MANIFEST
    if not path.is_file():
        begun = "its build has not come to its end" if (place / PLAN).is_file() else "it is no index directory"
        raise IntegrityError(f"{path} is missing: {begun}. Only a finished index can be read")
    data = _bytes(path)
    raw = _document(data, path)
    _refuse_other_format(raw, path)
    found: _Manifest = _validated(_Manifest, data, path)
    _refuse_other_plan(raw, place / PLAN)
    sketch = to_sketch(found.attrs.config, where=str(path))
    _refuse_sums(found, sketch, path)
    for shard in found.shards:
        _refuse_shard(place, shard, found.dim, path)
    model = found.attrs.model
    where = place / PROJECTIONS
    tables = read_projections(where, sketch, vocab_size=model.vocab_size, hidden_dim=model.hidden_dim)
    if projections_sha256(tables) != found.attrs.projections_sha256:
        raise IntegrityError(f"{where} does not match attrs.projections_sha256 in {MANIFEST}; copy it again")
    return ReferenceIndex(place, sketch, tables, model, found.attrs.data, found.num_rows, found.dim,
                          tuple(found.shards), hashlib.sha256(data).hexdigest())  # fmt: skip


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


def _refuse_sums(found: _Manifest, sketch: SketchConfig, path: Path) -> None:
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
        _data_start(folder / shard.file, shard.rows, dim)


def _data_start(path: Path, rows: int, dim: int) -> int:
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


def _read_meta(path: Path, shard: Shard) -> pl.DataFrame:
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


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
