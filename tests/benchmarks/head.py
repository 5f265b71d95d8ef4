"""The LM head alone: tokens per second from hidden states to signatures, beside the bare product `hidden @ W.T`.

    python -m tests.benchmarks.head [--shape NAME ...] [--tokens 32768] [--runs 5] [--device cpu] [--dtype float32]
                                    [--temperature T] [--limit-mib MIB] [--way WAY ...] [--json FILE]

Weights and states are random; `--spread` is the standard deviation of the logits: small ones are flat predictions, of
which nearly the whole support is kept, and cost most. The bare product holds as many rows of logits at a time as the
limit allows, in float32. Both take turns, and the median of the ratios is the figure. For a few seconds on a CPU:
`--tokens 512 --runs 1 --shape pythia-1b`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from rise_ops.config import SketchConfig
from rise_ops.head import ReadoutHead
from rise_ops.machine import measured_on
from rise_ops.residual_sketch import Way

SHAPES = {"pythia-1b": (2_048, 50_304), "olmo-2-1b": (2_048, 100_352), "olmo-3-32b": (5_120, 100_278)}
"""Hidden width and vocabulary."""
CHUNK = 256
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Figures:
    """What one shape gave."""

    shape: str
    dtype: str
    way: str
    split: bool
    """Whether the vocabulary was taken in slices."""
    tokens: int
    bare: list[float]
    """Tokens per second of each run."""
    head: list[float]

    @property
    def ratios(self) -> list[float]:
        """Head over bare, pair by pair."""
        return [head / bare for bare, head in zip(self.bare, self.head, strict=True)]


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--temperature", type=float, default=SketchConfig().temperature)
    parser.add_argument("--spread", type=float, default=2.0)
    parser.add_argument("--limit-mib", type=int, help="logits at a time; default: as `curate index` has it")
    parser.add_argument("--way", nargs="*", default=[None], choices=get_args(Way), help="default: the fastest")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = [each for shape in given.shape for each in measure(shape, given)]
    sys.stdout.write(table(found))
    if given.json:
        figures = [asdict(each) | {"ratio": statistics.median(each.ratios)} for each in found]
        given.json.write_text(json.dumps(measured_on(given.device) | {"heads": figures}, indent=1) + "\n", "utf-8")


def _limit(given: argparse.Namespace) -> int:
    if given.limit_mib:
        return int(given.limit_mib) * MIB
    return 1024 * MIB if given.device.startswith("cuda") else 40 * MIB * torch.get_num_threads()


@torch.inference_mode()
def measure(shape: str, given: argparse.Namespace) -> Iterator[Figures]:
    """Run the product and the head in turn, for each way."""
    hidden_dim, vocab = SHAPES[shape]
    dtype = getattr(torch, given.dtype)
    device = torch.device(given.device)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(vocab, hidden_dim, device=device, dtype=dtype)
    weight.normal_(std=given.spread / math.sqrt(hidden_dim), generator=generator)
    chunks = max(1, given.tokens // CHUNK)
    hidden = torch.empty(chunks, CHUNK, hidden_dim, device=device, dtype=dtype).normal_(generator=generator)
    ids = torch.randint(0, vocab, (chunks, CHUNK), device=device, generator=generator)
    config, limit = SketchConfig(temperature=given.temperature), _limit(given)
    for way in given.way:
        head = ReadoutHead(weight, config, max_logit_bytes=limit, way=way)
        rows = max(1, limit // (4 * vocab))

        def bare(rows: int = rows) -> None:
            for part in hidden.flatten(0, 1).split(rows):
                if dtype == torch.float32 or device.type == "cpu":
                    part @ weight.t()
                else:
                    torch.mm(part, weight.t(), out_dtype=torch.float32)

        def sketch(head: ReadoutHead = head) -> None:
            for some in range(0, chunks, 128):  # as many signatures at a time as a micro-batch has
                part = slice(some, some + 128)
                head.signatures(hidden[part], ids[part], [CHUNK] * len(ids[part]))

        _seconds(bare, device)  # both once, not counted
        _seconds(sketch, device)
        tokens = chunks * CHUNK
        pairs = [(tokens / _seconds(bare, device), tokens / _seconds(sketch, device)) for _ in range(given.runs)]
        yield Figures(
            shape, given.dtype, head.residuals.way, head.residuals.split, tokens, *map(list, zip(*pairs, strict=True))
        )


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def table(found: Sequence[Figures]) -> str:
    """Markdown."""
    lines = [
        "| shape | dtype | way | vocabulary | tokens | bare, tokens/s | head, tokens/s | ratio (min to max) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        row: list[Any] = [each.shape, each.dtype, each.way, "in slices" if each.split else "whole", f"{each.tokens:,}"]
        row += [f"{statistics.median(each.bare):,.0f}", f"{statistics.median(each.head):,.0f}"]
        row += [f"**{statistics.median(each.ratios):.2f}** ({min(each.ratios):.2f} to {max(each.ratios):.2f})"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
