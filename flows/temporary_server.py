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
from functools import partial
from types import SimpleNamespace

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def start_temporary_server() -> None:
    """Start the server that Prefect's clients will find; it is stopped when the process exits.

    Call it from the main thread: the server is ended when the thread that started it is.
    """
    from prefect.server.api import server as module

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
        module.SubprocessASGIServer().start()
    finally:
        names["subprocess"] = subprocess
