"""The kernels on Triton's interpreter, beside tensor operations. A program: the interpreter is chosen before import.

    python -m tests.interpreted        prints what each case found, as JSON: {case: {measure: number}}

Distances are the largest between sketches of a position, both of unit length or both zero; positions where rounding
decides what is kept are left out, and counted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from rise_ops import kernels
from rise_ops.config import SketchConfig
from rise_ops.head import ReadoutHead
from rise_ops.residual_sketch import ResidualSketcher
from rise_ops.sketch import SketchTables, column_codes
from rise_ops.support import Candidates, residuals, top_entries, undecided
from rise_ops.unembedding import Unembedding

Found = dict[str, float]
_CASES: dict[str, Callable[[], Found]] = {}


def _case(name: str) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    def keep(function: Callable[[], Found]) -> Callable[[], Found]:
        _CASES[name] = function
        return function

    return keep


def _config(**options: Any) -> SketchConfig:
    return SketchConfig(**{"channels": ("rg",), "temperature": 1.0, "dim_r": 20, "dim_g": 12} | options)


def _logits(rows: int, vocab: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[0] = logits[0].argmax()
    return logits, targets


def _both(logits: torch.Tensor, targets: torch.Tensor, config: SketchConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sketches of positions with these logits: by kernels, and by tensor operations."""
    rows, vocab = logits.shape
    tables = SketchTables.from_config(config, hidden_dim=8, vocab_size=vocab)
    weight = torch.randn(vocab, 8, generator=torch.Generator().manual_seed(1))
    sketcher = ResidualSketcher(Unembedding(weight), tables, config, names=("r", "g"), max_logit_bytes=2**30)
    k = min(config.top_k, vocab)
    own = logits.gather(1, targets[:, None]).squeeze(1)
    by_kernels = kernels.sketches(
        Candidates(*kernels.top_entries(logits, k), own),
        targets,
        codes=torch.from_numpy(column_codes(tables.r)),
        projected=sketcher.projected,
        config=config,
    )
    by_tensors = {"r": torch.zeros(rows, config.dim_r), "g": torch.zeros(rows, config.dim_g)}
    for found in residuals(logits, targets, config):
        places = slice(None) if found.rows is None else found.rows
        for name, sketches in sketcher.by_tensors(found, targets[places]).items():
            by_tensors[name][places] = sketches
    return by_kernels, by_tensors


def _compare(logits: torch.Tensor, targets: torch.Tensor, config: SketchConfig) -> Found:
    by_kernels, by_tensors = _both(logits, targets, config)
    more = min(config.top_k + 1, logits.shape[1])
    own = logits.gather(1, targets[:, None]).squeeze(1)
    open_rows = undecided(Candidates(*top_entries(logits, more), own), targets, config)
    apart = [(by_kernels[name] - by_tensors[name]).norm(dim=1)[~open_rows].max() for name in ("r", "g")]
    return {"distance": float(max(apart)), "decided": int((~open_rows).sum())}


def _tied(logits: torch.Tensor, targets: torch.Tensor, config: SketchConfig) -> Found:
    """Where equal entries are at an end, and any of them may be kept: how many, which ones cannot be, and residuals.

    Whether the next token is one of those that fill up is open, too: one entry more or less.
    """
    own = logits.gather(1, targets[:, None]).squeeze(1)
    k = min(config.top_k, logits.shape[1])
    values, tokens, counts = kernels._kept(Candidates(*kernels.top_entries(logits, k), own), targets, config)
    apart, wrong = 0.0, 0
    for found in residuals(logits, targets, config):
        for slot, row in enumerate(range(len(targets)) if found.rows is None else found.rows.tolist()):
            expected = int(((found.entry_rows == slot) & (found.tokens != targets[row])).sum())
            kept = tokens[row, : counts[row]]
            left_out = logits[row].index_fill(0, torch.cat([kept, targets[row : row + 1]]), -torch.inf)
            wrong += int(abs(len(kept) - expected) > 1 or len(set(kept.tolist())) != len(kept))
            wrong += int(targets[row] in kept or left_out.max() > logits[row, kept].min())
            weights = (logits[row, kept] - logits[row].max()).exp()
            right = weights / (weights.sum() + (own[row] - logits[row].max()).exp())
            apart = max(apart, float((values[row, : len(kept)] - right).abs().max()))
    return {"distance": apart, "wrong": wrong}


@_case("peaked")
def _peaked() -> Found:
    return _compare(*_logits(5, 700, 8.0), _config())


@_case("nearly one-hot")
def _one_hot() -> Found:
    return _compare(*_logits(5, 700, 60.0), _config())


@_case("flat")
def _flat() -> Found:
    return _compare(*_logits(5, 300, 0.5), _config(top_k=64))


@_case("several blocks")
def _several_blocks() -> Found:
    return _compare(*_logits(4, 9_001, 3.0), _config())


@_case("next token outside the support")
def _outside() -> Found:
    logits, targets = _logits(6, 300, 4.0)
    return _compare(logits, logits.argmin(1), _config(top_k=5, mass=0.999)) | {"rows": len(targets)}


@_case("one entry")
def _one_entry() -> Found:
    return _compare(*_logits(6, 300, 4.0), _config(top_k=1, min_support=1))


@_case("at least 33 entries")
def _min_support() -> Found:
    return _compare(*_logits(5, 500, 8.0), _config(min_support=33))


@_case("all entries")
def _not_adaptive() -> Found:
    return _compare(*_logits(5, 500, 2.0), _config(adaptive_support=False, top_k=40))


@_case("vocabulary below top_k")
def _small_vocabulary() -> Found:
    return _compare(*_logits(5, 17, 2.0), _config())


@_case("masked vocabulary")
def _masked() -> Found:
    logits, targets = _logits(4, 600, 2.0)
    logits[:, 100:] = -torch.inf
    return _compare(logits, targets % 100, _config(adaptive_support=False))


@_case("whole numbers")
def _whole_numbers() -> Found:
    logits, targets = _logits(5, 900, 3.0)
    return _tied(logits.round(), targets, _config(top_k=30, mass=0.97))


@_case("all equal")
def _all_equal() -> Found:
    """More candidates than there is room for, and no floor between them."""
    return _tied(torch.full((2, 2_000), -3.0), torch.tensor([7, 1_999]), _config(top_k=40))


@_case("few above many equal")
def _few_above() -> Found:
    """Those above must not be crowded out by those that are equal, though they come last."""
    logits = torch.zeros(2, 3_000)
    logits[:, -9:] = torch.arange(1.0, 10.0)
    return _tied(logits, torch.tensor([2_995, 11]), _config(top_k=12, mass=0.9999, adaptive_support=False))


@_case("large entries in few groups")
def _crowded() -> Found:
    """Eight of a group are among the largest: the floor is raised, until there is room for all above it."""
    logits, targets = _logits(2, 33_000, 1.0)
    crowd = (torch.arange(64)[:, None] * 60 + torch.arange(8) * kernels._GROUPS).flatten()
    logits[:, crowd] += 20.0
    logits[:, crowd[:8]] -= 10.0  # the group whose largest entry is the first floor
    return _compare(logits, targets, _config(top_k=64))


@_case("no numbers")
def _no_numbers() -> Found:
    logits, targets = _logits(5, 400, 2.0)
    logits[0, 300], logits[1, 7], logits[2, :], logits[3, 0] = torch.nan, torch.inf, -torch.inf, -torch.nan
    by_kernels, by_tensors = _both(logits, targets, _config())
    wrong = sum(int((x[name][:4].isfinite()).sum()) for x in (by_kernels, by_tensors) for name in ("r", "g"))
    return {"wrong": wrong, "distance": float((by_kernels["r"][4] - by_tensors["r"][4]).norm())}


@_case("rival in the bucket of the next token")
def _cancelling() -> Found:
    return _compare(*_logits(8, 500, 20.0), _config(dim_r=2))


def _head(**options: Any) -> tuple[ReadoutHead, torch.Tensor]:
    logits, targets = _logits(7, 900, 6.0)
    head = ReadoutHead(logits.t().contiguous(), SketchConfig(temperature=1.0), **options)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), targets[:-1]])[None]
    return head, head.signatures(torch.eye(7)[None], ids, [7])


@_case("head")
def _whole_head() -> Found:
    head, found = _head(way="triton", max_logit_bytes=2**30)
    expected = _head(way="torch", max_logit_bytes=2**30)[1]
    return {"distance": float((found - expected).norm()), "wrong": int(head.residuals.way != "triton")}


@_case("split head")
def _split_head() -> Found:
    head, found = _head(way="triton", max_logit_bytes=120_000)
    expected = _head(way="torch", max_logit_bytes=2**30)[1]
    wrong = int(head.residuals.way != "triton" or not head.residuals.split)
    return {"distance": float((found - expected).norm()), "wrong": wrong}


def names() -> Iterator[str]:
    """The cases."""
    yield from _CASES


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        chosen = sys.argv[1:] or list(_CASES)
        sys.stdout.write(json.dumps({name: _CASES[name]() for name in chosen}))
