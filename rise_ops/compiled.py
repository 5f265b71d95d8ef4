"""Functions that Numba compiles when they are first called, which takes some seconds, and keeps in its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba

_OPTIONS: dict[str, Any] = {
    "nogil": True,
    # Sums in any order, or they would not be vectors; but no "nnan": what is not a number must stay so.
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the interpreter's lock; keep the result where there is a place for it."""
    try:
        made = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither this folder nor the user's can be written
        made = numba.njit(**_OPTIONS)(function)
    return cast(Callable[..., Any], made)
