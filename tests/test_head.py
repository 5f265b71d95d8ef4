"""The estimator against golden files and against plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rise_ops.config import SketchConfig
from rise_ops.errors import ModelError
from rise_ops.head import ReadoutHead
from rise_ops.sketch import SketchTables
from rise_ops.support import top_entries
from tests import oracle

_GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize("path", _GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path, device: str) -> None:
    golden = np.load(path)
    config = SketchConfig(**json.loads(str(golden["config"])))
    head = ReadoutHead(torch.from_numpy(golden["unembedding"]).to(device), config)
    hidden, ids = torch.from_numpy(golden["hidden"])[None], torch.from_numpy(golden["token_ids"])[None]
    found = head.signatures(hidden, ids, [ids.shape[1]], loss_start=int(golden["loss_start"]))
    assert found.dtype == torch.float32 and found.shape == (1, config.dim)
    assert abs(float(found.norm()) - 1) < 1e-5
    assert oracle.cosine(found[0].cpu().numpy(), golden["signature"]) >= 0.99999


def test_oracle_agrees_with_a_golden_file() -> None:
    golden = np.load(Path(__file__).parent / "golden" / "three_channels.npz")
    config = SketchConfig(**json.loads(str(golden["config"])))
    found = oracle.signature(
        golden["hidden"], golden["token_ids"], oracle.Head(golden["unembedding"]), config, dict(golden)
    )
    assert oracle.cosine(found, golden["signature"]) >= 0.999999


_configs = st.builds(
    SketchConfig,
    channels=st.permutations(["rh", "gh", "rg"]).flatmap(lambda names: st.integers(1, 3).map(lambda n: names[:n])),
    weight_gh=st.floats(0.1, 2),
    dim_r=st.integers(1, 20),
    dim_h=st.integers(1, 12),
    dim_g=st.integers(1, 12),
    top_k=st.sampled_from([1, 3, 40, 64, 100, 256]),
    mass=st.floats(0.3, 0.99),
    min_support=st.integers(1, 40),
    adaptive_support=st.booleans(),
    temperature=st.sampled_from([0.05, 0.1, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)


def _draw_head(rng: np.random.Generator, vocab_size: int, width: int, parts: tuple[bool, bool, bool]) -> oracle.Head:
    weight = (rng.normal(size=(vocab_size, width)) * rng.uniform(0.1, 0.6)).astype(np.float32)
    bias = rng.normal(size=vocab_size).astype(np.float32) if parts[0] else None
    return oracle.Head(weight, bias, 0.5 if parts[1] else 1.0, 4.0 if parts[2] else None)


def _near_an_edge(scaled: Any, target: int, config: SketchConfig) -> bool:
    """Whether float32 may decide the support differently: a tie at its end, or a mass at the cut."""
    ordered = -np.sort(-scaled)
    k = min(config.top_k, len(scaled))
    tie = k < len(scaled) and ordered[k - 1] - ordered[k] < 1e-3
    return bool(tie or oracle.support(scaled, target, config)[1] < 1e-3)


@settings(max_examples=60, deadline=None)
@given(
    config=_configs,
    vocab_size=st.integers(2, 700),
    width=st.integers(2, 16),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    loss_starts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    parts=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_any_shape_agrees_with_the_loops(
    config: SketchConfig,
    vocab_size: int,
    width: int,
    lengths: list[int],
    loss_starts: list[int],
    parts: tuple[bool, bool, bool],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    plain = _draw_head(rng, vocab_size, width, parts)
    longest = max(lengths) + 1  # one column of padding for every chunk
    hidden = rng.normal(size=(len(lengths), longest, width)).astype(np.float32)
    ids = rng.integers(0, vocab_size, size=(len(lengths), longest))
    for row, length in enumerate(lengths):
        for t in range(max(length - 1, 0)):
            assume(not _near_an_edge(plain.logits(hidden[row, t]) / config.temperature, int(ids[row, t + 1]), config))
        hidden[row, length:] = np.nan  # padding must not be looked at
    head = _head(plain, config, max_logit_bytes=12 * vocab_size * 5)
    starts = loss_starts[: len(lengths)]
    found = head.signatures(torch.from_numpy(hidden), torch.from_numpy(ids), lengths, loss_start=starts).numpy()
    tables = head.tables.arrays()
    for row, length in enumerate(lengths):
        states, tokens = hidden[row, :length], ids[row, :length]
        expected = oracle.signature(states, tokens, plain, config, tables, loss_start=starts[row])
        if np.linalg.norm(expected) < 0.5:  # nothing counts, or residuals below eps
            assert np.abs(found[row] - expected).max() < 1e-3
        else:
            assert oracle.cosine(found[row], expected) >= 0.99999


def _head(plain: oracle.Head, config: SketchConfig, **options: Any) -> ReadoutHead:
    return ReadoutHead(
        torch.from_numpy(plain.weight),
        config,
        bias=None if plain.bias is None else torch.from_numpy(plain.bias),
        logit_scale=plain.scale,
        soft_cap=plain.soft_cap,
        **options,
    )


def test_a_rival_in_the_bucket_of_the_target_leaves_no_noise() -> None:
    """With two buckets most residuals of two large entries cancel; what is left must still be right."""
    rng = np.random.default_rng(0)
    plain = _draw_head(rng, 500, 16, (False, False, False))
    config = SketchConfig(channels=("rh",), dim_r=2, dim_h=16, temperature=0.02)
    hidden, ids = rng.normal(size=(60, 16)).astype(np.float32), rng.integers(0, 500, size=60)
    head = _head(plain, config)
    for t in range(59):
        pair, tokens = hidden[t : t + 2], ids[t : t + 2]
        found = head.signatures(torch.from_numpy(pair)[None], torch.from_numpy(tokens)[None], [2])[0].numpy()
        assert oracle.cosine(found, oracle.signature(pair, tokens, plain, config, head.tables.arrays())) >= 0.999


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 40), st.integers(0, 2**31))
def test_top_entries_are_exact(width: int, k: int, seed: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    k = min(k, width)
    values, columns = top_entries(x, k)
    assert torch.equal(values, x.topk(k, dim=1).values)
    assert torch.equal(x.gather(1, columns), values)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_slices_do_not_matter(temperature: float) -> None:
    rng = np.random.default_rng(0)
    plain = _draw_head(rng, 900, 16, (False, False, False))
    hidden = torch.from_numpy(rng.normal(size=(3, 20, 16)).astype(np.float32))
    ids = torch.from_numpy(rng.integers(0, 900, size=(3, 20)))
    config = SketchConfig(temperature=temperature)
    whole = _head(plain, config).signatures(hidden, ids, [20, 11, 2])
    few_rows = 4 * 900 * 4 * torch.get_num_threads()
    for limit in (few_rows, 1):  # the smallest are slices of the vocabulary, too
        head = _head(plain, config, max_logit_bytes=limit)
        assert head.residuals.split == (limit == 1)
        torch.testing.assert_close(head.signatures(hidden, ids, [20, 11, 2]), whole, atol=1e-5, rtol=0)


def test_half_precision_weights_are_computed_in_float32() -> None:
    rng = np.random.default_rng(0)
    plain = _draw_head(rng, 300, 16, (False, False, False))
    weight = torch.from_numpy(plain.weight).to(torch.bfloat16)
    hidden = torch.from_numpy(rng.normal(size=(1, 20, 16)).astype(np.float32)).to(torch.bfloat16)
    ids = torch.from_numpy(rng.integers(0, 300, size=(1, 20)))
    config = SketchConfig()
    found = ReadoutHead(weight, config).signatures(hidden, ids, [20])[0]
    expected = ReadoutHead(weight.float(), config).signatures(hidden.float(), ids, [20])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_cuda_agrees_with_the_cpu(dtype: torch.dtype, temperature: float) -> None:
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.normal(size=(5000, 64)).astype(np.float32) * 0.3).to(dtype)
    hidden = torch.from_numpy(rng.normal(size=(4, 50, 64)).astype(np.float32)).to(dtype)
    ids = torch.from_numpy(rng.integers(0, 5000, size=(4, 50)))
    config = SketchConfig(temperature=temperature)
    expected = ReadoutHead(weight, config).signatures(hidden, ids, [50, 40, 3, 1])
    found = ReadoutHead(weight.cuda(), config).signatures(hidden.cuda(), ids.cuda(), [50, 40, 3, 1]).cpu()
    for row in range(4):
        assert oracle.cosine(found[row].numpy(), expected[row].numpy()) >= 0.9999


def test_mismatches_are_refused() -> None:
    head = ReadoutHead(torch.randn(50, 8), SketchConfig())
    ids = torch.zeros(2, 6, dtype=torch.int64)
    with pytest.raises(ModelError, match="one hidden state per token"):
        head.signatures(torch.zeros(2, 5, 8), ids, [6, 6])
    with pytest.raises(ModelError, match="lengths"):
        head.signatures(torch.zeros(2, 6, 8), ids, [7, 6])
    with pytest.raises(ModelError, match="lengths"):
        head.signatures(torch.zeros(2, 6, 8), ids, [6])
    with pytest.raises(ModelError, match="loss_start"):
        head.signatures(torch.zeros(2, 6, 8), ids, [6, 6], loss_start=[1, 1, 1])
    other = SketchTables.from_config(SketchConfig(), hidden_dim=8, vocab_size=51)
    with pytest.raises(ModelError, match="sketch table r"):
        ReadoutHead(torch.randn(50, 8), SketchConfig(), tables=other)
