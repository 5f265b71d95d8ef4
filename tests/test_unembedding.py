"""An LM head whose vocabulary is split: into slices where whole rows of logits are too much memory, and into shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from rise_ops import unembedding
from rise_ops.config import SketchConfig
from rise_ops.errors import ModelError
from rise_ops.head import ReadoutHead
from rise_ops.support import Candidates, residuals_of, top_entries
from rise_ops.unembedding import Unembedding
from tests import oracle

VOCAB, WIDTH, ROWS = 1_003, 24, 40


def _whole_numbers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and states whose products are exact however they are summed; many logits are equal."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-3, 4, (VOCAB, WIDTH), generator=generator).float()
    return weight, torch.randint(-3, 4, (ROWS, WIDTH), generator=generator).float()


def _real_numbers(scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, WIDTH, generator=generator) * scale
    return weight, torch.randn(ROWS, WIDTH, generator=generator)


def _targets() -> torch.Tensor:
    """Next tokens all over the vocabulary, its ends included."""
    return torch.linspace(0, VOCAB - 1, ROWS).long()


def _shards(weight: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    return list(weight.split([*sizes, weight.shape[0] - sum(sizes)]))


_SHARDS: list[Sequence[int]] = [(), (400,), (1, 700, 250)]


@pytest.mark.parametrize("sizes", _SHARDS)
@pytest.mark.parametrize("width", [3, 64, 500, 5_000])
@pytest.mark.parametrize("count", [1, 5, 256, VOCAB])
def test_candidates_are_the_largest_of_whole_rows(sizes: Sequence[int], width: int, count: int) -> None:
    weight, hidden = _whole_numbers()
    logits = hidden @ weight.t()
    head = Unembedding(_shards(weight, sizes))
    found = head.candidates(hidden, _targets(), count=count, temperature=1.0, width=width)
    assert torch.equal(found.values, logits.topk(count, dim=1).values)
    assert torch.equal(logits.gather(1, found.tokens), found.values)
    assert all(len(set(row)) == count for row in found.tokens.tolist())
    assert torch.equal(found.own, logits.gather(1, _targets()[:, None]).squeeze(1))


@pytest.mark.parametrize("sizes", _SHARDS)
def test_logits_and_projection_are_those_of_one_piece(sizes: Sequence[int]) -> None:
    weight, hidden = _whole_numbers()
    bias = torch.arange(VOCAB, dtype=torch.float64)
    head = Unembedding(_shards(weight, sizes), bias=bias, logit_scale=0.5, soft_cap=300.0)
    expected = 300 * ((hidden @ weight.t() + bias.float()) * 0.5 / 300).tanh()
    torch.testing.assert_close(head.logits(hidden), expected)
    out = torch.empty(ROWS + 3, VOCAB)
    assert torch.equal(head.logits(hidden, out=out), out[:ROWS])
    matrix = torch.eye(WIDTH)[:, :9]
    assert torch.equal(head.projected(matrix), weight[:, :9])


@pytest.mark.parametrize("sizes", _SHARDS)
@pytest.mark.parametrize(
    ("scale", "parts"), [(0.05, {}), (1.0, {}), (1.0, {"bias": True}), (4.0, {"soft_cap": 6.0, "logit_scale": 0.5})]
)
@pytest.mark.parametrize("adaptive", [True, False])
def test_signatures_are_those_of_whole_rows(
    sizes: Sequence[int], scale: float, parts: dict[str, Any], adaptive: bool
) -> None:
    weight, hidden = _real_numbers(scale)
    options = parts | ({"bias": torch.linspace(-1, 1, VOCAB)} if "bias" in parts else {})
    config = SketchConfig(
        channels=("rh", "gh", "rg"), dim_r=32, dim_h=16, dim_g=16, temperature=1.0, top_k=100,
        adaptive_support=adaptive,
    )  # fmt: skip
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), _targets()[1:]])[None]
    whole = ReadoutHead(weight, config, way="torch", max_logit_bytes=2**30, **options)
    split = ReadoutHead(_shards(weight, sizes), config, way="torch", max_logit_bytes=60_000, **options)
    assert split.residuals.split and not whole.residuals.split
    expected = whole.signatures(hidden[None], ids, [ROWS])
    found = split.signatures(hidden[None], ids, [ROWS])
    assert oracle.cosine(found[0].numpy(), expected[0].numpy()) > 0.99999
    vectors = torch.randn(2, config.dim)
    shares, _ = split.contributions(hidden[None], ids, [ROWS], vectors)
    torch.testing.assert_close(shares, whole.contributions(hidden[None], ids, [ROWS], vectors)[0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2, 40])
def test_equal_entries_of_several_slices(top_k: int) -> None:
    """Which of them are in the support is open; how many of each value is not, and the next token always is."""
    weight, hidden = _whole_numbers(1)
    logits, targets = hidden @ weight.t(), _targets()
    config = SketchConfig(top_k=top_k, temperature=1.0, adaptive_support=False)
    head = Unembedding(_shards(weight, (400,)))
    found = head.candidates(hidden, targets, count=top_k, temperature=1.0, width=30)
    kept = residuals_of(found, targets, config)
    values, tokens = kept.values.view(ROWS, top_k), kept.tokens.view(ROWS, top_k)
    for row in range(ROWS):
        target, support = int(targets[row]), tokens[row].tolist()
        assert target in support and len(set(support)) == top_k
        others = [token for token in support if token != target]
        # those that are not in the support are no larger than those that are
        left_out = logits[row].index_fill(0, tokens[row], -torch.inf)
        assert not others or left_out.max() <= logits[row, others].min()
    assert values.sum(1).abs().max() < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 500, VOCAB - 1])
def test_what_is_no_number_stays_none(bad: float, place: int) -> None:
    weight, hidden = _real_numbers(1.0)
    bias = torch.zeros(VOCAB)
    bias[place] = bad
    for channels in (("rh",), ("rg",)):
        config = SketchConfig(channels=channels)
        head = ReadoutHead(_shards(weight, (400,)), config, bias=bias, max_logit_bytes=50_000)
        assert head.signatures(hidden[None], _targets()[None], [ROWS]).isnan().all()


def test_a_masked_vocabulary_is_as_if_it_were_shorter() -> None:
    weight, hidden = _real_numbers(1.0)
    bias = torch.zeros(VOCAB)
    bias[300:] = -torch.inf
    config = SketchConfig(channels=("gh",), temperature=1.0)
    ids = torch.arange(ROWS)[None]
    short = ReadoutHead(weight[:300], config).signatures(hidden[None], ids, [ROWS])
    long = ReadoutHead(weight.split(250), config, bias=bias, max_logit_bytes=50_000)
    torch.testing.assert_close(long.signatures(hidden[None], ids, [ROWS]), short, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [60_000, 600_000, 9_000_000])
@pytest.mark.parametrize("shards", [1, 3])
def test_logits_stay_within_the_limit(limit: int, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than the limit; and it is not used in crumbs."""
    vocab = 9_001
    weight, hidden = torch.randn(vocab, 2), torch.randn(1, 301, 2)
    seen: list[tuple[int, int]] = []

    def top(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((x.shape[0], x.shape[1]))
        return top_entries(x, k)

    plain = Unembedding.candidates

    def watched(self: Unembedding, *args: Any, **options: Any) -> Candidates:
        return plain(self, *args, **options | {"top": top})

    monkeypatch.setattr(unembedding.Unembedding, "candidates", watched)
    head = ReadoutHead(list(weight.chunk(shards)), SketchConfig(top_k=8), way="torch", max_logit_bytes=limit)
    head.signatures(hidden, torch.zeros(1, 301, dtype=torch.int64), [301])
    products = [12 * rows * columns for rows, columns in seen]
    assert max(products) <= limit
    assert max(products) > min(limit, 12 * 300 * vocab // shards) // 2
    assert sum(rows * columns for rows, columns in seen) == 300 * vocab


def test_small_vocabularies_are_not_split() -> None:
    head = ReadoutHead(torch.zeros(50_304, 1), SketchConfig(channels=("rh",)), way="torch", max_logit_bytes=2**30)
    assert not head.residuals.split and head.residuals.shape() == (2**30 // (12 * 50_304), 50_304)
    assert ReadoutHead(torch.zeros(100_000, 1), SketchConfig(channels=("rh",)), way="torch").residuals.split


@pytest.mark.parametrize(
    ("weight", "bias"),
    [
        ([], None),
        ([torch.zeros(3, 4), torch.zeros(3, 5)], None),
        (torch.zeros(5), None),
        ([torch.zeros(3, 4), torch.zeros(2, 4)], torch.zeros(4)),
    ],
)
def test_parts_that_do_not_fit_are_refused(weight: Any, bias: Any) -> None:
    with pytest.raises(ModelError, match="LM head"):
        Unembedding(weight, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_on_several_devices(dtype: torch.dtype) -> None:
    weight, hidden = _real_numbers(1.0)
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())] + ["cpu"]
    sizes = [VOCAB // len(devices)] * (len(devices) - 1)
    shards = [part.to(device) for part, device in zip(_shards(weight, sizes), devices, strict=True)]
    config = SketchConfig(temperature=1.0)
    ids = _targets()[None]
    found = ReadoutHead(shards, config).signatures(hidden[None].cuda(), ids.cuda(), [ROWS])
    expected = ReadoutHead(weight, config).signatures(hidden[None], ids, [ROWS])
    assert found.device.type == "cuda"
    assert oracle.cosine(found[0].cpu().numpy(), expected[0].numpy()) >= 0.9999
