"""BM25: rows that share rare words with a query (Robertson and Zaragoza, 2009), by the library bm25s.

Terms are lower-case words and, where asked for, single punctuation marks; nothing is stemmed or left out. A query's
prompt counts like the rest of it. The index is in memory, as the library makes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence

import numpy as np

from rise_ops.baselines.base import Float32Array, Method, Need, Query, Rows, Setting
from rise_ops.compare_config import Bm25Method
from rise_ops.progress import Progress, silent

_WORDS = re.compile(r"\w+")
_WORDS_AND_MARKS = re.compile(r"\w+|[^\w\s]")
_BYTES = 24
"""Of working memory for each byte of text, about: word ids, counts, postings and their copies while they are made."""
_TILE = 4_096


class Bm25(Method):
    """Okapi BM25."""

    paper = "Robertson and Zaragoza, 2009"
    asks_model = False

    def __init__(self, setting: Setting, config: Bm25Method) -> None:
        super().__init__(setting)
        self._config = config
        self._terms = _WORDS_AND_MARKS if config.punctuation else _WORDS

    def need(self) -> Need:
        """The inverted index, from the size of the texts."""
        return Need(_BYTES * self.setting.text_bytes, f"an inverted index of {self.setting.text_bytes:,} bytes of text")

    def build(self, rows: Rows, *, progress: Progress = silent) -> int:
        """The inverted index of all rows."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells all of its steps on stderr
        self._vocabulary: dict[str, int] = {}
        found: list[list[int]] = []
        for texts in rows:
            found.extend([self._vocabulary.setdefault(term, len(self._vocabulary)) for term in self._split(text)]
                         for text in texts)  # fmt: skip
            progress(len(found), len(rows))
        self._bm25 = bm25s.BM25(k1=self._config.k1, b=self._config.b)
        self._bm25.index((found, self._vocabulary), show_progress=False)
        postings = sum(each.nbytes for each in self._bm25.scores.values() if isinstance(each, np.ndarray))
        return int(postings) + sum(len(term.encode()) + 4 for term in self._vocabulary)

    def scores(self, rows: Rows, queries: Sequence[Query]) -> Iterator[Float32Array]:
        """BM25 of each row for each query."""
        table = self.setting.scratch.column("bm25", (len(queries), len(rows)), np.float32)
        for number, query in enumerate(queries):
            terms = [self._vocabulary[term] for term in self._split(query.text) if term in self._vocabulary]
            if terms:
                own = np.asarray(self._bm25.get_scores_from_ids(terms), np.float32)
                table.write(number, own[None])
        for start in range(0, len(rows), _TILE):
            yield np.ascontiguousarray(table.array[:, start : start + _TILE].T)

    def _split(self, text: str) -> list[str]:
        return self._terms.findall(text.lower())
