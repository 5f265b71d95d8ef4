"""What a method of the comparison does: build something from all rows, then score the rows for queries.

Most methods keep a vector of each row and score by inner products with a vector of each query: they are
`VectorMethod`s, whose index lies in a file of scratch space and is scanned in tiles. A method says before anything
is loaded how much memory it will work with (`need`), beside libraries and model, as `limits.memory` counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.model_shape import ModelShape
from rise_ops.progress import Progress, silent
from rise_ops.scratch import Scratch
from rise_ops.trunk import Trunk, load_trunk

Float32Array = npt.NDArray[np.float32]

ROWS = 256
"""Of a batch, at most."""


@dataclass(frozen=True, slots=True)
class Query:
    """A text, and its beginning that does not count."""

    text: str
    prompt: str | None = None


class Rows(Protocol):
    """The texts of all rows, in batches, in the same order every time they are read."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[str]]: ...


@dataclass(frozen=True, slots=True)
class Need:
    """Working memory of a method, at most, beside libraries and model."""

    bytes: int
    text: str
    """What it is for, such as "the gradient of 1,011,781,632 parameters, four times"."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a method works with."""

    model: ModelConfig
    sketch: SketchConfig
    shape: ModelShape
    """Of the model; it is loaded when it is needed, by `rise_ops.trunk.load_trunk`."""
    scratch: Scratch
    """Where what does not fit in memory is kept."""
    memory: int
    """Bytes that the method may work with."""
    rows: int
    """How many there are."""
    text_bytes: int
    """UTF-8 bytes of all rows."""
    queries: int
    """How many there are."""
    seed: int
    """Of what the method draws at random."""


class Method(ABC):
    """One way to score rows.

    Parameters
    ----------
    setting
        What it works with.
    """

    paper: str = ""
    """Where the method is from: an arXiv number, or a reference."""
    draws = False
    """Whether another seed gives other scores."""
    asks_model = True
    differentiates = False
    """Whether it computes gradients of the model's weights."""
    trunk: Trunk
    """There once it is loaded."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @abstractmethod
    def need(self) -> Need:
        """Working memory, from sizes alone: nothing is loaded."""

    def load(self) -> None:
        """Load the model, where the method asks it."""
        if self.asks_model:
            self.trunk = load_trunk(self.setting.model)

    @abstractmethod
    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Read all rows and keep what scoring needs. Returns the bytes that would be stored; 0: nothing is kept.

        Parameters
        ----------
        progress
            Counts rows.
        """

    @abstractmethod
    def scores(self, rows: Rows, queries: Sequence[Query]) -> Iterator[Float32Array]:
        """Scores of all rows, a higher one for more influence: float32 [rows of a batch, queries], in order.

        NaN where there is none, as of a row too short to predict a token: such rows do not count.

        Batches need not be those of `rows`. Called after `build`.
        """


class VectorMethod(Method):
    """A method that keeps a vector of each row; scores are inner products."""

    dtype: npt.DTypeLike = np.float16

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of a row."""

    def row_vectors(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Vectors of some rows, [rows, width], as they are stored: those of queries, if nothing else is said."""
        return self.query_vectors([Query(text) for text in texts]).astype(self.dtype)

    @abstractmethod
    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """Vectors that rows are multiplied with, [queries, width]. Called after `build`."""

    def vector_bytes(self) -> int:
        """Memory of the vectors of a batch, in float32 and as they are stored, of a tile, and of all queries."""
        return 4 * self.width * (self.setting.queries + 3 * ROWS)

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Vectors of all rows, one batch after the other."""
        self._index = self.setting.scratch.column("index", (len(rows), self.width), self.dtype)
        done = 0
        for texts in rows:
            self._index.write(done, self.row_vectors(texts))
            done += len(texts)
            progress(done, len(rows))
        return len(rows) * self.width * np.dtype(self.dtype).itemsize

    def tiles(self) -> Iterator[Float32Array]:
        """The stored vectors in order, [some rows, width]."""
        step = max(1, min(ROWS, 2**26 // (4 * self.width)))
        for start in range(0, len(self._index), step):
            yield self._index.read(start, min(start + step, len(self._index))).astype(np.float32)

    def scores(self, rows: Rows, queries: Sequence[Query]) -> Iterator[Float32Array]:
        """Inner products, in float32; NaN, which is no score, for a vector of zeros: a row that predicts nothing."""
        wanted = self.query_vectors(queries)
        for tile in self.tiles():
            found = tile @ wanted.T
            found[~tile.any(axis=1)] = np.nan
            yield found
