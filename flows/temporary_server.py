"""The temporary Prefect server of a run on the command line: it ends with the run, and holds nothing of it.

Prefect starts one by itself where no server is configured, as a child that has the run's stdout and its terminal.
Whoever reads the output of a killed run would then wait for ever, Ctrl-C would reach the server before the run has
told it how it ended, and the server would live on. So it is started here, before Prefect does it, with the command that
Prefect takes: in a session of its own, without the terminal, and with the wish to be ended when the run is gone
(Linux). It gets a socket that listens already, so nobody else can have its port, and nothing waits for it until a flow
is about to run: it imports its libraries while the run imports others.
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
from typing import IO

import httpx

from rise_ops.errors import ServerError

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_LOOK_SECONDS = 0.05
_STOP_SECONDS = 5.0
_COMMAND = ["-P", "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
_OWN = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
"""What Prefect sets for its own temporary server: no pages, and only the services that runs need."""
_REMEDY = "set PREFECT_API_URL to a server that runs, or PREFECT_HOME to a folder that can be written"


class TemporaryServer:
    """A server that starts at once, in the background, and is stopped when this process ends.

    Made in the main thread: the server is ended when the thread that started it is.

    Raises
    ------
    ServerError
        It cannot be started.
    """

    def __init__(self) -> None:
        try:
            self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
            with socket.create_server(("127.0.0.1", 0)) as listening:
                self._url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
                self._process = _start(listening, self._output)
        except OSError as error:
            raise ServerError(
                f"no temporary Prefect server can be started ({error}); set TMPDIR to a folder that can be written, or "
                "PREFECT_API_URL to a server that runs"
            ) from error
        # registered before others are, so called after them: what runs still have to tell it is sent before
        atexit.register(self.close)

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

    def close(self) -> None:
        """End it."""
        atexit.unregister(self.close)
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _wait(self) -> None:
        from prefect.settings import get_current_settings

        seconds = get_current_settings().server.ephemeral.startup_timeout_seconds
        until = time.monotonic() + seconds
        with httpx.Client(trust_env=False, timeout=1) as client:
            while not self._answers(client):
                if self._process.poll() is not None:
                    raise ServerError(f"the temporary Prefect server ended: {self._last_words()}; {_REMEDY}")
                if time.monotonic() > until:
                    silent = f"did not answer within {seconds} s: {self._last_words()}"
                    raise ServerError(f"the temporary Prefect server {silent}; {_REMEDY}")
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


def _start(listening: socket.socket, output: IO[bytes]) -> subprocess.Popen[bytes]:
    import prefect
    from prefect.settings import get_current_settings

    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    where = ["--app-dir", str(prefect.__module_path__.parent), "--fd", str(listening.fileno())]
    return subprocess.Popen(
        [sys.executable, *_COMMAND, *where, "--log-level", "error", "--lifespan", "on"],
        env={**os.environ, **_OWN, **get_current_settings().to_environment_variables(exclude_unset=True)},
        pass_fds=[listening.fileno()],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        preexec_fn=end_with_parent,
    )
