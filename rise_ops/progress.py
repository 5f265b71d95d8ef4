"""How long stages tell what they have done, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with (done, total) in the stage's own unit; total is None while it is unknown."""


def silent(done: int, total: int | None) -> None:
    """Ignore progress."""
