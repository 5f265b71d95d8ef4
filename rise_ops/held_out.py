"""What a model makes of texts that it was not trained on: their loss, and a multiple-choice task by likelihood.

**Loss.** Cross-entropy in nats, summed over each text's predicted tokens; of a text with a prompt only the tokens
after the prompt count. A text is cut at what the model reads, at most `MAX_TOKENS`.

**Choices.** Each text with a prompt is a question: its own ending is held against the endings of other texts, drawn by
a fixed seed. `acc` is the part of questions whose own ending is the likeliest, by the sum over its tokens, and
`acc_norm` the same with each sum divided by the ending's UTF-8 bytes (as lm-evaluation-harness does). A tie is not
right. Questions that are too long to be read whole are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rise_ops.baselines.base import Query
from rise_ops.baselines.language import mean_losses, tokenized
from rise_ops.errors import ConfigError, SourceError
from rise_ops.rows import CanonicalRow
from rise_ops.trunk import Trunk

MAX_TOKENS = 1_024
SEED = 0
"""Draws the other endings."""

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Losses of some texts, in their order."""

    losses: list[float]
    """Of each text, in nats, over its counted tokens."""
    counts: list[int]
    """Counted tokens of each text."""

    @property
    def mean(self) -> float:
        """Nats a token, over all texts together."""
        return sum(self.losses) / sum(self.counts)


@dataclass(frozen=True, slots=True)
class Choices:
    """How a multiple-choice task went."""

    questions: int
    left_out: int
    """Questions that are too long."""
    acc: float
    acc_norm: float


def held_out_loss(trunk: Trunk, rows: Sequence[CanonicalRow]) -> HeldOutLoss:
    """Losses of texts.

    Raises
    ------
    SourceError
        A text is too short to predict a token.
    """
    losses, counts, _ = _losses(trunk, [Query(row.text, row.prompt) for row in rows])
    for row, counted in zip(rows, counts, strict=True):
        if counted == 0:
            raise SourceError(f"the held-out text {row.text[:80]!r} has fewer than 2 tokens; remove it")
    return HeldOutLoss(losses.tolist(), counts)


def draw_choices(rows: Sequence[CanonicalRow], distractors: int) -> list[list[str]]:
    """For each text its own ending, then other ones, each once.

    Raises
    ------
    ConfigError
        A text has no prompt, or there are too few different endings.
    """
    for number, row in enumerate(rows, 1):
        if not row.prompt:
            raise ConfigError(
                f"closed_loop.choices: text {number} ({row.text[:60]!r}) has no prompt, so it has no ending; give rows "
                "with `prompt` and `generation`, or name both columns under closed_loop.choices.fields"
            )
    endings = [row.text[len(row.prompt or "") :] for row in rows]
    different = sorted(set(endings))
    if len(different) <= distractors:
        raise ConfigError(
            f"closed_loop.choices.distractors is {distractors}, but the texts have {len(different)} different endings; "
            "give more texts, or fewer distractors"
        )
    generator, found = np.random.default_rng(SEED), []
    for own in endings:
        drawn = generator.permutation(len(different))[: distractors + 1].tolist()
        found.append([own, *[different[place] for place in drawn if different[place] != own][:distractors]])
    return found


def choice_accuracy(trunk: Trunk, rows: Sequence[CanonicalRow], distractors: int) -> Choices:
    """The multiple-choice task on texts with prompts.

    Raises
    ------
    ConfigError
        As `draw_choices`, or all questions are too long.
    """
    drawn = draw_choices(rows, distractors)
    queries = [
        Query(f"{row.prompt}{ending}", row.prompt)
        for row, endings in zip(rows, drawn, strict=True)
        for ending in endings
    ]
    losses, _, cut = _losses(trunk, queries)
    whole = ~np.array(cut).reshape(len(rows), -1).any(axis=1)
    if not whole.any():
        raise ConfigError(f"closed_loop.choices: none of {len(rows)} questions can be read whole by {trunk.name}")
    sums = losses.reshape(len(rows), -1)[whole]
    sizes = np.array([[max(1, len(ending.encode())) for ending in endings] for endings in drawn], float)[whole]
    return Choices(int(whole.sum()), int((~whole).sum()), _accuracy(sums), _accuracy(sums / sizes))


def _accuracy(losses: Float64Array) -> float:
    """Part of the questions [questions, endings] whose first ending has the lowest loss, alone."""
    return float((losses[:, 0] < losses[:, 1:].min(axis=1)).mean())


def _losses(trunk: Trunk, queries: Sequence[Query]) -> tuple[Float64Array, list[int], list[bool]]:
    """Of each text: sum of the losses of its counted tokens, their number, and whether it may have been cut."""
    limit = min(MAX_TOKENS, trunk.max_positions or MAX_TOKENS)
    texts = tokenized(trunk, queries, max_tokens=limit)
    counts = [each.counted for each in texts]
    sums = np.nan_to_num(mean_losses(trunk, texts)) * counts
    return sums, counts, [len(each.ids) >= limit for each in texts]
