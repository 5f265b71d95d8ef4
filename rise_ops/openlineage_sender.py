"""Sending OpenLineage events through the client library, without ever holding up or failing a run.

Where events go is configured as in every OpenLineage integration: the variables `OPENLINEAGE_URL`,
`OPENLINEAGE_API_KEY`, `OPENLINEAGE_CONFIG`, `OPENLINEAGE__TRANSPORT__…`, or a file `openlineage.yml` in the working
folder or in `~/.openlineage`. Where nothing is configured nothing is sent (the library alone would print the events),
and `OPENLINEAGE_DISABLED=true` turns it off.

One thread sends the events in their order. A run waits for it for `PATIENCE` seconds at its end, and not at all
before; what could not be sent by then is told in one warning.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from types import TracebackType

from openlineage.client import OpenLineageClient
from openlineage.client.event_v2 import RunEvent
from openlineage.client.transport.noop import NoopConfig, NoopTransport

PATIENCE = 3.0
"""Seconds that the end of a run waits for events that are under way."""

_logger = logging.getLogger(__name__)


def open_sender() -> Sender | None:
    """A sender for the transport that is configured; None where there is none, or where it cannot be opened."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return None
    faults = _Faults()
    client = None
    with faults:
        client = _configured_client()
    if faults.count:
        _logger.warning("no OpenLineage events are sent: the transport's configuration is wrong (%s)", faults.last)
    return None if client is None else Sender(client)


def _configured_client() -> OpenLineageClient | None:
    before = set(os.environ)
    try:
        settings = OpenLineageClient(transport=NoopTransport(NoopConfig())).config
        if (settings.transport or {}).get("type") or os.environ.get("OPENLINEAGE_URL"):
            return OpenLineageClient()
        return None
    finally:
        for name in os.environ.keys() - before:  # the client writes the URL and its key there once more
            del os.environ[name]


class Sender:
    """Sends events in a thread of its own."""

    def __init__(self, client: OpenLineageClient) -> None:
        self._client = client
        self._events: queue.SimpleQueue[RunEvent | None] = queue.SimpleQueue()
        self._faults = _Faults()
        self._given = self._done = 0
        # a daemon: a server that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._send_all, name="openlineage", daemon=True)
        self._thread.start()

    def send(self, event: RunEvent) -> None:
        """Send an event, later. The client adds to it, so it is not to be used any more."""
        self._given += 1
        self._events.put(event)

    def close(self, *, kept: str) -> None:
        """Wait a little for what is under way; warn of what was not sent. `kept`: where all events are."""
        self._events.put(None)
        self._thread.join(PATIENCE)
        lost = self._faults.count + self._given - self._done
        if lost:
            reason = self._faults.last or "no answer yet"
            _logger.warning("%d of %d OpenLineage events were not sent (%s); %s has them all",
                            lost, self._given, reason, kept)  # fmt: skip

    def _send_all(self) -> None:
        while (event := self._events.get()) is not None:
            with self._faults:
                self._client.emit(event)
            self._done += 1
        with _Faults():
            self._client.close(PATIENCE)


class _Faults:
    """Takes whatever is raised inside, and counts it: a transport may be anybody's code."""

    def __init__(self) -> None:
        self.count = 0
        self.last = ""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if kind is None or not issubclass(kind, Exception):
            return False
        self.count += 1
        status = getattr(getattr(error, "response", None), "status_code", None)
        # not the message: it may name a URL with its key
        self.last = kind.__name__ if status is None else f"{kind.__name__}: status {status}"
        return True
