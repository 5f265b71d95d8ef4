"""What notebooks show: progress while a call works, and results as tables of HTML.

Text that comes from a corpus is made visible (`rise_ops.visible`) and escaped: it can bring neither markup nor script
into a notebook. Progress is one line that goes when the call ends, in a notebook or on a terminal; where there is
neither, nothing is shown.
"""

from __future__ import annotations

import html
import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rise_ops.progress import Progress, silent
from rise_ops.visible import visible

_BETWEEN = 0.2
"""Seconds between two signs of progress, at least."""
_WIDTH = 28


@contextmanager
def shown_progress(what: str, *, shown: bool = True) -> Iterator[Progress]:
    """A `Progress` that is seen: as a line of the notebook's cell, or of the terminal.

    Parameters
    ----------
    what
        What is going on, such as "search".
    shown
        Whether to show anything.
    """
    line = _line() if shown else None
    if line is None:
        yield silent
        return
    began = latest = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest >= _BETWEEN:
            latest = now
            line.show(progress_text(what, done, total, seconds=now - began))

    try:
        yield tell
    finally:
        line.clear()


def progress_text(what: str, done: int, total: int | None, *, seconds: float) -> str:
    """One line that says how far something is.

    Examples
    --------
    >>> progress_text("verify", 500, 1000, seconds=2)
    'verify  ██████████████░░░░░░░░░░░░░░  500 of 1,000  2 s'
    >>> progress_text("search", 500, None, seconds=2)
    'search  500  2 s'
    """
    if not total:
        return f"{what}  {done:,}  {seconds:.0f} s"
    full = min(_WIDTH, _WIDTH * done // total)
    return f"{what}  {'█' * full}{'░' * (_WIDTH - full)}  {done:,} of {total:,}  {seconds:.0f} s"


class _Terminal:
    """A line of stderr."""

    def show(self, text: str) -> None:
        """Write it over the one before."""
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove it."""
        self.show("")


class _Cell:
    """An output of a notebook's cell."""

    def __init__(self) -> None:
        self._display = importlib.import_module("IPython.display")
        self._handle: Any = None

    def show(self, text: str) -> None:
        """Write it over the one before."""
        content = self._display.HTML(f"<code>{html.escape(text)}</code>" if text else "")
        if self._handle is None:
            self._handle = self._display.display(content, display_id=True)
        else:
            self._handle.update(content)

    def clear(self) -> None:
        """Empty it."""
        if self._handle is not None:
            self.show("")


def _line() -> _Cell | _Terminal | None:
    """Where progress can be seen: in a notebook, which has a kernel, or on a terminal."""
    if "IPython" in sys.modules:
        shell = importlib.import_module("IPython").get_ipython()
        if getattr(shell, "kernel", None) is not None:
            return _Cell()
    return _Terminal() if sys.stderr.isatty() else None


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> str:
    """A table; every cell is escaped, numbers stand to the right.

    Examples
    --------
    >>> html_table(["a"], [["<b>"]])
    '<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{escaped(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    title = f'<caption style="text-align:left">{caption}</caption>' if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Markup(str):
    """HTML that is right as it is."""

    __slots__ = ()


def escaped(text: object) -> str:
    """Any value as text of HTML."""
    return html.escape(visible(str(text)))


def _cell(value: Any) -> str:
    if isinstance(value, Markup):
        return f'<td style="text-align:left">{value}</td>'
    if isinstance(value, bool) or value is None:
        return f"<td>{'' if value is None else value}</td>"
    if isinstance(value, int):
        return f'<td style="text-align:right">{value:,}</td>'
    if isinstance(value, float):
        return f'<td style="text-align:right">{value:.4f}</td>'
    return f"<td>{escaped(value)}</td>"
