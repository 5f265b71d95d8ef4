"""What all flows share: how their runs are named, and who is told when one fails.

The variable `CURATE_NOTIFY_BLOCK` names a notification block on the Prefect server, such as `slack-webhook/data-team`;
any block of `prefect.blocks.notifications` will do. It is loaded when a run fails or crashes, and told the run, its
state, the first line of the error and where to look. A run that a person cancelled tells nobody. A process that is
killed runs no hooks: for that, the server needs an automation.

A notification that cannot be sent is a warning in the run's logs, which names the block and nothing that it holds:
what clients say of an error may quote the secret part of a URL. The run's own error stays what it was. One that takes
longer than a minute is given up, and keeps no process alive.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from contextvars import copy_context
from threading import Thread
from types import TracebackType
from typing import Any, TypedDict

from prefect import Flow, runtime
from prefect.client.schemas.objects import FlowRun, State
from prefect.utilities.urls import url_for

from rise_ops.redaction import error_text, redacted
from tasks.run_logs import arrange_logs

BLOCK_VARIABLE = "CURATE_NOTIFY_BLOCK"

_SECONDS = 60.0
_CHARACTERS = 400

_logger = logging.getLogger(__name__)


def run_name(what: str) -> str:
    """Name of the flow run that is about to begin: corpus, what it does, and when it was due, in UTC.

    Such as `support-curate-20260131T0200`; schedules and lists on a server are read by these.
    """
    due = runtime.flow_run.scheduled_start_time
    return f"{runtime.flow_run.parameters['config'].corpus.name}-{what}-{due:%Y%m%dT%H%M}"


def notify(flow: Flow[..., Any], run: FlowRun, state: State[Any]) -> None:
    """Tell whom `CURATE_NOTIFY_BLOCK` names how a run ended; does nothing where it names nobody."""
    slug = os.environ.get(BLOCK_VARIABLE, "").strip()
    if not slug:
        return
    arrange_logs()
    subject = f"{flow.name} run {run.name} {state.name}"
    body = "\n".join(part for part in (subject, _reason(state), url_for(run)) if part)
    error = _in_time(slug, subject, body)
    if error is None:
        _logger.info("told %s", slug)
    else:
        _logger.warning("%s could not be told (%s); check the block", slug, type(error).__name__)


class _Attempt:
    """What became of something that is tried: an error, or None once it is done."""

    def __init__(self) -> None:
        self.error: BaseException | None = TimeoutError()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self.error = error
        return True


def _in_time(slug: str, subject: str, body: str) -> BaseException | None:
    """Why it could not be sent, or None; in a thread that ends with the process, wherever it hangs."""
    attempt = _Attempt()

    def send() -> None:
        with attempt:
            _send(slug, subject, body)

    thread = Thread(target=copy_context().run, args=(send,), name="notification", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return attempt.error


def _send(slug: str, subject: str, body: str) -> None:
    import prefect.blocks.notifications  # noqa: F401  a block can be loaded once its type is known
    from prefect.blocks.abstract import NotificationBlock
    from prefect.blocks.core import Block

    block = Block.load(slug)
    if not isinstance(block, NotificationBlock):
        raise TypeError(f"{slug} is no notification block")
    with block.raise_on_failure():  # some blocks would only log it
        sent = block.notify(body, subject)
        if inspect.iscoroutine(sent):
            asyncio.run(sent)


def _reason(state: State[Any]) -> str:
    """The first line of what ended the run."""
    error = state.data if isinstance(state.data, BaseException) else state.result(raise_on_failure=False)
    text = error_text(error) if isinstance(error, BaseException) else redacted(state.message or "")
    return text.partition("\n")[0][:_CHARACTERS]


class _Options(TypedDict):
    persist_result: bool
    result_serializer: str
    on_failure: list[Any]
    on_crashed: list[Any]


FLOW_OPTIONS: _Options = {
    "persist_result": True,
    "result_serializer": "json",
    "on_failure": [notify],
    "on_crashed": [notify],
}
"""Of every flow: `@flow(name=…, flow_run_name=…, **FLOW_OPTIONS)`."""
