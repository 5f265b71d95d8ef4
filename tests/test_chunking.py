"""Windows, prompts and micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rise_ops.chunking import Chunk, plan_batches, prompt_chunk, prompt_tokens, row_chunks


@pytest.mark.parametrize(
    ("tokens", "windows"),
    [
        (0, []),
        (1, []),
        (2, [(0, 2)]),
        (256, [(0, 256)]),
        (257, [(0, 256), (206, 257)]),
        (412, [(0, 256), (206, 412)]),
        (413, [(0, 256), (206, 413)]),
        (414, [(0, 256), (206, 414), (412, 414)]),
        (700, [(0, 256), (206, 462), (412, 668), (618, 700)]),
    ],
)
def test_windows(tokens: int, windows: list[tuple[int, int]]) -> None:
    assert [(chunk.start, chunk.stop) for chunk in row_chunks(3, tokens)] == windows
    assert all(chunk.row == 3 and chunk.loss_start == 0 for chunk in row_chunks(3, tokens))


@given(st.integers(2, 5000))
def test_windows_cover_the_row(tokens: int) -> None:
    chunks = row_chunks(0, tokens)
    covered = set().union(*(range(chunk.start, chunk.stop) for chunk in chunks))
    assert covered == set(range(tokens))
    assert all(2 <= len(chunk) <= 256 for chunk in chunks)


@pytest.mark.parametrize(
    ("tokens", "prompt", "expected"),
    [
        (1, 0, []),
        (10, 4, [Chunk(0, 0, 10, 4)]),
        (10, 0, [Chunk(0, 0, 10, 1)]),
        (10, 10, [Chunk(0, 0, 10, 9)]),
        (600, 4, [Chunk(0, 0, 512, 4)]),
        (600, 550, [Chunk(0, 0, 512, 511)]),
    ],
)
def test_queries_with_a_prompt(tokens: int, prompt: int, expected: list[Chunk]) -> None:
    assert prompt_chunk(0, tokens, prompt) == expected


@pytest.mark.parametrize(
    ("ends", "characters", "expected"),
    [
        ([3, 6, 9], 6, 2),
        ([3, 7, 9], 6, 1),  # a token across the border belongs to what follows
        ([0, 3, 6, 9], 6, 3),  # an opening special token is part of the prompt
        ([3, 6, 9, 0], 6, 2),  # a closing one is not
        ([7, 9], 6, 0),
        ([], 6, 0),
    ],
)
def test_prompt_tokens(ends: list[int], characters: int, expected: int) -> None:
    assert prompt_tokens(ends, characters) == expected


@given(st.lists(st.integers(2, 512), max_size=200), st.integers(1, 4096), st.integers(1, 50))
def test_plan_holds_every_chunk_once_and_keeps_the_budget(lengths: list[int], tokens: int, chunks: int) -> None:
    plan = plan_batches(lengths, max_tokens=tokens, max_chunks=chunks)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    assert plan == plan_batches(list(lengths), max_tokens=tokens, max_chunks=chunks)
    for batch in plan:
        assert len(batch) <= chunks
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= tokens
    flat = [lengths[index] for batch in plan for index in batch]
    assert flat == sorted(flat, reverse=True)
