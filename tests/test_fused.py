"""The compiled pass over logits, against tensor operations and at its edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.config import SketchConfig
from rise_ops.head import ReadoutHead
from rise_ops.residual_sketch import Way

Signatures = tuple[torch.Tensor, torch.Tensor]


def both(logits: np.ndarray[Any, Any], targets: list[int], config: SketchConfig) -> Signatures:
    """Signatures of positions with these logits [N, V], each a chunk of its own: compiled, and by tensor operations.

    The unembedding is the logits themselves, and hidden states pick one of them.
    """
    count, vocab = logits.shape
    weight = torch.from_numpy(np.ascontiguousarray(logits.T, np.float32)) * config.temperature
    hidden = torch.eye(count)[:, None].repeat(1, 2, 1)
    ids = torch.tensor([[0, target] for target in targets])
    ways: tuple[Way, Way] = ("numba", "torch")
    found = [ReadoutHead(weight, config, way=way).signatures(hidden, ids, [2] * count) for way in ways]
    assert all(each.shape == (count, config.dim) for each in found) and vocab == weight.shape[0]
    return found[0], found[1]


@settings(max_examples=40, deadline=None, derandomize=True)  # sums in another order may move a cut, now and then
@given(
    vocab_size=st.sampled_from([2, 40, 300, 4_096, 4_100, 33_000]),
    scale=st.sampled_from([0.01, 1.0, 8.0, 100.0]),
    top_k=st.sampled_from([1, 2, 5, 64, 256]),
    min_support=st.sampled_from([1, 4, 33]),
    adaptive=st.booleans(),
    channels=st.sampled_from([("rh",), ("gh",), ("rg",), ("rh", "gh")]),
    seed=st.integers(0, 2**31),
)
def test_agrees_with_tensor_operations(
    vocab_size: int, scale: float, top_k: int, min_support: int, adaptive: bool, channels: Any, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((9, vocab_size)) * scale
    targets = generator.integers(0, vocab_size, 8).tolist()
    targets.append(int(logits[8].argmax()))
    config = SketchConfig(
        channels=channels, top_k=top_k, min_support=min_support, adaptive_support=adaptive, temperature=1.0
    )
    compiled, tensors = both(logits, targets, config)
    torch.testing.assert_close(compiled, tensors, atol=2e-4, rtol=0)


def test_threads_do_not_matter() -> None:
    generator = np.random.default_rng(0)
    weight, hidden = torch.randn(5_000, 24), torch.randn(4, 90, 24)
    ids = torch.from_numpy(generator.integers(0, 5_000, (4, 90)))
    head = ReadoutHead(weight, SketchConfig())
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = head.signatures(hidden, ids, [90, 90, 60, 3])
        torch.set_num_threads(3)
        several = head.signatures(hidden, ids, [90, 90, 60, 3])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(alone, several, atol=1e-6, rtol=0)


def test_a_flat_prediction_keeps_the_mass_of_any_entries() -> None:
    """All logits equal: 236 of 256 weights have a mass of 0.92; which of them is open, how many is not."""
    config = SketchConfig(channels=("rh",), dim_r=4096, top_k=256)
    head = ReadoutHead(torch.zeros(5_000, 3), config)
    found = head.signatures(torch.ones(1, 2, 3), torch.tensor([[0, 7]]), [2]).view(4096, -1).abs().sum(1)
    assert 200 < int((found > 0).sum()) <= 236 + 1  # some share a bucket
    assert found.argmax() == head.tables.r.buckets[7]


def test_equal_entries_at_the_end_of_the_support() -> None:
    """Two of three equal entries fit: the target is one of them."""
    config = SketchConfig(channels=("rh",), dim_r=512, top_k=3, mass=0.999, adaptive_support=False)
    logits = np.full((1, 40), -50.0)
    logits[0, 5], logits[0, [20, 21, 33]] = 2.0, 1.0
    compiled, _ = both(logits, [33], config)
    kept = compiled.view(512, -1).abs().sum(1).nonzero().squeeze(1).tolist()
    tables = ReadoutHead(torch.zeros(40, 1), config).tables.r.buckets
    assert int(tables[33]) in kept and int(tables[5]) in kept and len(kept) == 3


def test_entries_that_cannot_be() -> None:
    """A masked vocabulary (−inf) is as if it were shorter."""
    generator = np.random.default_rng(1)
    logits = generator.standard_normal((3, 6_000))
    logits[:, 300:] = -np.inf
    weight = torch.from_numpy(logits[:, :300].T.astype(np.float32).copy())
    config = SketchConfig(channels=("gh",), temperature=1.0)
    hidden, ids = torch.eye(3)[:, None].repeat(1, 2, 1), torch.tensor([[0, 5], [0, 99], [0, 299]])
    short = ReadoutHead(weight, config).signatures(hidden, ids, [2, 2, 2])
    bias = torch.zeros(6_000)
    bias[300:] = -torch.inf
    padded = torch.cat([weight, torch.zeros(5_700, 3)])
    long = ReadoutHead(padded, config, bias=bias).signatures(hidden, ids, [2, 2, 2])
    torch.testing.assert_close(long, short, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad: float) -> None:
    """An overflow must not look like a signature."""
    bias = torch.zeros(700)
    bias[500] = bad
    for channels in (("rh",), ("rg",)):
        head = ReadoutHead(torch.randn(700, 8), SketchConfig(channels=channels), bias=bias)
        assert head.signatures(torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.int64), [5]).isnan().all()
