"""What any method must beat: the length of a row, its loss, and chance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rise_ops.baselines.base import Float32Array, Method, Need, Query, Rows, Setting, VectorMethod
from rise_ops.baselines.hidden_state import forward_need
from rise_ops.baselines.language import mean_losses, tokenized
from rise_ops.compare_config import LengthMethod, LossMethod, Order, RandomMethod
from rise_ops.progress import Progress, silent

_BATCH = 4_096


class _RowFigure(VectorMethod):
    """A number of each row, the same for all queries."""

    dtype = np.float32
    _order: Order

    @property
    def width(self) -> int:
        """One."""
        return 1

    def query_vectors(self, queries: Sequence[Query]) -> Float32Array:
        """1, or -1 where the lowest come first."""
        return np.full((len(queries), 1), 1.0 if self._order == "highest" else -1.0, np.float32)


class Length(_RowFigure):
    """Characters of the text."""

    paper = "no paper"
    asks_model = False

    def __init__(self, setting: Setting, config: LengthMethod) -> None:
        super().__init__(setting)
        self._order = config.order

    def need(self) -> Need:
        """Nothing to speak of."""
        return Need(4 * _BATCH, "a number of each row")

    def row_vectors(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Lengths, [rows, 1]."""
        return np.array([[len(text)] for text in texts], np.float32)


class Loss(_RowFigure):
    """Mean cross-entropy of the tokens: low-perplexity filtering (Wenzek et al., 2020, arXiv 1911.00359)."""

    paper = "arXiv 1911.00359"

    def __init__(self, setting: Setting, config: LossMethod) -> None:
        super().__init__(setting)
        self._config, self._order = config, config.order

    def need(self) -> Need:
        """One batch through the model."""
        return forward_need(self.setting, self._config.max_tokens, logits=True)

    def row_vectors(self, texts: Sequence[str]) -> npt.NDArray[Any]:
        """Losses, [rows, 1]; NaN, which is no score, for a row of fewer than two tokens."""
        queries = [Query(text) for text in texts]
        found = mean_losses(self.trunk, tokenized(self.trunk, queries, max_tokens=self._config.max_tokens))
        return found.astype(np.float32)[:, None]


class Random(Method):
    """Scores drawn for each pair of row and query."""

    paper = "no paper"
    asks_model = False
    draws = True

    def __init__(self, setting: Setting, config: RandomMethod) -> None:
        super().__init__(setting)

    def need(self) -> Need:
        """A batch of scores."""
        return Need(4 * _BATCH * self.setting.queries, "a batch of scores")

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """Nothing."""
        return 0

    def scores(self, rows: Rows, queries: Sequence[Query]) -> Iterator[Float32Array]:
        """Uniform numbers."""
        generator = np.random.default_rng(self.setting.seed)
        for start in range(0, len(rows), _BATCH):
            yield generator.random((min(_BATCH, len(rows) - start), len(queries)), np.float32)
