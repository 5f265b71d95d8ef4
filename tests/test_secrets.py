"""Secrets that were planted turn up nowhere: not in output, logs, the store, or the Prefect server's database.

`curate` runs as a process with a Prefect home of its own, so that everything it leaves can be searched afterwards.
Servers that refuse echo what they were sent, as Amazon's does with an expired token.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows.index_corpus import index_corpus
from rise_ops.config import parse_config
from rise_ops.errors import ConfigError, CurationError, StoreError
from rise_ops.retry import BUDGET
from rise_ops.sources import hash_object, list_objects
from rise_ops.store import Store
from tests.curation import write_curation

ROOT = Path(__file__).parents[1]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEYID0001",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+key/0123456789abcdefghij",
    "AWS_SESSION_TOKEN": "planted-session-token//0123456789==",
    "HF_TOKEN": "hf_plantedtokenplantedtoken",
    "OPENLINEAGE_API_KEY": "planted-lineage-api-key",
    "PREFECT_API_KEY": "pnu_plantedprefectapikey",
    "PREFECT_API_AUTH_STRING": "planted-user:planted-prefect-password",
}
PASSWORD = "planted-url-password"
SIGNATURE = "plantedsignature0123456789abcdef"
ALL = (*PLANTED.values(), PASSWORD, SIGNATURE)


def found_in(data: bytes | str) -> list[str]:
    """Planted secrets in it, also as JSON and URLs write them."""
    text = data if isinstance(data, bytes) else data.encode()
    forms = {
        secret: {secret, json.dumps(secret)[1:-1], secret.replace("/", "%2F").replace("+", "%2B")} for secret in ALL
    }
    return [secret for secret, ways in forms.items() if any(way.encode() in text for way in ways)]


def leaks(folder: Path) -> dict[str, list[str]]:
    """File → planted secrets in it; databases and their write-ahead logs too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): found for path in files if (found := found_in(path.read_bytes()))}


@dataclass(frozen=True)
class Ended:
    code: int
    output: str


def run_curate(folder: Path, *arguments: str, **variables: str) -> Ended:
    """`curate` with every secret planted, all logs, and a Prefect home in `folder`."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "AWS_"))},
        "AWS_EC2_METADATA_DISABLED": "true",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "rise_ops,tasks,flows",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        **PLANTED,
        **variables,
    }
    command = [sys.executable, "-c", "from flows.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    return Ended(done.returncode, done.stdout + done.stderr)


@contextmanager
def refusing(status: int = 403, code: str = "ExpiredToken") -> Iterator[str]:
    """An S3 server that answers every request with an error that holds what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            secrets = "".join(f"<{name}>{value}</{name}>" for name, value in PLANTED.items() if "AWS" in name)
            sent = f"<Token-0>{self.headers.get('x-amz-security-token', '')}</Token-0>"
            body = f"<Error><Code>{code}</Code><Message>refused {secrets}</Message>{sent}{secrets}</Error>".encode()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *arguments: Any) -> None:
            """Not to stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        if not name.startswith("PREFECT_"):
            monkeypatch.setenv(name, value)


# -- whole runs


@pytest.mark.slow
def test_a_run_that_succeeds_holds_no_secret(tmp_path: Path) -> None:
    path = write_curation(tmp_path / "curation")
    ended = run_curate(tmp_path, "-v", "run", str(path), "--json", OPENLINEAGE_URL="http://127.0.0.1:9")
    assert ended.code == 0, ended.output[-3000:]
    assert (tmp_path / "prefect" / "prefect.db").stat().st_size > 100_000
    assert found_in(ended.output) == []
    assert leaks(tmp_path) == {}


def broken_store(path: Path) -> list[str]:
    return ["--set", "store=s3://bucket/store"]


def broken_sources(path: Path) -> list[str]:
    return ["--set", "corpus.sources=['s3://bucket/*.jsonl', 's3://bucket/other.parquet']"]


def broken_model(path: Path) -> list[str]:
    return ["--set", "model.name=nobody/no-such-model"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "broken",
    [
        broken_store,
        pytest.param(broken_sources, marks=pytest.mark.thorough),
        pytest.param(broken_model, marks=pytest.mark.thorough),
    ],
)
def test_a_run_that_fails_holds_no_secret(tmp_path: Path, broken: Callable[[Path], list[str]]) -> None:
    path = write_curation(tmp_path / "curation")
    with refusing() as endpoint:
        ended = run_curate(tmp_path, "-v", "run", str(path), *broken(path), AWS_ENDPOINT_URL=endpoint)
    assert ended.code == 1, ended.output[-3000:]
    assert "Failed" in ended.output and "Traceback" in ended.output, "logs are shown"
    assert (tmp_path / "prefect" / "prefect.db").stat().st_size > 100_000
    assert found_in(ended.output) == []
    assert leaks(tmp_path) == {}


@pytest.mark.parametrize("command", ["plan", "watch", "status"])
def test_a_question_that_fails_holds_no_secret(tmp_path: Path, command: str) -> None:
    path = write_curation(tmp_path / "curation", store="s3://bucket/store")
    with refusing() as endpoint:
        what = "s3://bucket/store" if command == "status" else str(path)
        ended = run_curate(tmp_path, "-v", command, what, AWS_ENDPOINT_URL=endpoint)
    assert ended.code == 1 and "access refused" in ended.output
    assert found_in(ended.output) == []


# -- what is not even taken


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_with_a_password_is_refused(tmp_path: Path, name: str) -> None:
    path = write_curation(tmp_path / "curation", store="s3://bucket/store")
    ended = run_curate(tmp_path, "plan", str(path), **{name: f"http://someone:{PASSWORD}@127.0.0.1:9"})
    assert ended.code == 2 and name in ended.output
    assert found_in(ended.output) == []


SECRET_URLS = (
    f"https://someone:{PASSWORD}@files.test/part.jsonl",
    f"s3://AKIAPLANTEDKEYID0001:{PASSWORD}@bucket/part.jsonl",
    f"https://files.test/part.jsonl?X-Amz-Credential=x&X-Amz-Signature={SIGNATURE}",
    f"https://files.test/part.jsonl?Expires=1&Signature={SIGNATURE}&Key-Pair-Id=K",
    f"https://account.blob.test/part.parquet?sv=2024&sig={SIGNATURE}",
    f"https://files.test/part.csv?access_token={SIGNATURE}",
)
PLACES: dict[str, Callable[[str], dict[str, Any]]] = {
    "store": lambda url: {"store": url},
    "corpus.sources": lambda url: {"corpus": {"name": "tiny", "sources": [url]}},
    "targets": lambda url: {"targets": {"backdoor": {"queries": url}}},
    "model.name": lambda url: {"model": {"name": url}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_url_with_a_secret_is_refused(tmp_path: Path, place: str, url: str) -> None:
    document: dict[str, Any] = {
        "store": "store",
        "corpus": {"name": "tiny", "sources": ["raw/*.jsonl"]},
        "model": {"name": "model"},
        "targets": {"backdoor": {"queries": "queries.jsonl"}},
        "value": {},
        **PLACES[place](url),
    }
    with pytest.raises(ConfigError, match=place.replace(".", r"\.")) as caught:
        parse_config(document, base=tmp_path)
    assert_clean(caught.value)


def test_addresses_without_secrets_are_taken(tmp_path: Path) -> None:
    sources = ["https://files.test/part.jsonl?download=true&version=3", "s3://bucket/a@b/*.jsonl", "raw/a?.jsonl"]
    document = {"store": "s", "corpus": {"name": "tiny", "sources": sources}, "model": {"name": "org/model"}}
    assert parse_config(document, base=tmp_path).corpus.sources[:2] == tuple(sources[:2])


@pytest.mark.usefixtures("prefect_harness")
@pytest.mark.parametrize("url", SECRET_URLS[:3])
def test_a_run_that_is_refused_for_such_a_url_does_not_name_it(tmp_path: Path, url: str) -> None:
    """Prefect has the parameters before the flow does, keeps them, and shows them in the worker's output."""
    config: Any = {
        "store": str(tmp_path / "store"),
        "corpus": {"name": "tiny", "sources": [url]},
        "model": {"name": "model"},
    }
    state = index_corpus(config, return_state=True)
    assert state.is_failed() and ("a signed URL" in str(state.message) or "credentials" in str(state.message))
    assert found_in(f"{state.message} {state!r}") == []
    error = state.result(raise_on_failure=False)
    assert isinstance(error, Exception)
    assert_clean(error)


# -- errors and what they were made of


def assert_clean(error: BaseException) -> None:
    """Neither an error, nor what it came from, nor its traceback, nor what would be kept of it holds a secret."""
    assert found_in("".join(traceback.format_exception(error))) == []
    chain: BaseException | None = error
    while chain is not None:
        assert found_in(f"{chain} {chain!r} {chain.args}") == [], type(chain)
        chain = chain.__cause__ or chain.__context__
    kept = io.BytesIO()
    pickler = pickle.Pickler(kept)
    pickler.dispatch_table = {}  # not what Dask and Ray register: it would add what Prefect raised it from
    pickler.dump(error)
    assert found_in(kept.getvalue()) == []


def reads() -> dict[str, Callable[[], object]]:
    store = Store("s3://bucket/store")
    return {
        "get": lambda: store.get("blocks/a"),
        "size": lambda: store.size("blocks/a"),
        "create": lambda: store.create("blocks/a", b"1"),
        "delete": lambda: store.delete(["blocks/a", "blocks/b"]),
        "list": lambda: list(store.list("blocks")),
        "children": lambda: store.children("corpora"),
        "scan": lambda: store.collected("a.parquet", lambda: store.scan_parquet(["a.parquet"]).collect()),
        "zarr": lambda: _open_zarr(store),
        "sources": lambda: list_objects(["s3://bucket/a/*.jsonl"]),
        "source": lambda: hash_object("s3://bucket/a.jsonl"),
    }


def _open_zarr(store: Store) -> object:
    import zarr

    from rise_ops.store import zarr_errors

    with zarr_errors(store, "a.zarr"):
        return zarr.open_group(store.zarr("a.zarr", read_only=True), mode="r")["signature"]


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize(("status", "code"), [(403, "ExpiredToken"), (400, "InvalidToken"), (500, "InternalError")])
@pytest.mark.parametrize(
    "what", ["get", "size", "create", "delete", "list", "children", "scan", "zarr", "sources", "source"]
)
def test_errors_hold_nothing_of_what_a_server_echoes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str, status: int, code: str
) -> None:
    monkeypatch.setattr("rise_ops.retry.BUDGET", replace(BUDGET, tries=2, first_pause=0.01, longest_pause=0.01))
    with refusing(status, code) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with caplog.at_level("INFO"), pytest.raises(CurationError) as caught:
            reads()[what]()
    assert_clean(caught.value)
    assert found_in(caplog.text) == []


@pytest.mark.usefixtures("planted")
def test_representations_hold_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    store = Store("s3://bucket/store")
    backend = store._connect("")
    document = {"store": "s", "corpus": {"name": "tiny", "sources": ["a"]}, "model": {"name": "m"}}
    config = parse_config(document, base=tmp_path)
    assert found_in(f"{store!r} {backend!r} {config!r} {config.model_dump_json()}") == []
    assert found_in(pickle.dumps(store)) == []


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00" + json.dumps({"a": PLANTED["AWS_SESSION_TOKEN"]}).encode())
    (tmp_path / "b").write_text("https://x/?t=planted%2Fsecret%2Bkey%2F0123456789abcdefghij", encoding="utf-8")
    assert [len(found) for found in leaks(tmp_path).values()] == [1, 1]
    with pytest.raises(AssertionError):
        assert_clean(StoreError(f"no {PASSWORD}"))
