"""A command of `curate` that is killed at a chosen step: `python -m tests.killed STEP curate-arguments…`.

A step is the moment before or after a write to the store, or a removal (odd: before, even: after it was done,
before the program knows). STEP is a number, or PLACE:NUMBER for the steps at keys of one folder of the store; keys
inside of an array are at the place `array`. At that step the process gets SIGKILL; 0 lets it run, and the places of
all steps are then written to stderr. Blocks are small here, so that a few rows fill several.
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
from rise_ops.store import STORE_FOLDERS

MIN_ROWS = 8
MASK = 15

_lock = threading.Lock()
_places: list[str] = []


def main() -> None:
    """Arm the trap and run the command."""
    at = sys.argv[1]
    sys.argv[:2] = ["curate"]
    for name in ("blocks", "objects", "packs"):
        vars(importlib.import_module(f"rise_ops.{name}"))["MIN_ROWS"] = MIN_ROWS
    blocks._MASK = MASK
    _arm(at)
    from flows.cli import main as curate

    try:
        curate()
    finally:
        sys.stderr.write(f"places: {' '.join(_places)}\n")


def _arm(at: str) -> None:
    wanted, _, number = at.rpartition(":")
    put, put_async, delete = obstore.put, obstore.put_async, obstore.delete

    def step(key: object) -> None:
        first = str(key[0] if isinstance(key, list) else key).split("/")[0]
        with _lock:
            _places.append(first if first in STORE_FOLDERS else "array")
            here = _places.count(wanted) if wanted else len(_places)
            if here == int(number) and wanted in ("", _places[-1]):
                sys.stderr.write(f"killed at: {_places[-1]}\n")
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
