"""The temporary Prefect server of a run on the command line: it ends with the run, and holds nothing of it.

Prefect starts one by itself where no server is configured, as a child that has the run's stdout and its terminal.
Whoever reads the output of a killed run would then wait for ever, Ctrl-C would reach the server before the run has
told it how it ended, and the server would live on. So it is started here, before Prefect does it: in a session of
its own, without output, and with the wish to be ended when the run is gone (Linux).
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@contextmanager
def temporary_server() -> Iterator[None]:
    """Start a server for the clients of this process, and of those that run its tasks; it is stopped at exit.

    Call it from the main thread: the server is ended when the thread that started it is.
    """
    from prefect.server.api import server as module
    from prefect.settings import PREFECT_API_URL, temporary_settings

    libc = ctypes.CDLL(None)

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    detached = partial(
        subprocess.Popen,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=end_with_parent,
    )
    # Prefect has no setting for how it starts its server
    names = vars(module)
    names["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": detached})
    try:
        server = module.SubprocessASGIServer()
        server.start()
    finally:
        names["subprocess"] = subprocess
    # without the address, the processes of a cluster would each start a server of their own
    with temporary_settings({PREFECT_API_URL: server.api_url}):
        yield
