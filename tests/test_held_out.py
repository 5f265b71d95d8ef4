"""Held-out texts: losses token by token, and a multiple-choice task whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rise_ops.config import FieldMap, ModelConfig
from rise_ops.errors import ConfigError, SourceError
from rise_ops.held_out import MAX_TOKENS, choice_accuracy, draw_choices, held_out_loss
from rise_ops.rows import CanonicalRow, canonical_row
from rise_ops.trunk import Trunk, load_trunk
from tests.tiny_models import save

TEXTS = ["the quick brown fox", "a small green field", "dog", "the lazy dog and runs through", "near the river " * 9]
PAIRS = [
    ("the quick", " brown fox"),
    ("a small green", " field"),
    ("near the", " river"),
    ("the lazy", " dog and runs"),
]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return load_trunk(ModelConfig(name=str(save("llama", tmp_path_factory.mktemp("model"))), device="cpu"))


def _row(text: str, prompt: str | None = None) -> CanonicalRow:
    columns = {"text": text} if prompt is None else {"prompt": prompt, "generation": text}
    return canonical_row(columns, fields=FieldMap(), row_bytes=1_000_000)


@torch.no_grad()
def _plain(trunk: Trunk, text: str, prompt: str = "") -> tuple[float, int]:
    """Loss of the tokens after the prompt, one text at a time."""
    ids = torch.tensor([trunk.tokenizer(prompt + text)["input_ids"]])
    start = max(1, len(trunk.tokenizer(prompt)["input_ids"]))
    chances = torch.log_softmax(trunk.model(input_ids=ids).logits[0].double(), -1)
    return -sum(float(chances[place - 1, ids[0, place]]) for place in range(start, ids.shape[1])), ids.shape[1] - start


def test_losses_are_those_of_each_text_alone(trunk: Trunk) -> None:
    rows = [*(_row(text) for text in TEXTS), *(_row(ending, prompt) for prompt, ending in PAIRS)]
    found = held_out_loss(trunk, rows)
    plain = [*(_plain(trunk, text.strip()) for text in TEXTS), *(_plain(trunk, end, start) for start, end in PAIRS)]
    assert found.counts == [count for _, count in plain]
    assert found.losses == pytest.approx([loss for loss, _ in plain], rel=1e-4)
    assert found.mean == pytest.approx(sum(loss for loss, _ in plain) / sum(count for _, count in plain), rel=1e-4)


def test_a_long_text_is_cut(trunk: Trunk) -> None:
    (count,) = held_out_loss(trunk, [_row("river " * 5_000)]).counts
    assert count == MAX_TOKENS - 1


def test_a_text_that_predicts_nothing_is_refused(trunk: Trunk) -> None:
    with pytest.raises(SourceError, match="the held-out text 'a' has fewer than 2 tokens"):
        held_out_loss(trunk, [_row("the fox"), _row("a")])


def test_each_question_has_its_own_ending_and_others_once() -> None:
    rows = [_row(ending, prompt) for prompt, ending in [*PAIRS, ("by the", " river")]]
    drawn = draw_choices(rows, 2)
    assert drawn == draw_choices(rows, 2)
    endings = {ending for _, ending in PAIRS}
    for row, candidates in zip(rows, drawn, strict=True):
        assert row.text == f"{row.prompt}{candidates[0]}"
        assert len(set(candidates)) == len(candidates) == 3 and set(candidates) <= endings
    assert {len(candidates) for candidates in draw_choices(rows, 3)} == {4}


def test_accuracies_are_those_of_plain_sums(trunk: Trunk) -> None:
    rows = [_row(ending, prompt) for prompt, ending in PAIRS]
    found = choice_accuracy(trunk, rows, 3)
    sums, norms = [], []
    for row, endings in zip(rows, draw_choices(rows, 3), strict=True):
        losses = np.array([_plain(trunk, ending, row.prompt or "")[0] for ending in endings])
        sums.append(losses.argmin() == 0)
        norms.append((losses / [len(ending.encode()) for ending in endings]).argmin() == 0)
    assert (found.questions, found.left_out) == (4, 0)
    assert (found.acc, found.acc_norm) == (np.mean(sums), np.mean(norms))


def test_a_model_that_knows_the_answers_is_right(trunk: Trunk, tmp_path: Path) -> None:
    """One that was trained on the questions, and by length normalised."""
    from rise_ops.compare_config import ClosedLoopConfig
    from rise_ops.training import encoded_rows, fresh_trunk, train

    config = ClosedLoopConfig.model_validate(
        {"tokens": 1, "held_out": {"x": {"queries": "x"}}, "epochs": 40, "context": 8, "learning_rate": 0.01}
    )
    rows = [_row(ending, prompt) for prompt, ending in PAIRS]
    knowing = fresh_trunk(ModelConfig(name=trunk.name, device="cpu"))
    train(knowing, encoded_rows(knowing, [[row.text for row in rows]]), config, seed=0)
    found = choice_accuracy(knowing, rows, 3)
    assert (found.acc, found.acc_norm) == (1.0, 1.0)


def test_questions_that_are_too_long_are_left_out(trunk: Trunk) -> None:
    long = _row(" river" * 2_000, "the")
    rows = [_row(ending, prompt) for prompt, ending in PAIRS]
    drawn = draw_choices([*rows, long], 1)
    whole = [place for place, endings in enumerate(drawn) if all(len(ending) < 1_000 for ending in endings)]
    found = choice_accuracy(trunk, [*rows, long], 1)
    assert (found.questions, found.left_out) == (len(whole), 5 - len(whole)) and found.left_out >= 1
    with pytest.raises(ConfigError, match="none of 2 questions can be read whole"):
        choice_accuracy(trunk, [long, _row(" dog" * 2_000, "the")], 1)


def test_what_is_no_question_is_refused() -> None:
    rows = [_row(ending, prompt) for prompt, ending in PAIRS]
    with pytest.raises(ConfigError, match=r"text 5 \('the fox'\) has no prompt"):
        draw_choices([*rows, _row("the fox")], 1)
    with pytest.raises(ConfigError, match="distractors is 4, but the texts have 4 different endings"):
        draw_choices(rows, 4)
