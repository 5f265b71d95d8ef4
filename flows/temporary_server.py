"""The temporary Prefect server of a run on the command line: it ends with the run, and holds nothing of it.

Prefect starts one by itself where no server is configured, as a child that has the run's stdout and its terminal.
Whoever reads the output of a killed run would then wait for ever, Ctrl-C would reach the server before the run has
told it how it ended, and the server would live on. So it is started here, before Prefect does it, as Prefect does it:
in a session of its own, with output of its own, and with the wish to be ended when the run is gone (Linux). Nothing
waits for it until a flow is about to run: it imports its libraries while the run imports others.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import httpx

from rise_ops.errors import ServerError

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_TRIES = 3
_CANNOT_LISTEN = 1  # uvicorn's exit status where another process has the port
_LOOK_SECONDS = 0.05
_STOP_SECONDS = 5.0
_COMMAND = ["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
_OWN = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""What Prefect sets for its own temporary server: no pages, and only the services that runs need."""


class TemporaryServer:
    """A server that starts at once, in the background, and is stopped when this process ends.

    Made in the main thread: the server is ended when the thread that started it is.
    """

    def __init__(self) -> None:
        # first registered, last called: what runs still have to tell it is sent before
        atexit.register(self.stop)
        self._tries = 0
        self._process, self._output = self._start()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Wait until it answers; then the clients of this process, and of those that run its tasks, use it.

        Raises
        ------
        ServerError
            It ended, or did not answer in time; the message has its last words.
        """
        from prefect.settings import PREFECT_API_URL, temporary_settings

        self._wait()
        # without the address, the processes of a cluster would each start a server of their own
        with temporary_settings({PREFECT_API_URL: self._url}):
            yield

    def stop(self) -> None:
        """End it."""
        atexit.unregister(self.stop)
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        from prefect.settings import get_current_settings

        self._tries += 1
        port = _free_port()
        self._url = f"http://127.0.0.1:{port}/api"
        libc = ctypes.CDLL(None)

        def end_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        where = ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        output = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *_COMMAND, *where],
            env={**os.environ, **_OWN, **settings},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=end_with_parent,
        )
        return process, output

    def _wait(self) -> None:
        from prefect.settings import get_current_settings

        seconds = get_current_settings().server.ephemeral.startup_timeout_seconds
        until = time.monotonic() + seconds
        with httpx.Client(trust_env=False) as client:
            while not self._answers(client):
                ended = self._process.poll()
                if ended == _CANNOT_LISTEN and self._tries < _TRIES:
                    self._output.close()
                    self._process, self._output = self._start()
                elif ended is not None:
                    raise ServerError(f"the temporary Prefect server ended: {self._last_words()}; {_REMEDY}")
                if time.monotonic() > until:
                    raise ServerError(f"the temporary Prefect server did not answer within {seconds} s; {_REMEDY}")
                time.sleep(_LOOK_SECONDS)

    def _answers(self, client: httpx.Client) -> bool:
        try:
            return client.get(f"{self._url}/health").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


_REMEDY = "set PREFECT_API_URL to a server that runs, or PREFECT_HOME to a folder that can be written"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: Any = probe.getsockname()[1]
    return int(port)
