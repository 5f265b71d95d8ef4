"""Fuzzing by coverage, where atheris is installed: libFuzzer keeps the damage that reaches new code.

    python -m tests.fuzz.guided FOLDER -max_total_time=60 -seed=1

FOLDER keeps what reached something new. An input is the number of a seed's name, one byte, and its bytes. The
first exception that is neither an outcome nor a named error ends the run; -artifact_prefix= says where its input
goes.
"""

from __future__ import annotations

import importlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    """Run libFuzzer; it does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["rise_ops"]):
        from tests.fuzz.cases import Sources
        from tests.fuzz.mutate import mutated

    target = Sources(Path(tempfile.mkdtemp(prefix="fuzz-")))
    names = sorted(target.seeds)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        (corpus / name).write_bytes(bytes([place]) + target.seeds[name])

    def run(data: bytes) -> None:
        if data:
            target.run(names[data[0] % len(names)], data[1:])

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        choose = random.Random(seed)
        changed = mutated(data[1:], choose) if choose.randrange(2) else bytes(atheris.Mutate(data[1:], most - 1))
        return (data[:1] or b"\0") + changed[: most - 1]

    options = [sys.argv[0], *sys.argv[2:], "-max_len=20000", str(corpus)]
    atheris.Setup(options, run, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
