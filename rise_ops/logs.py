"""Log records that say what they belong to: the run, its stage, the task and the block.

The fields are context variables: whoever begins a run, a stage or a block sets them (`log_fields`), and every record
that is logged meanwhile carries them, whichever module logs it, in threads of `rise_ops.threads`, too. Handlers
show them through the formatters of this module, either in front of the message or, with `CURATE_LOG_FORMAT=json`, one
JSON object a line: time, level, logger, message, run_id, stage, task, block_id, and error where there is one. Fields
that do not apply are null. Values of secrets that this process knows are taken out of every line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from rise_ops.redaction import redacted

T = TypeVar("T")

Format = Literal["plain", "json"]

FORMAT_VARIABLE = "CURATE_LOG_FORMAT"
FIELDS = ("run_id", "stage", "task", "block_id")
PACKAGES = ("rise_ops", "tasks", "flows")
"""Names that our loggers begin with."""

_BLOCK_CHARACTERS = 12
_fields: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default=MappingProxyType({}))


@contextmanager
def log_fields(
    *, run_id: str | None = None, stage: str | None = None, task: str | None = None, block_id: str | None = None
) -> Iterator[None]:
    """Records carry these fields while the context lasts; None leaves a field as it is."""
    given = {"run_id": run_id, "stage": stage, "task": task, "block_id": block_id}
    token = _fields.set({**_fields.get(), **{name: value for name, value in given.items() if value is not None}})
    try:
        yield
    finally:
        _fields.reset(token)


def each_block(items: Iterable[T], block_id: Callable[[T], str]) -> Iterator[T]:
    """The same items, one by one; records that are logged until the next one carry the id of its block.

    It stays with what is logged of an error that ends the loop, until the context around the loop (`log_fields`) ends.
    Where there is none, nothing would end it, and records carry no block.
    """
    before = _fields.get()
    if not before:
        yield from items
        return
    for item in items:
        _fields.set({**before, "block_id": block_id(item)})
        yield item
    _fields.set(before)


def current_fields() -> dict[str, str | None]:
    """The fields of a record that is logged now."""
    found = _fields.get()
    return {name: found.get(name) for name in FIELDS}


def place(*, whole: bool = False) -> str:
    """The fields in short, such as `1a2b3c index/sketch 0123456789ab`; whole: with all of the run's id."""
    found = current_fields()
    run_id, block_id = found["run_id"] or "", found["block_id"] or ""
    steps = [step for step in dict.fromkeys((found["stage"], found["task"])) if step]
    parts = (run_id if whole else run_id.rpartition("-")[2], "/".join(steps), block_id[:_BLOCK_CHARACTERS])
    return " ".join(part for part in parts if part)


class PlainFormatter(logging.Formatter):
    """`LEVEL logger [run stage/task block]: message`; with `bare` only from the bracket on, with the whole run id."""

    def __init__(self, *, bare: bool = False) -> None:
        super().__init__()
        self._bare = bare

    def format(self, record: logging.LogRecord) -> str:
        """The record as text; an error's traceback follows."""
        where = place(whole=self._bare)
        text = super().format(record)
        if self._bare:
            return redacted(f"[{where}] {text}" if where else text)
        return redacted(f"{record.levelname} {record.name}{f' [{where}]' if where else ''}: {text}")


def json_formatter() -> logging.Formatter:
    """One JSON object a record."""
    from pythonjsonlogger.json import JsonFormatter

    class ContextJson(JsonFormatter):
        def process_log_record(self, log_record: dict[str, Any]) -> dict[str, Any]:
            return {name: redacted(value) if isinstance(value, str) else value for name, value in log_record.items()}

        def add_fields(
            self, log_record: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
        ) -> None:
            error = message_dict.pop("exc_info", None)
            message_dict.pop("stack_info", None)
            log_record |= {
                "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
                "level": record.levelname,
                "logger": record.name,
                "message": record.getMessage(),
                **current_fields(),
            }
            if error:
                log_record["error"] = error

    return ContextJson(json_ensure_ascii=False)


def wanted_format() -> Format:
    """What the environment asks for."""
    return "json" if os.environ.get(FORMAT_VARIABLE, "").strip().lower() == "json" else "plain"


def formatter(kind: Format) -> logging.Formatter:
    """A formatter for handlers that write to a terminal or a file."""
    return json_formatter() if kind == "json" else PlainFormatter()
