"""Fixtures and options that every test may use.

The environment is hermetic: no hub, no proxy, no credentials and no Prefect profile of the person who runs
the tests; Prefect and Hugging Face get a home of their own that is removed at the end. An S3 server is
started when the first test asks for one, and only then.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from rise_ops.store import Store
from tests import servers

if TYPE_CHECKING:
    import s3fs
    from prefect.client.schemas.objects import FlowRun

_BUCKET: Final = "tests"


def _make_hermetic(home: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith(("AWS_", "OPENLINEAGE", "PREFECT_", "HF_")) or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ |= {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # as the command line sets it
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TOKENIZERS_PARALLELISM": "false",
    }


# Prefect and transformers read these when they are imported, so fixtures would be too late.
_HOME: Final = Path(tempfile.mkdtemp(prefix="rise-ops-tests-"))
_make_hermetic(_HOME)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--s3-server`."""
    parser.addoption(
        "--s3-server",
        choices=("auto", "radosgw", "moto", "none"),
        default="auto",
        help="S3 server for the tests marked s3: auto takes radosgw where it is installed, else moto",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Say which S3 server the tests will use."""
    return f"S3 server: {_server_kind(config) or 'none, tests marked s3 are skipped'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with a reason, what cannot run here. Files with slow tests come first, so that no worker ends up alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    no_s3 = pytest.mark.skip(reason="no S3 server; install moto (extra 'test') or Debian's radosgw")
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("s3") and _server_kind(config) is None:
            item.add_marker(no_s3)
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(no_gpu)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what the session wrote for itself."""
    shutil.rmtree(_HOME, ignore_errors=True)


def _server_kind(config: pytest.Config) -> str | None:
    wanted: str = config.getoption("--s3-server")
    if wanted == "none":
        return None
    kinds = servers.available()
    if wanted != "auto":
        if wanted not in kinds:
            raise pytest.UsageError(f"--s3-server={wanted}: not installed here; there is {', '.join(kinds) or 'none'}")
        return wanted
    return kinds[0] if kinds else None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def s3_server(request: pytest.FixtureRequest) -> Iterator[servers.S3Server]:
    """A server on loopback with the bucket `tests`. Tests that use it are marked `s3`."""
    kind = _server_kind(request.config)
    if kind is None:
        pytest.skip("no S3 server")
    # Not under pytest's temporary folder: a socket's path may have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="s3-") as folder, servers.running(kind, Path(folder)) as server:
        with pytest.MonkeyPatch.context() as environment:
            use_server(environment, server)
            s3_filesystem().mkdir(_BUCKET)
        yield server


@pytest.fixture
def s3_bucket(s3_server: servers.S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """`bucket/prefix` that no other test uses; the `AWS_*` variables point to the server."""
    use_server(monkeypatch, s3_server)
    return f"{_BUCKET}/{uuid.uuid4().hex[:12]}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once for each backend that must keep the same contract."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    bucket: str = request.getfixturevalue("s3_bucket")
    return Store(f"s3://{bucket}/store")


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    """A temporary Prefect server and database for tests that run flows.

    The task-run recorder, heartbeats and shipping logs are off: they make a flow run cost 1.15 s, not 0.25 s.
    """
    from prefect.settings import (
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_LOGGING_TO_API_ENABLED,
        PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    lean = {
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED: False,
    }
    with temporary_settings(lean), prefect_test_harness(server_startup_timeout=90):
        yield


def last_flow_run() -> FlowRun:
    """The flow run that started last, on the server of `prefect_harness`; scheduled ones have not started."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterStartTime
    from prefect.client.schemas.sorting import FlowRunSort

    started = FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False))
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=started, sort=FlowRunSort.START_TIME_DESC, limit=1)
    return run


def prefect_child_environment() -> dict[str, str]:
    """Variables that let another process use the server of `prefect_harness`, as lean as this one does."""
    from prefect.settings import get_current_settings

    return {
        "PREFECT_API_URL": str(get_current_settings().api.url),
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
    }


def use_server(environment: pytest.MonkeyPatch, server: servers.S3Server) -> None:
    """Point this process at the server, as its owner."""
    for name, value in server.environment.items():
        environment.setenv(name, value)


def s3_filesystem() -> s3fs.S3FileSystem:
    """A file system on the server that the environment names, made anew."""
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True)
