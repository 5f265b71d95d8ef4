"""A command of `curate` that is killed at a chosen step: `python -m tests.killed STEP curate-arguments…`.

A step is the moment before or after a write to the store, or a removal (odd: before, even: after it was done,
before the program knows). At step STEP the process gets SIGKILL; 0 lets it run, and the number of steps is written to
stderr as `steps: N`. Blocks are small here, so that a few rows fill several.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from typing import Any

import obstore

from rise_ops import blocks

MIN_ROWS = 8
MASK = 15

_lock = threading.Lock()
_steps = 0


def main() -> None:
    """Arm the trap and run the command."""
    at = int(sys.argv[1])
    sys.argv[:2] = ["curate"]
    for name in ("blocks", "objects", "packs"):
        vars(importlib.import_module(f"rise_ops.{name}"))["MIN_ROWS"] = MIN_ROWS
    blocks._MASK = MASK
    _arm(at)
    from flows.cli import main as curate

    try:
        curate()
    finally:
        sys.stderr.write(f"steps: {_steps}\n")


def _arm(at: int) -> None:
    put, put_async, delete = obstore.put, obstore.put_async, obstore.delete

    def step(key: object) -> None:
        global _steps
        with _lock:
            _steps += 1
            if _steps == at:
                sys.stderr.write(f"killed at: {key}\n")
                sys.stderr.flush()
                os.kill(os.getpid(), signal.SIGKILL)

    def counted(store: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        step(key)
        done = put(store, key, *arguments, **options)
        step(key)
        return done

    def counted_delete(store: Any, keys: Any) -> None:
        step(keys)
        delete(store, keys)
        step(keys)

    async def counted_async(store: Any, key: Any, *arguments: Any, **options: Any) -> Any:
        step(key)
        done = await put_async(store, key, *arguments, **options)
        step(key)
        return done

    vars(obstore).update(put=counted, put_async=counted_async, delete=counted_delete)


if __name__ == "__main__":
    main()
