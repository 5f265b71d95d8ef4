"""Sketching beside the bare forward pass that it cannot do without: tokens per second of both, in turn, in one process.

    python -m tests.benchmarks.sketch [--model DIR ...] [--preset NAME ...] [--rows FILE] [--tokens 60000] [--runs 5]
                                      [--temperature T] [--device cpu] [--dtype float32] [--json FILE] [--profile]

Stage: what a run does with blocks of rows, whole: texts are read from the store, tokenised, put into micro-batches, run
through the model and the head, averaged, written as Zarr arrays, checked and recorded. Bare: `model(input_ids,
attention_mask).logits` on the same micro-batches, which are there already. Both take turns; the ratio of each pair is
what a busy machine changes least, and the median of the ratios is the figure. More than 1 is possible: the bare pass
holds the logits of a whole micro-batch at once.

Presets (`curate models`) have random weights. Their predictions are close to uniform, so that nearly all 256 entries of
every support are kept: trained models are cheaper. Without `--rows` (JSON lines with known row shapes) rows are random
words.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rise_ops.blocks import read_texts
from rise_ops.chunking import plan_batches, row_chunks
from rise_ops.config import FieldMap, LimitsConfig, ModelConfig, SketchConfig
from rise_ops.corpus import read_rows
from rise_ops.demo.corpus import MODEL_FOLDER
from rise_ops.families import PRESETS, find_preset
from rise_ops.indexing import sketch_blocks
from rise_ops.machine import measured_on
from rise_ops.session import block_rows
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.trunk import Trunk, load_trunk, unload_trunk
from tests.corpora import corpus_of, ingest_all, make_rows, write_as
from tests.tiny_models import save_tokenizer

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Figures:
    """What one model gave."""

    model: str
    dtype: str
    tokens: int
    rows: int
    batches: int
    temperature: float
    bare: list[float]
    """Tokens per second of each run."""
    stage: list[float]

    @property
    def ratios(self) -> list[float]:
        """Stage over bare, pair by pair."""
        return [stage / bare for bare, stage in zip(self.bare, self.stage, strict=True)]

    def as_json(self) -> dict[str, Any]:
        """Everything, with the medians."""
        return asdict(self) | {"ratio": statistics.median(self.ratios), "ratios": self.ratios}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="*", default=[], help="folders of models")
    parser.add_argument("--preset", nargs="*", default=[], choices=sorted(PRESETS), help="shapes with random weights")
    parser.add_argument("--rows", type=Path, help="JSON lines")
    parser.add_argument("--tokens", type=int, default=60_000, help="about so many, of all rows")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=SketchConfig().temperature)
    parser.add_argument("--memory", type=int, default=2 * GIB, help="bytes beside the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="print where the time of one stage goes")
    given = parser.parse_args()
    found = []
    for place in _models(given):
        config = ModelConfig(name=str(place), device=given.device, dtype=given.dtype)
        with tempfile.TemporaryDirectory(prefix="sketch-") as folder:
            found.append(measure(config, Path(folder), given))
    sys.stdout.write(table(found))
    if given.json:
        given.json.write_text(
            json.dumps(measured_on(given.device) | {"models": [each.as_json() for each in found]}, indent=1) + "\n",
            encoding="utf-8",
        )


def _models(given: argparse.Namespace) -> Iterator[Path]:
    """Folders of the models, one at a time."""
    yield from (path.resolve() for path in given.model or ([] if given.preset else [MODEL_FOLDER]))
    for name in given.preset:
        with tempfile.TemporaryDirectory(prefix="model-") as folder:
            place = Path(folder) / name
            find_preset(name).build(dtype="float32").save_pretrained(place)
            save_tokenizer(place)
            yield place


def measure(config: ModelConfig, folder: Path, given: argparse.Namespace) -> Figures:
    """Run both in turn."""
    trunk = load_trunk(config)
    signer = Signer(trunk, SketchConfig(temperature=given.temperature), memory=given.memory)
    texts = list(_texts(given.rows, trunk, given.tokens))
    rows = write_as(folder / "rows.jsonl", [{"text": text} for text in texts])
    bench = Bench(signer, Store(str(folder / "store")), rows)
    bench.bare()  # both once, not counted
    bench.stage()
    if given.profile:
        sys.stdout.write(bench.profile())
    bare, stage = [], []
    for _ in range(given.runs):
        bare.append(bench.tokens / bench.bare())
        stage.append(bench.tokens / bench.stage())
        sys.stderr.write(f"{trunk.name}: bare {bare[-1]:,.0f}, stage {stage[-1]:,.0f} tokens/s\n")
    unload_trunk(trunk)
    return Figures(
        model=Path(config.name).name,
        dtype=str(trunk.dtype).removeprefix("torch."),
        tokens=bench.tokens,
        rows=sum(map(len, bench.texts)),
        batches=len(bench.batches),
        temperature=given.temperature,
        bare=bare,
        stage=stage,
    )


class Bench:
    """The rows of a corpus, for both ways."""

    def __init__(self, signer: Signer, store: Store, rows: Path) -> None:
        self.signer, self.store = signer, store
        version = ingest_all(store, corpus_of(rows))
        self.blocks = list(block_rows(store, version))
        self.texts = [read_texts(store, block) for block in self.blocks]
        encoded = [signer.trunk.encode(texts) for texts in self.texts]
        self.tokens = sum(len(found.ids) for block in encoded for found in block)
        self.batches = [batch for block in encoded for batch in _batches(signer, block)]
        self._runs = 0

    @torch.inference_mode()
    def bare(self) -> float:
        """Seconds of the model's own logits."""
        model = self.signer.trunk.model
        started = time.perf_counter()
        for ids, mask in self.batches:
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # noqa: B018
        _wait(self.signer.trunk)
        return time.perf_counter() - started

    def stage(self) -> float:
        """Seconds of the stage, into an index of its own."""
        self._runs += 1
        identity = f"{self._runs:064x}"
        started = time.perf_counter()
        sketch_blocks(self.store, identity, self.blocks, dim=self.signer.sketch.dim, signer=lambda: self.signer)
        _wait(self.signer.trunk)
        seconds = time.perf_counter() - started
        self.store.delete(list(dict(self.store.list(f"indexes/{identity}/"))))
        return seconds

    def profile(self) -> str:
        """Where the time of one stage goes, by operator."""
        with torch.profiler.profile() as profile:
            self.stage()
        return str(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def _batches(signer: Signer, encoded: Sequence[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded ids and masks of the micro-batches of a block, on the device."""
    chunks = [chunk for row, found in enumerate(encoded) for chunk in row_chunks(row, len(found.ids))]
    lengths = [len(chunk) for chunk in chunks]
    for batch in plan_batches(lengths, max_tokens=signer.plan.tokens, max_chunks=signer.plan.chunks):
        ids = np.zeros((len(batch), max(lengths[index] for index in batch)), np.int64)
        mask = np.zeros_like(ids)
        for slot, index in enumerate(batch):
            chunk = chunks[index]
            ids[slot, : len(chunk)] = encoded[chunk.row].ids[chunk.start : chunk.stop]
            mask[slot, : len(chunk)] = 1
        yield torch.from_numpy(ids).to(signer.trunk.device), torch.from_numpy(mask).to(signer.trunk.device)


def _texts(path: Path | None, trunk: Trunk, tokens: int) -> Iterator[str]:
    """Rows until there are enough tokens."""
    if path is None:
        rows = (str(row["text"]) for row in make_rows(tokens // 60, words=60))
    else:
        rows = (str(row.text) for row in read_rows(str(path.resolve()), FieldMap(), LimitsConfig()))
    for text in rows:
        if tokens <= 0:
            return
        tokens -= trunk.count_tokens(text)
        yield text


def _wait(trunk: Trunk) -> None:
    if trunk.device.type == "cuda":
        torch.cuda.synchronize(trunk.device)


def table(found: Sequence[Figures]) -> str:
    """Markdown."""
    lines = [
        "| model | dtype | tokens | rows | bare, tokens/s | stage, tokens/s | ratio (min to max) |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        bare, stage = statistics.median(each.bare), statistics.median(each.stage)
        ratios = each.ratios
        lines.append(
            f"| {each.model} | {each.dtype} | {each.tokens:,} | {each.rows:,} | {bare:,.0f} | {stage:,.0f} | "
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
