"""Results that show themselves: as text, as a table in a notebook, and as a Polars frame.

Text from a corpus is made visible and escaped wherever it is shown; frames have it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import overload

import polars as pl

from rise_ops.attribution import Attribution, Hit
from rise_ops.errors import ConfigError
from rise_ops.evaluation import Evaluation
from rise_ops.notebook import Markup, escaped, html_table
from rise_ops.report_text import Piece, pieces
from rise_ops.visible import visible

_PREVIEW = 300
_LINE = 100


@dataclass(frozen=True, slots=True, repr=False)
class Attributions(Sequence[Attribution]):
    """Attributions of some queries, in their order."""

    found: tuple[Attribution, ...]
    bottom: bool = False
    """Whether the least influential rows are shown, too."""

    @overload
    def __getitem__(self, place: int) -> Attribution: ...

    @overload
    def __getitem__(self, place: slice) -> Attributions: ...

    def __getitem__(self, place: int | slice) -> Attribution | Attributions:
        """One query's attribution, or those of some."""
        return Attributions(self.found[place], self.bottom) if isinstance(place, slice) else self.found[place]

    def __len__(self) -> int:
        return len(self.found)

    def __repr__(self) -> str:
        return "\n".join(_as_text(each) for each in self.found)

    @property
    def hits(self) -> list[Hit]:
        """The rows of highest influence on the only query.

        Raises
        ------
        ConfigError
            There are several queries.
        """
        if len(self.found) != 1:
            raise ConfigError(f"there are {len(self.found)} queries; take one, such as attributions[0].hits")
        return self.found[0].hits

    def to_frame(self) -> pl.DataFrame:
        """All hits: query (number), side (top | bottom), rank, score, doc_id, source_uri, source_row, text."""
        rows = [
            (number, side, rank, hit.score, hit.doc_id, hit.source_uri, hit.source_row, hit.text)
            for number, each in enumerate(self.found)
            for side, hits in (("top", each.hits), ("bottom", each.bottom))
            if self.bottom or side == "top"
            for rank, hit in enumerate(hits, 1)
        ]
        schema = {"query": pl.UInt32, "side": pl.String, "rank": pl.UInt32, "score": pl.Float32, "doc_id": pl.String,
                  "source_uri": pl.String, "source_row": pl.Int64, "text": pl.String}  # fmt: skip
        return pl.DataFrame(rows, schema=schema, orient="row")

    def tokens(self) -> pl.DataFrame:
        """What the tokens add to the scores, where they were asked for: query, side, rank, of (row | query), start,
        end, text, score. The scores of a hit's row tokens sum to the hit's, and so do those of its query tokens.
        """
        rows = [
            (number, side, rank, of, token.start, token.end, token.text, token.score)
            for number, each in enumerate(self.found)
            for side, hits in (("top", each.hits), ("bottom", each.bottom))
            if self.bottom or side == "top"
            for rank, hit in enumerate(hits, 1)
            for of, found in (("row", hit.tokens), ("query", hit.query_tokens))
            for token in found or ()
        ]
        schema = {"query": pl.UInt32, "side": pl.String, "rank": pl.UInt32, "of": pl.String, "start": pl.UInt32,
                  "end": pl.UInt32, "text": pl.String, "score": pl.Float32}  # fmt: skip
        return pl.DataFrame(rows, schema=schema, orient="row")

    def _repr_html_(self) -> str:
        return "".join(self._html(each) for each in self.found)

    def _html(self, each: Attribution) -> str:
        asked = f"{escaped(each.prompt[:_PREVIEW])} → " if each.prompt else ""
        text = each.query.removeprefix(each.prompt or "")
        tables = [("rows that made it likelier", each.hits)]
        tables += [("rows that made it less likely", each.bottom)] if self.bottom else []
        query = f"<p><b>{asked}{escaped(text[:_PREVIEW])}</b></p>"
        return query + "".join(
            html_table(
                ("", "score", "text", "source", "row"),
                [(rank, hit.score, _text(hit), hit.source_uri, hit.source_row) for rank, hit in enumerate(hits, 1)],
                caption=title,
            )
            for title, hits in tables
        )


def _as_text(each: Attribution) -> str:
    """The query and its best rows, a line each."""
    lines = [f"{hit.score:8.4f}  {visible(' '.join(hit.text[:_LINE].split()))}" for hit in each.hits]
    return "\n".join([visible(" ".join(each.query[:_LINE].split())), *lines])


def _text(hit: Hit) -> Markup:
    """The beginning of a row's text, with the tokens marked that carry its score: green those that raise it."""
    tokens = [asdict(token) for token in hit.tokens or ()]
    return Markup("".join(_piece(piece) for piece in pieces(hit.text, tokens, _PREVIEW)))


def _piece(piece: Piece) -> str:
    if not piece.strength:
        return escaped(piece.text)
    color = "0,160,90" if piece.strength > 0 else "210,60,60"
    shade = f"background:rgba({color},{0.12 * abs(piece.strength):.2f})"
    return f'<span style="{shade}" title="{piece.score or 0:+.4f}">{escaped(piece.text)}</span>'


@dataclass(frozen=True, slots=True)
class Evaluated(Evaluation):
    """Figures of the evaluation protocol, as a table."""

    def to_frame(self) -> pl.DataFrame:
        """One row a K: k, auprc, auroc, precision."""
        schema = {"k": pl.Int64, "auprc": pl.Float64, "auroc": pl.Float64, "precision": pl.Float64}
        return pl.DataFrame([{"k": int(k), **figures} for k, figures in self.top_k.items()], schema=schema)

    def _repr_html_(self) -> str:
        title = f"{self.queries:,} queries, {self.positives:,} positive rows of {self.rows:,}"
        return html_table(self.to_frame().columns, self.to_frame().iter_rows(), caption=title)
