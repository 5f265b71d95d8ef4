"""From tokens to chunks, and from chunks to micro-batches.

A row of up to 256 tokens is one chunk. A longer one becomes windows `tokens[s : s + 256]` for s = 0, 206, 412, …
while s is inside the row: they overlap by 50 and cover it whole. Windows of fewer than 2 tokens predict
nothing and are dropped. A query that marks its prompt is one chunk, cut at 512 tokens, of which only the tokens
after the prompt count; a query without a prompt is chunked like a row.

Micro-batches are length-sorted and bounded in padded tokens and in chunks. The plan is a pure function of the
lengths and the bounds, so the same rows are always computed in the same company.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

CHUNK_TOKENS = 256
CHUNK_OVERLAP = 50
QUERY_TOKENS = 512
MIN_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of tokens of one row."""

    row: int
    """Index of the row."""
    start: int
    """First token."""
    stop: int
    """One past the last token."""
    loss_start: int = 0
    """First index inside the chunk that counts as predicted; 0 and 1 mean all."""

    def __len__(self) -> int:
        return self.stop - self.start


def row_chunks(row: int, tokens: int) -> list[Chunk]:
    """Chunks of a row of `tokens` tokens; none for fewer than two."""
    if tokens <= CHUNK_TOKENS:
        return [Chunk(row, 0, tokens)] if tokens >= MIN_TOKENS else []
    starts = range(0, tokens, CHUNK_TOKENS - CHUNK_OVERLAP)
    windows = [Chunk(row, start, min(start + CHUNK_TOKENS, tokens)) for start in starts]
    return [window for window in windows if len(window) >= MIN_TOKENS]


def prompt_chunk(row: int, tokens: int, prompt_tokens: int) -> list[Chunk]:
    """The one chunk of a query whose first `prompt_tokens` tokens are its prompt; none for fewer than two."""
    stop = min(tokens, QUERY_TOKENS)
    if stop < MIN_TOKENS:
        return []
    return [Chunk(row, 0, stop, min(max(prompt_tokens, 1), stop - 1))]


def prompt_tokens(ends: Sequence[int], prompt_characters: int) -> int:
    """How many leading tokens end inside the prompt.

    Parameters
    ----------
    ends
        Character offset at which each token ends. Special tokens end at 0, wherever they stand.
    prompt_characters
        Length of the prompt.
    """
    # Running maximum: a closing special token (offset 0) is not part of the prompt.
    highest = 0
    running = [highest := max(highest, end) for end in ends]
    return bisect_right(running, prompt_characters)


def plan_batches(lengths: Sequence[int], *, max_tokens: int, max_chunks: int) -> list[list[int]]:
    """Split chunks into micro-batches.

    Parameters
    ----------
    lengths
        Tokens of each chunk.
    max_tokens
        Padded tokens of a batch (its longest chunk times its chunks); a longer chunk goes alone.
    max_chunks
        Chunks of a batch.

    Returns
    -------
    list
        Indices into `lengths`, every one once; longest chunks first, equal lengths in their order.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    room = 0
    for index in order:
        if room == 0:
            batches.append([])
            room = max(1, min(max_chunks, max_tokens // max(1, lengths[index])))
        batches[-1].append(index)
        room -= 1
    return batches
