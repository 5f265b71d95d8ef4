"""Reading an index directory of the reference implementation (`rise_ops.exchange`) where it stands.

Vectors are mapped into memory and never unpickled, metadata is read a shard at a time, so an index of any size can be
looked at and searched. Opening it checks what it says about itself (`rise_ops.exchange_manifest`),
`ReferenceIndex.verify` every byte of the vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.errors import ConfigError, IntegrityError, ModelError
from rise_ops.exchange import MANIFEST, PROJECTIONS, projections_sha256, read_projections, unembedding_probe
from rise_ops.exchange_manifest import META, ReferenceData, ReferenceModel, Shard, data_start, read_manifest, read_meta
from rise_ops.memory import TILE_ROWS
from rise_ops.progress import Progress, silent
from rise_ops.scan import Float32Array, smallest
from rise_ops.signatures import Signer
from rise_ops.sketch import SketchTables
from rise_ops.trunk import load_trunk

Float16Array = npt.NDArray[np.float16]

_HASHED_AT_ONCE = 8 * 2**20
_NORM_ERROR = 0.02


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
        return np.memmap(path, "<f2", "r", data_start(path, found.rows, self.dim), (found.rows, self.dim))

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
        return read_meta(self.folder / self.shards[shard].meta, self.shards[shard])

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
        start = data_start(path, shard.rows, self.dim)
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
        self._refuse_other_head(trunk.unembedding, model.name)
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
    found, sketch = (described := read_manifest(place)).manifest, described.sketch
    model = found.attrs.model
    where = place / PROJECTIONS
    tables = read_projections(where, sketch, vocab_size=model.vocab_size, hidden_dim=model.hidden_dim)
    if projections_sha256(tables) != found.attrs.projections_sha256:
        raise IntegrityError(f"{where} does not match attrs.projections_sha256 in {MANIFEST}; copy it again")
    return ReferenceIndex(place, sketch, tables, model, found.attrs.data, found.num_rows, found.dim,
                          tuple(found.shards), hashlib.sha256(described.data).hexdigest())  # fmt: skip


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
