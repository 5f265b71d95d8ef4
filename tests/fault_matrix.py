"""The fault matrix: what each stage of a run does under each fault. `tests/test_faults.py` tests every cell.

A fault "once" hits every single request of the stage the first time that it is made.
`python -m tests.fault_matrix` prints the table as Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from rise_ops.errors import CurationError, SourceError, StoreError, TransientError
from rise_ops.retry import Budget
from tests.fault_proxy import Fault, Rule
from tests.fault_stages import STAGES


@dataclass(frozen=True)
class Outcome:
    """What a stage does."""

    text: str
    """In the table."""
    error: type[CurationError] | None = None
    remedy: str = ""
    """Regular expression of the message."""


SAME = Outcome("same result")
SPENT = Outcome("`TransientError` when the budget is spent", TransientError)
STORE_REFUSED = Outcome("`StoreError` at once: which credentials to check", StoreError, "check AWS_.*SESSION_TOKEN")
SOURCE_REFUSED = Outcome("`SourceError` at once: which credentials to check", SourceError, "check AWS_.*SESSION_TOKEN")
CHANGED = Outcome("`SourceError` at once: run again when its writer has finished", SourceError, "changed while it was")
STORE_FULL = Outcome("`StoreError` at once: free space; then same result", StoreError, "no space left.*free some")
SPOOL_FULL = Outcome(
    "`StoreError` at once: which folder, and TMPDIR", StoreError, "temporary folder /.* is full.*TMPDIR"
)
READ_ONLY = Outcome(
    "`StoreError` at once: check owner and mount", StoreError, "read-only; check the folder's owner and"
)
HALVED = Outcome("same result, with a warning and smaller batches")
NEVER = Outcome("—")
"""The stage does nothing that the fault could hit."""


def _row(*outcomes: Outcome) -> dict[str, Outcome]:
    return dict(zip(STAGES, outcomes, strict=True))


EXPECTED: Mapping[str, Mapping[str, Outcome]] = {
    # list, read, write, sketch, value, select, export
    "500, once": _row(*[SAME] * 7),
    "503 SlowDown, once": _row(*[SAME] * 7),
    "connection reset, once": _row(*[SAME] * 7),
    "no answer, once": _row(*[SAME] * 7),
    "body cut short, once": _row(*[SAME] * 7),
    "wrong length, once": _row(*[SAME] * 7),
    "write done, answered 500, once": _row(NEVER, NEVER, *[SAME] * 5),
    "500, for ever": _row(*[SPENT] * 7),
    "no answer, for ever": _row(*[SPENT] * 7),
    "body cut short, for ever": _row(*[SPENT] * 7),
    "wrong length, for ever": _row(*[SPENT] * 7),
    "expired credentials": _row(STORE_REFUSED, SOURCE_REFUSED, *[STORE_REFUSED] * 5),
    "access denied": _row(STORE_REFUSED, SOURCE_REFUSED, *[STORE_REFUSED] * 5),
    "object changes while it is read": _row(NEVER, CHANGED, *[NEVER] * 5),
    "full disk": _row(SAME, NEVER, *[STORE_FULL] * 5),
    "read-only store": _row(SAME, NEVER, *[READ_ONLY] * 5),
    "full temporary disk": _row(SAME, SPOOL_FULL, SPOOL_FULL, SAME, *[SPOOL_FULL] * 3),
    "device out of memory": _row(NEVER, NEVER, NEVER, HALVED, *[NEVER] * 3),
}

QUICK = Budget(
    tries=6, connect_seconds=5.0, try_seconds=20.0, retry_seconds=30.0, first_pause=0.005, longest_pause=0.02
)
_IMPATIENT = Budget(
    tries=6, connect_seconds=1.0, try_seconds=0.7, retry_seconds=10.0, first_pause=0.005, longest_pause=0.02
)
HOPELESS = Budget(
    tries=3, connect_seconds=0.5, try_seconds=0.5, retry_seconds=0.7, first_pause=0.005, longest_pause=0.02
)
_TABLES = "/objects/"
"""Polars reads these with several requests, and twice at most: one lie is its share."""

NETWORK: Mapping[str, tuple[Budget, Callable[[], list[Rule]]]] = {
    "500, once": (QUICK, lambda: [Rule(Fault.INTERNAL_ERROR, times=1)]),
    "503 SlowDown, once": (QUICK, lambda: [Rule(Fault.SLOW_DOWN, times=1)]),
    "connection reset, once": (QUICK, lambda: [Rule(Fault.RESET, times=1)]),
    "no answer, once": (_IMPATIENT, lambda: [Rule(Fault.HANG, most=2, times=1)]),
    "body cut short, once": (QUICK, lambda: [Rule(Fault.TRUNCATED, "GET", times=1)]),
    "wrong length, once": (
        QUICK,
        lambda: [
            Rule(Fault.SHORT_LENGTH, "GET", f"^(?!.*{_TABLES})", times=1),
            Rule(Fault.SHORT_LENGTH, "GET", _TABLES, most=1),
        ],
    ),
    "write done, answered 500, once": (QUICK, lambda: [Rule(Fault.LOST_ANSWER, "PUT", times=1)]),
    "500, for ever": (QUICK, lambda: [Rule(Fault.INTERNAL_ERROR)]),
    "no answer, for ever": (HOPELESS, lambda: [Rule(Fault.HANG)]),
    "body cut short, for ever": (QUICK, lambda: [Rule(Fault.TRUNCATED, "GET")]),
    "wrong length, for ever": (QUICK, lambda: [Rule(Fault.SHORT_LENGTH, "GET")]),
    "expired credentials": (QUICK, lambda: [Rule(Fault.EXPIRED_TOKEN)]),
    "access denied": (QUICK, lambda: [Rule(Fault.ACCESS_DENIED)]),
}


def markdown() -> str:
    """The matrix as a table."""
    lines = [f"| fault | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    lines += [f"| {fault} | {' | '.join(row[stage].text for stage in STAGES)} |" for fault, row in EXPECTED.items()]
    return "\n".join(lines)


def cells(faults: Iterable[str]) -> list[tuple[str, str]]:
    """(fault, stage) of all cells of some rows in which something happens."""
    return [(fault, stage) for fault in faults for stage in STAGES if EXPECTED[fault][stage] is not NEVER]


if __name__ == "__main__":
    sys.stdout.write(markdown() + "\n")
