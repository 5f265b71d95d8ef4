"""Per-token influence: which tokens of a row, and of a query, carry the row's score.

A score is `⟨φ(x), φ(q)⟩`, and each signature is a sum over positions, divided by norms (arXiv 2604.16197;
`rise_ops.head`). So the score is a sum over the tokens of x given φ(q), and again over the tokens of q given φ(x):

    score = Σ over windows c of x, positions t:  Σ over channels w · r̂ₜᵀ Q ĥₜ / (‖chunk c‖ · ‖Σ chunks‖)

Position t predicts token t + 1, and its part counts for that token: it says how much the loss at the token moves
the query's. Windows that overlap add up. A token that is not predicted (the first one, a prompt, what lies behind
a query's cut) has 0. The parts of the query answer the other question: which of its tokens draw this row.

Rows and queries are computed again, in the model's precision and other company, while the score comes from
signatures rounded to float16: sums agree with it to TOLERANCE in float32; in 16-bit more may be lost. The
difference is always told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rise_ops.errors import ModelError
from rise_ops.signatures import Signer
from rise_ops.trunk import Encoded

TOLERANCE = 2e-3
"""How far the sum over tokens may be from the score before people are told; float16 rounding is below it."""
GAP_CAUSES = (
    "the model computes differently here than for the index, or in 16-bit, or the scores are estimates of codes"
)
"""Why sums are further from the scores than that."""
LONGEST = 2**18
"""Characters of a text that a run's examples still explain: the model reads it again for each query it answers."""
_TEXTS_AT_ONCE = 64
"""Texts that are read together, and whose signatures are held."""

Tokens = tuple["TokenInfluence", ...]


@dataclass(frozen=True, slots=True)
class TokenInfluence:
    """A token, or tokens that share a character, and its part of a score."""

    text: str
    """What stands there, with the space before it; the name of a token that has no text."""
    start: int
    """First character, in the whole text."""
    end: int
    """One past the last; `start` where there is no text."""
    score: float
    """Part of the score; the parts add up to it."""


@dataclass(frozen=True, slots=True)
class Explained:
    """The score of one text for one query, by tokens of either."""

    tokens: Tokens
    query_tokens: Tokens
    score: float
    """Sum over `tokens`."""
    query_score: float
    """Sum over `query_tokens`."""

    def gap(self, score: float) -> float:
        """How far the sums are from a score, at most."""
        return max(abs(self.score - score), abs(self.query_score - score))


def explain_scores(signer: Signer, texts: Sequence[str], *, query: str, prompt: str | None,
                   signature: npt.NDArray[np.float32]) -> Iterator[Explained]:  # fmt: skip
    """Split the scores of some texts for a query over the tokens of either; in the order of the texts.

    Parameters
    ----------
    query, prompt
        The whole query, and its beginning that is its prompt.
    signature
        [dim], the query's.

    Raises
    ------
    ModelError
        The tokenizer does not know where tokens stand in a text, or the model overflows.
    LimitError
        One chunk alone does not fit on the device.
    """
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        rows = signer.token_scores(some, signature[None])
        (asked,) = signer.token_scores([query], np.stack([row.signature for row in rows]), prompts=[prompt])
        places = _spans(signer, query, asked.encoded)
        for text, row, scores in zip(some, rows, asked.scores, strict=True):
            own = _spans(signer, text, row.encoded)
            yield Explained(
                _tokens(own, row.scores[0]), _tokens(places, scores), float(row.scores.sum()), float(scores.sum())
            )


def cut_tokens(tokens: Tokens, characters: int) -> tuple[Tokens, float]:
    """Tokens that end within so many characters of their text, and the sum over the others."""
    behind = sum(token.score for token in tokens if token.end > characters)
    return tuple(token for token in tokens if token.end <= characters), float(behind)


@dataclass(frozen=True, slots=True)
class _Span:
    text: str
    start: int
    end: int
    ids: slice
    """Which tokens it is made of."""


def _spans(signer: Signer, text: str, encoded: Encoded) -> list[_Span]:
    """Where tokens stand: each takes what is between it and the one before; those that share a character are one."""
    if encoded.starts is None or encoded.ends is None:
        raise ModelError(
            f"the tokenizer of {signer.trunk.name} does not say where tokens stand, which the influence of tokens "
            "needs; put a tokenizer.json (of a fast tokenizer) next to the weights"
        )
    found: list[_Span] = []
    at = 0
    for number, (start, end) in enumerate(zip(encoded.starts, encoded.ends, strict=True)):
        if end > 0 and start < at and found[-1].end > found[-1].start:
            last = found.pop()
            at = max(at, end)
            found.append(_Span(text[last.start : at], last.start, at, slice(last.ids.start, number + 1)))
        elif end > at:
            found.append(_Span(text[at:end], at, end, slice(number, number + 1)))
            at = end
        else:  # special tokens stand at 0, wherever they are
            name = str(signer.trunk.tokenizer.convert_ids_to_tokens(int(encoded.ids[number])))
            found.append(_Span(name, at, at, slice(number, number + 1)))
    return found


def _tokens(spans: Sequence[_Span], scores: npt.NDArray[np.float64]) -> Tokens:
    return tuple(TokenInfluence(span.text, span.start, span.end, float(scores[span.ids].sum())) for span in spans)
