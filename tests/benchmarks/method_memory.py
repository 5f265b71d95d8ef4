"""Working memory that methods of a comparison plan for each model preset, and what they really take.

    python -m tests.benchmarks.method_memory [--json FILE]
    python -m tests.benchmarks.method_memory --measure pythia-14m [--methods rise rapidin ...] [--memory 2GiB]

Without `--measure` nothing is loaded: plans follow from sizes, for 5,000 rows of 500 bytes and 100 queries, and the
Markdown tables say where each method stops to fit. Of RISE, which fits its batches into what there is, the least is
shown that it works with. The model's weights come on top for all.

With `--measure` a model of random weights is saved to a temporary folder, and each method reads some rows as long as it
looks at and scores them, in a process of its own, in float32 on the CPU, allowed no more than it plans, RISE what
`--memory` says. Measured is the peak of resident memory beyond the loaded model; code that is loaded on first use is
part of it (some 50 MiB). `z0_inf` is left out, which loads its models as it goes and else does what `loss` does, and so
is what reads no model.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ByteSize, TypeAdapter

from rise_ops.baselines.base import Method, Query, Setting
from rise_ops.baselines.registry import METHODS, open_method
from rise_ops.compare_config import MethodConfig
from rise_ops.config import ModelConfig
from rise_ops.errors import LimitError
from rise_ops.families import PRESETS, Preset, find_preset
from rise_ops.memory import MIB
from rise_ops.scratch import Scratch
from tests.benchmarks.memory import resident

GIB = 2**30
BUDGETS = (8 * GIB, 24 * GIB, 80 * GIB)
MEASURED = ("rise", "rapidin", "trackstar", "last_layer", "hidden_state", "loss")
_ROWS, _ROW_BYTES, _QUERIES = 5_000, 500, 100
_LONG = 1_200
"""Characters, and with random letters about tokens, of a measured row: more than any method looks at."""
_METHOD: TypeAdapter[MethodConfig] = TypeAdapter(MethodConfig)


@dataclass(frozen=True, slots=True)
class SomeRows:
    """Rows in one batch."""

    texts: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[list[str]]:
        yield self.texts


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the plans are written, too")
    parser.add_argument("--measure", metavar="NAME", help="preset whose random weights are measured")
    parser.add_argument("--methods", nargs="+", choices=MEASURED, default=MEASURED)
    parser.add_argument(
        "--memory", type=TypeAdapter(ByteSize).validate_python, default=2 * GIB, help="what RISE may take"
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        setting = measured_setting(find_preset(given.measure), given.folder, int(given.memory))
        sys.stdout.write(json.dumps(run_one(given.one, setting, rows=given.rows)) + "\n")
    elif given.measure:
        sys.stdout.write(measure(find_preset(given.measure), given.methods, int(given.memory), given.rows))
    else:
        found = plans()
        sys.stdout.write(needs_table(found) + "\n" + limits_table(found))
        if given.json:
            given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def configured(name: str) -> MethodConfig:
    """A method as it is without parameters; Z0-Inf with one checkpoint."""
    more = {"checkpoints": ["earlier"]} if name == "z0_inf" else {}
    return _METHOD.validate_python({"method": name, **more})


def planned_setting(preset: Preset, memory: int) -> Setting:
    """The comparison that plans are made for."""
    return Setting(
        model=ModelConfig(name=preset.name),
        sketch=preset.widths.sketch,
        shape=preset.shape(),
        scratch=Scratch(Path(), 0),
        memory=memory,
        rows=_ROWS,
        text_bytes=_ROWS * _ROW_BYTES,
        queries=_QUERIES,
        seed=42,
    )


def plans() -> dict[str, dict[str, int]]:
    """Bytes by preset, smallest model first, and method."""
    found: dict[str, dict[str, int]] = {}
    for preset in sorted(PRESETS.values(), key=lambda each: each.shape().parameters):
        setting = planned_setting(preset, max(BUDGETS))
        found[preset.name] = {
            name: least_rise(preset) if name == "rise" else open_method(configured(name), setting).need().bytes
            for name in METHODS
        }
    return found


def least_rise(preset: Preset) -> int:
    """The least memory, to 16 MiB, with which signatures of the recommended sketch can be computed in float32."""
    low, high = 0, 4_096
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _works(preset, middle * 16 * MIB) else (middle + 1, high)
    return low * 16 * MIB


def _works(preset: Preset, memory: int) -> bool:
    try:
        open_method(configured("rise"), planned_setting(preset, memory)).need()
    except LimitError:
        return False
    return True


def needs_table(found: Mapping[str, Mapping[str, int]]) -> str:
    """GiB of each method for each model."""
    names = list(METHODS)
    lines = [f"| model | weights, float32 | {' | '.join(names)} |", f"|---{'|---:' * (len(names) + 1)}|"]
    for model, needs in found.items():
        weights = 4 * PRESETS[model].shape().parameters
        cells = [_gib(weights), *(_gib(needs[name]) for name in names)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size < 100 * GIB else f"{size / GIB:,.0f}"


def limits_table(found: Mapping[str, Mapping[str, int]]) -> str:
    """The smallest model with which each method does not fit."""
    budgets = " | ".join(f"{budget // GIB} GiB" for budget in BUDGETS)
    lines = [f"| stops to fit at | {budgets} |", f"|---{'|---' * len(BUDGETS)}|"]
    for name in METHODS:
        cells = [next((model for model in found if found[model][name] > budget), "never") for budget in BUDGETS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def measure(preset: Preset, methods: Sequence[str], memory: int, rows: int) -> str:
    """A Markdown table of planned and measured memory.

    Raises
    ------
    RuntimeError
        A method failed.
    """
    from tests.tiny_models import save_tokenizer

    lines = [f"| {preset.name} | planned, MiB | measured, MiB | part |", "|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        preset.build().save_pretrained(folder)
        save_tokenizer(Path(folder))
        for name in methods:
            command = [sys.executable, "-m", "tests.benchmarks.method_memory", "--measure", preset.name, "--one", name]
            command += ["--folder", folder, "--memory", str(memory), "--rows", str(rows)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} failed:\n{done.stderr}")
            told = json.loads(done.stdout.splitlines()[-1])
            part = f"{100 * told['measured'] / told['planned']:.0f} %"
            lines.append(f"| {name} | {told['planned'] / MIB:,.0f} | {told['measured'] / MIB:,.0f} | {part} |")
    return "\n".join(lines) + "\n"


def measured_setting(preset: Preset, folder: str, memory: int) -> Setting:
    """The same with a model that is there."""
    model = ModelConfig(name=folder, device="cpu", dtype="float32")
    return replace(planned_setting(preset, memory), model=model, scratch=Scratch(Path(folder), 0))


def run_one(name: str, setting: Setting, *, rows: int) -> dict[str, Any]:
    """Load, build and score in this process; bytes planned and taken beyond the loaded model."""
    from rise_ops.heap import steady_heap
    from rise_ops.trunk import load_trunk

    steady_heap()
    planned = open_method(configured(name), setting).need().bytes
    allowed = setting.memory if name == "rise" else planned
    method = open_method(configured(name), replace(setting, memory=allowed, rows=rows, queries=2))
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=_LONG)) for _ in range(rows)]
    load_trunk(setting.model).encode(texts)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = resident("VmRSS")
    _work(method, texts)
    return {"planned": planned, "measured": resident("VmHWM") - base}


def _work(method: Method, texts: list[str]) -> None:
    rows = SomeRows(texts)
    method.load()
    method.build(rows)
    for _ in method.scores(rows, [Query(text) for text in texts[:2]]):
        pass


if __name__ == "__main__":
    main()
