"""The temporary Prefect server, with small programs in its place: how it starts, fails, and ends.

The real one is behind every test that runs the command without a server.
"""

from __future__ import annotations

import socket
import tempfile
import textwrap
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from prefect.settings import PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, get_current_settings, temporary_settings

from flows import temporary_server as module
from flows.temporary_server import TemporaryServer
from rise_ops.errors import ServerError

_ANSWERS = """
    import socket
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    server.serve_forever()
"""


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for every start of the program."""
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    return tmp_path / "starts"


def _program(starts: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = f"import os, sys, time; open({str(starts)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
    monkeypatch.setattr(module, "_COMMAND", ["-c", head + textwrap.dedent(body)])


def _started(starts: Path) -> list[int]:
    return [int(line) for line in starts.read_text().splitlines()]


def _is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def test_clients_use_it_until_it_is_stopped(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(starts, _ANSWERS, monkeypatch)
    before = get_current_settings().api.url
    with closing(TemporaryServer()) as server:
        assert get_current_settings().api.url == before
        with server.in_use():
            assert str(get_current_settings().api.url).startswith("http://127.0.0.1:")
            (process,) = _started(starts)
            assert _is_alive(process)
    assert get_current_settings().api.url == before
    assert not _is_alive(process)


def test_nothing_waits_for_it_before_it_is_used(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(starts, "time.sleep(60)", monkeypatch)
    begun = time.monotonic()
    with closing(TemporaryServer()):
        pass
    assert time.monotonic() - begun < 30


def test_its_port_is_its_own_from_the_beginning(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(starts, "time.sleep(60)", monkeypatch)
    with closing(TemporaryServer()) as server:
        address = httpx.URL(server._url)
        with pytest.raises(OSError, match="in use"), socket.create_server((address.host, address.port or 0)):
            pass


def test_one_that_ends_is_told_of_with_its_last_words(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(starts, "print('no such table\\n', file=sys.stderr); sys.exit(3)", monkeypatch)
    with closing(TemporaryServer()) as server, pytest.raises(ServerError, match="ended: no such table; set PREFECT"):
        server.in_use().__enter__()
    assert len(_started(starts)) == 1


def test_one_that_cannot_be_started_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(ServerError, match=r"No such file or directory.*set TMPDIR"):
        TemporaryServer()


def test_one_that_never_answers_is_told_of_and_ended(starts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(starts, "time.sleep(60)", monkeypatch)
    with (
        temporary_settings({PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 1}),
        closing(TemporaryServer()) as server,
        pytest.raises(ServerError, match="did not answer within 1 s: it said nothing"),
    ):
        server.in_use().__enter__()
    (process,) = _started(starts)
    assert not _is_alive(process)
