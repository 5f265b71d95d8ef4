"""A Prefect server, a worker and PostgreSQL on loopback, with everything of `deployments/prefect.yaml` deployed.

Each has its own home, database and ports, and ends with whoever started it. By hand, to look at the pages:

    python -m tests.prefect_server [FOLDER]

deploys a tiny curation, starts a worker, prints the address and stays until it is interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from tests.curation import write_curation
from tests.servers import as_user, daemon, free_ports, wait_for_http

ROOT = Path(__file__).parents[1]
PREFECT_YAML = ROOT / "deployments" / "prefect.yaml"
POOL = "curation-process"
TEAMS = ("support", "search")
_FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
_SECONDS = 240.0
_ANSWER_SECONDS = 120.0
"""More than a request may wait inside the server: 30 s for a connection to its database, then 60 s for a lock."""

Json = dict[str, Any]
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class PrefectServer:
    """A running server."""

    url: str
    folder: Path
    environment: Mapping[str, str]
    """Of processes that use it: the caller's, without its settings of Prefect and without proxies."""

    def api(self, method: str, path: str, body: Any = None, *, tries: int = 60) -> Any:
        """Call the REST interface; a server whose database is busy says so, and is asked again."""
        request = urllib.request.Request(
            f"{self.url}/api{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                text = answer.read()
        except urllib.error.HTTPError as refusal:
            with refusal:
                if refusal.code == HTTPStatus.SERVICE_UNAVAILABLE and tries > 1:
                    time.sleep(1)
                    return self.api(method, path, body, tries=tries - 1)
                raise RuntimeError(f"{method} {path}: {refusal.code} {refusal.read().decode()[:2000]}") from None
        return json.loads(text) if text else None

    def prefect(self, *arguments: str) -> str:
        """Run the command `prefect`."""
        return self._call("prefect", *arguments)

    def curate(self, *arguments: str) -> str:
        """Run the command `curate`."""
        return self._call("curate", *arguments)

    def _call(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *arguments],
            cwd=ROOT, env=dict(self.environment), capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if done.returncode:
            said = f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            raise RuntimeError(f"{program} {' '.join(arguments)} ended with {done.returncode}:\n{said}")
        return done.stdout

    def deployment(self, name: str) -> Json:
        """A deployment by `flow/name`."""
        found: Json = self.api("GET", f"/deployments/name/{name}")
        return found

    def start(self, name: str, **parameters: Any) -> Json:
        """Start a run of a deployment, as an S3 notification would."""
        identity = self.deployment(name)["id"]
        run: Json = self.api("POST", f"/deployments/{identity}/create_flow_run", {"parameters": parameters})
        return run

    def runs(self, name: str) -> list[Json]:
        """All runs of a deployment, the oldest first."""
        wanted = {"deployments": {"id": {"any_": [self.deployment(name)["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found: list[Json] = self.api("POST", "/flow_runs/filter", wanted)
        return sorted(found, key=lambda run: str(run["created"]))

    def ended(self, run: Json) -> Json:
        """The run when it has ended."""

        def look() -> Json | None:
            found: Json = self.api("GET", f"/flow_runs/{run['id']}")
            return found if found["state_type"] in _FINAL else None

        return wait(look, f"the end of run {run['name']}", log=self.folder / "worker.log")

    def result(self, run: Json) -> Any:
        """What a run returned, from its result in the worker's home."""
        ended = self.ended(run)
        if ended["state_type"] != "COMPLETED":
            raise RuntimeError(f"run {ended['name']}: {ended['state']['name']}: {ended['state']['message']}")
        return json.loads(Path(ended["state"]["data"]["storage_key"]).read_bytes())

    def events(self, name: str) -> list[Json]:
        """Events of a name, the oldest first."""
        found = self.api("POST", "/events/filter", {"filter": {"event": {"name": [name]}}, "limit": 50})
        return sorted(found["events"], key=lambda event: str(event["occurred"]))

    def artifacts(self, run: Json) -> list[Json]:
        """Artifacts of a flow run and its tasks that have a key; results have none."""
        wanted = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
        found: list[Json] = self.api("POST", "/artifacts/filter", wanted)
        return [artifact for artifact in found if artifact["key"]]


def wait(look: Callable[[], Found | None], what: str, *, log: Path | None = None, seconds: float = _SECONDS) -> Found:
    """What `look` finds, as soon as it finds something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.1)
    tail = log.read_text(encoding="utf-8", errors="replace")[-4000:] if log and log.exists() else ""
    raise RuntimeError(f"waited {seconds:.0f} s for {what}\n{tail}")


@contextmanager
def server(folder: Path, *, database: str | None = None) -> Iterator[PrefectServer]:
    """A server with its home in `folder`; its database is SQLite unless the URL of another one is given."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith("PREFECT_") and not name.lower().endswith("_proxy")
    }
    environment = kept | {
        "COLUMNS": "200",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    own = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "3"}  # not 60: tests wait for schedules
    if database:
        own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with ExitStack() as stack:
        daemon(stack, command, folder / "server.log", environment=environment | own)
        wait_for_http(f"{url}/api/health", folder / "server.log")
        yield PrefectServer(url, folder, environment)


@contextmanager
def worker(server: PrefectServer) -> Iterator[None]:
    """A worker that runs flows as processes."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    with ExitStack() as stack:
        daemon(stack, command, server.folder / "worker.log", environment=server.environment)
        yield


def deploy(server: PrefectServer, configurations: Mapping[str, Path]) -> None:
    """What the runbook says: pool, queues, a variable for each team, and the deployments of these teams."""
    server.prefect("work-pool", "create", POOL, "--type", "process")
    for team, path in configurations.items():
        server.prefect("work-queue", "create", f"{team}-corpus", "--pool", POOL, "--limit", "1")
        value = server.curate("config", str(path), "--json").splitlines()[-1]
        server.prefect("variable", "set", "--overwrite", f"curation_{team}", value)
    chosen = ["--all"] if set(configurations) == set(TEAMS) else [f"--name={team}-*" for team in configurations]
    server.prefect("--no-prompt", "deploy", "--prefect-file", str(PREFECT_YAML), *chosen)


def postgresql_programs() -> Path | None:
    """Folder of PostgreSQL's programs, the latest version; None where it is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    usable = os.getuid() != 0 or shutil.which("setpriv") is not None
    return folders[-1] if folders and usable else None


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL server; gives the URL of an empty database. It refuses to run as root, so root lends it a user."""
    programs = postgresql_programs()
    if programs is None:
        raise RuntimeError("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    user = "postgres" if os.getuid() == 0 else None
    (port,) = free_ports(1)
    with ExitStack() as stack:
        # not under pytest's folder, which other users may not enter
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="postgresql-")))
        if user:
            owner = pwd.getpwnam(user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
        data, log = str(folder / "data"), folder / "initdb.log"
        made = ["-D", data, "-U", "prefect", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        _call([*as_user(user), str(programs / "initdb"), *made], log)
        options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(folder), "-c", "fsync=off"]
        daemon(stack, [str(programs / "postgres"), "-D", data, *options], folder / "postgres.log", user=user)
        own = ["-h", "127.0.0.1", "-p", str(port), "-U", "prefect"]
        wait(lambda: _succeeds([str(programs / "pg_isready"), *own]), "PostgreSQL", log=folder / "postgres.log")
        _call([str(programs / "createdb"), *own, "prefect"], log)
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"


def _succeeds(command: list[str]) -> bool | None:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0 or None


def _call(command: list[str], log: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def tiny_curations(folder: Path, *, bucket: str | None = None) -> dict[str, Path]:
    """A configuration for each team, each with a corpus of its own; its files and store may be meant for a bucket."""
    written = {}
    for team in TEAMS:
        (folder / team).mkdir(parents=True, exist_ok=True)
        root = f"s3://{bucket}/{team}/" if bucket else ""
        written[team] = write_curation(
            folder / team,
            store=f"{root}store",
            corpus={"name": team, "sources": [f"{root}raw/*.jsonl"]},
            targets={"backdoor": {"queries": f"{root}queries.jsonl"}},
        )
    return written


def main() -> None:
    """Server and worker with a tiny curation, until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="home of server and curations; default: a temporary one")
    for number in (signal.SIGINT, signal.SIGTERM):  # what is started in the background ignores the first
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        given: Path | None = parser.parse_args().folder
        folder = given or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prefect-")))
        folder.mkdir(parents=True, exist_ok=True)
        running = stack.enter_context(server(folder.resolve()))
        configurations = tiny_curations(folder.resolve())
        deploy(running, configurations)
        stack.enter_context(worker(running))
        lines = [
            f"Prefect server with a worker: {running.url}",
            f"  export PREFECT_API_URL={running.url}/api",
            "  prefect deployment run curate/support-curate",
            f"Configurations: {', '.join(map(str, configurations.values()))}",
            f"Logs: {folder}/server.log, {folder}/worker.log. Ctrl-C ends it.",
        ]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            sys.stdout.write("ended\n")


if __name__ == "__main__":
    main()
