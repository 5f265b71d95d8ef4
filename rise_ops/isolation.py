"""Work in a process of its own: what it takes is measured by itself, and what kills it kills nothing else.

The call goes to the child as JSON on its standard input, which then stays open: a child whose parent is gone finds
its end and stops. The child answers with lines of JSON on its standard output: how far it is, and at last a result or
an error. Named errors are raised here as what they were there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import rise_ops.errors as named
from rise_ops.errors import CurationError, WorkerError
from rise_ops.progress import Progress, silent
from rise_ops.redaction import error_text

Json = dict[str, Any]


def run_isolated(module: str, call: Json, *, progress: Progress = silent) -> Json:
    """Run `python -m module` on a call; the module ends with `answer(...)`.

    Raises
    ------
    CurationError
        What the child met, under its name.
    WorkerError
        The child died, or met something without a name.
    """
    command = [sys.executable, "-m", module]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(json.dumps(call) + "\n")
            child.stdin.flush()
            found = _listen(child.stdout, progress)
        except BrokenPipeError:
            found = None
        finally:
            child.kill()  # it has answered, or nobody waits for it any more
        code = child.wait()
    if found is None:
        raise WorkerError(f"the process of {module} {_death(code)}")
    return found


def answer(work: Callable[[Json, Progress], Json]) -> None:
    """The child's side: read the call, do the work, and tell how it went."""
    call: Json = json.loads(sys.stdin.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    told, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def tell(what: Json) -> None:
        told.write(json.dumps(what) + "\n")
        told.flush()

    try:
        found = work(call, lambda done, total: tell({"progress": [done, total]}))
    except CurationError as error:
        tell({"error": type(error).__name__, "text": error_text(error)})
    except MemoryError:
        tell({"error": "LimitError", "text": "the process ran out of memory"})
    else:
        tell({"result": found})


def _listen(lines: Any, progress: Progress) -> Json | None:
    for line in lines:
        told = json.loads(line)
        if "progress" in told:
            progress(*told["progress"])
        elif "error" in told:
            raise _error(told["error"], told["text"])
        else:
            result: Json = told["result"]
            return result
    return None


def _error(name: str, text: str) -> CurationError:
    kind = getattr(named, name, CurationError)
    if name == "DamagedError":  # which wants the object's place, too: whoever meets it again tells it
        kind = named.IntegrityError
    error: CurationError = kind(text)
    return error


def _death(code: int) -> str:
    if code < 0:
        return f"was killed by signal {-code}; if nobody did that, the machine lacks memory for it"
    return f"ended with exit code {code}; its log on stderr says why"


def _die_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)
