"""S3 servers on loopback for the tests: Ceph's radosgw where it is installed, else moto.

radosgw is a real object store (one monitor, one disk in memory, one gateway) and takes about 15 seconds to
start; on Debian it comes with `apt-get install radosgw ceph-mon ceph-osd ceph-mgr`. moto is a simulation from
PyPI and starts in a second, but accepts any credentials and keeps no policies.

Nothing here touches an address outside 127.0.0.1. Daemons run in the foreground as children of the tests and
end with them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RADOSGW_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_START_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Credentials:
    """One user of an S3 server."""

    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The variables that every S3 client reads."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server."""

    kind: str
    endpoint: str
    owner: Credentials
    """May create buckets, and owns the ones that the tests use."""
    guest: Credentials
    """A second user: may do only what a bucket's policy grants."""
    guest_arn: str
    enforces_access: bool
    """Whether wrong credentials and policies are refused."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables of a process that works on this server as the owner."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **self.owner.environment,
        }


def available() -> tuple[str, ...]:
    """Kinds of server that can be started here, the best first."""
    kinds = []
    if all(shutil.which(program) for program in _RADOSGW_PROGRAMS):
        kinds.append("radosgw")
    if all(importlib.util.find_spec(module) for module in ("moto", "flask", "flask_cors")):
        kinds.append("moto")
    return tuple(kinds)


@contextmanager
def running(kind: str, folder: Path) -> Iterator[S3Server]:
    """Start a server, with its files in an empty folder, and end it afterwards."""
    with ExitStack() as stack:
        yield {"radosgw": _radosgw, "moto": _moto}[kind](folder, stack)


def _moto(folder: Path, stack: ExitStack) -> S3Server:
    port = free_ports(1)[0]
    daemon(stack, [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log")
    endpoint = f"http://127.0.0.1:{port}"
    wait_for_http(endpoint, folder / "moto.log")
    user = Credentials("testing", "testing123")
    return S3Server("moto", endpoint, user, user, "*", enforces_access=False)


def _radosgw(folder: Path, stack: ExitStack) -> S3Server:
    port, *monitor_ports = free_ports(3)
    cluster = _Cluster(folder, uuid.uuid4().hex, tuple(monitor_ports), port)
    cluster.make_monitor()
    cluster.start(stack, "ceph-mon", "-i", "a")
    cluster.make_disk()
    cluster.start(stack, "ceph-osd", "-i", "0")
    owner, guest = Credentials("testing", "testing123"), Credentials("guest", "guest123")
    cluster.make_user("owner", owner)
    cluster.make_user("guest", guest)
    cluster.start(stack, "radosgw", "-n", "client.rgw")
    endpoint = f"http://127.0.0.1:{port}"
    wait_for_http(endpoint, folder / "radosgw.log")
    return S3Server("radosgw", endpoint, owner, guest, "arn:aws:iam:::user/guest", enforces_access=True)


_CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = {monitors}
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
pid file =
crash dir = {folder}
public addr = 127.0.0.1
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon data avail crit = 1
mon data avail warn = 2
[mon.a]
mon data = {folder}/mon
[osd.0]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd class load list = *
osd class default list = *
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 64
rgw enable apis = s3, admin
rgw dynamic resharding = false
rgw override bucket index max shards = 1
"""


@dataclass(frozen=True, slots=True)
class _Cluster:
    """The smallest Ceph cluster that serves S3."""

    folder: Path
    fsid_hex: str
    monitor_ports: tuple[int, ...]
    port: int

    @property
    def fsid(self) -> str:
        return str(uuid.UUID(self.fsid_hex))

    @property
    def monitors(self) -> str:
        second, first = self.monitor_ports
        return f"[v2:127.0.0.1:{second},v1:127.0.0.1:{first}]"

    def make_monitor(self) -> None:
        """Write the configuration and the keys, and format the monitor."""
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        conf = _CEPH_CONF.format(folder=self.folder, fsid=self.fsid, monitors=self.monitors, port=self.port)
        (self.folder / "ceph.conf").write_text(conf, encoding="utf-8")
        everything = {"mon": "allow *", "osd": "allow *", "mgr": "allow *"}
        self._key("mon.", {"mon": "allow *"}, create=True)
        self._key("client.admin", everything)
        self._key("client.rgw", everything)
        self._key("osd.0", {**everything, "mon": "allow profile osd"})
        monmap = str(self.folder / "monmap")
        _call("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", self.monitors, monmap)
        keyring = str(self.folder / "keyring")
        self.call("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)

    def make_disk(self) -> None:
        """Register the one disk and format it."""
        disk = str(uuid.uuid4())
        self.call("ceph", "osd", "new", disk)
        self.call("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)

    def make_user(self, name: str, credentials: Credentials) -> None:
        """Create an S3 user."""
        keys = [f"--access-key={credentials.access_key}", f"--secret={credentials.secret_key}"]
        self.call("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}", *keys)

    def call(self, program: str, *arguments: str) -> None:
        """Run a command to its end."""
        _call(program, "-c", str(self.folder / "ceph.conf"), *arguments)

    def start(self, stack: ExitStack, program: str, *arguments: str) -> None:
        """Run a daemon until the stack unwinds."""
        command = [program, "-f", "-c", str(self.folder / "ceph.conf"), *arguments]
        daemon(stack, command, self.folder / f"{program}.log")

    def _key(self, name: str, capabilities: Mapping[str, str], *, create: bool = False) -> None:
        options = [part for area, allowed in capabilities.items() for part in ("--cap", area, allowed)]
        creation = ["--create-keyring"] if create else []
        _call("ceph-authtool", *creation, str(self.folder / "keyring"), "--gen-key", "-n", name, *options)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}: {done.stderr[-2000:]}")


def daemon(
    stack: ExitStack,
    command: Sequence[str],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
) -> None:
    """Run a daemon and whatever it starts until the stack unwinds, as another user where one is named."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*_dies_with_parent(), *as_user(user), *command],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    stack.callback(_stop, process)


def as_user(user: str | None) -> list[str]:
    """What to put before a command; only root may name another user."""
    return ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"] if user else []


def _dies_with_parent() -> list[str]:
    # A killed test run must not leave daemons behind; the finalizers do not run then, the kernel does.
    return ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and did not end


def wait_for_http(endpoint: str, log: Path) -> None:
    """Until something answers, whatever it says."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        try:
            opener.open(endpoint, timeout=5).close()
            return
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return
        except OSError:
            time.sleep(0.1)
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"no answer from {endpoint} after {_START_SECONDS:.0f} s; {log} ends with:\n{tail}")


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody uses."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def read_only_policy(bucket: str, principal: str) -> str:
    """A bucket policy that lets `principal` read and list, and no more."""
    statement: dict[str, Any] = {
        "Effect": "Allow",
        "Principal": {"AWS": [principal]},
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})
