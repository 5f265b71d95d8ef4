"""What a log record says of where it comes from, on the console and in the logs of a flow run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from typer.testing import CliRunner

from flows.cli import app
from flows.curate import curate
from rise_ops.logs import FORMAT_VARIABLE, PACKAGES, PlainFormatter, each_block, formatter, json_formatter, log_fields
from rise_ops.threads import ContextPool
from tasks.dispatch import Dispatcher, run_all
from tasks.policy import Json, stage
from tasks.run_logs import RunLogHandler, arrange_logs
from tests.conftest import last_flow_run, prefect_child_environment
from tests.curation import load, write_curation

RUN = "20260131T235959-tiny-1a2b3c"
BLOCK = "0123456789abcdef" * 4

_logger = logging.getLogger("rise_ops.of_a_test")


class _Lines(logging.Handler):
    """Keeps what a formatter makes of records."""

    def __init__(self, kind: logging.Formatter) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(kind)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.lines.append(self.format(record))


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What our loggers write, as JSON."""
    handler, logger = _Lines(json_formatter()), logging.getLogger("rise_ops")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_record_says_which_run_stage_task_and_block(lines: list[str]) -> None:
    with log_fields(run_id=RUN), log_fields(stage="index", task="sketch"):
        for block in each_block([BLOCK], str):
            _logger.info("%d rows of %s", 3, block[:4])
        _logger.warning("after")
    _logger.info("outside")
    inside, after, outside = map(json.loads, lines)
    assert list(inside) == ["time", "level", "logger", "message", "run_id", "stage", "task", "block_id"]
    assert inside.pop("time").endswith("+00:00")
    assert inside == {
        "level": "INFO",
        "logger": "rise_ops.of_a_test",
        "message": "3 rows of 0123",
        "run_id": RUN,
        "stage": "index",
        "task": "sketch",
        "block_id": BLOCK,
    }
    assert (after["run_id"], after["block_id"]) == (RUN, None)
    assert {outside[name] for name in ("run_id", "stage", "task", "block_id")} == {None}


def test_an_error_in_a_block_is_logged_with_the_block_and_the_next_task_is_not(lines: list[str]) -> None:
    with log_fields(run_id=RUN):
        try:
            for _ in each_block([BLOCK, "next"], str):
                raise ValueError("broken")
        except ValueError:
            _logger.exception("it failed")
    with log_fields(run_id=RUN):
        _logger.info("elsewhere")
    failed, elsewhere = map(json.loads, lines)
    assert failed["block_id"] == BLOCK and "ValueError: broken" in failed["error"]
    assert elsewhere["block_id"] is None


def test_a_loop_that_an_error_ends_outside_of_every_run_leaves_nothing(lines: list[str]) -> None:
    blocks = each_block([BLOCK, "next"], str)
    next(blocks)
    _logger.info("elsewhere, while somebody holds the loop")
    assert json.loads(lines[0])["block_id"] is None
    assert list(blocks) == ["next"]


def test_threads_of_ours_log_for_who_started_them(lines: list[str]) -> None:
    def work(name: str) -> None:
        with log_fields(run_id=name), ContextPool(2) as pool:
            list(pool.map(_logger.info, [name] * 20))

    with ContextPool(2) as both:
        list(both.map(work, ["one", "two"]))
    found = [json.loads(line) for line in lines]
    assert len(found) == 40
    assert all(item["run_id"] == item["message"] for item in found)


def test_lines_are_one_line_and_hold_no_secret(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    plain = _Lines(PlainFormatter())
    _logger.addHandler(plain)
    try:
        with log_fields(run_id=RUN, stage="index", task="sketch", block_id=BLOCK):
            _logger.warning("first\nsecond planted-secret “é”")
    finally:
        _logger.removeHandler(plain)
    (line,) = lines
    assert "\n" not in line and "planted-secret" not in line + plain.lines[0]
    assert json.loads(line)["message"] == "first\nsecond *** “é”"
    assert plain.lines[0].startswith("WARNING rise_ops.of_a_test [1a2b3c index/sketch 0123456789ab]: first\nsecond ***")


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_command_line_writes_json_lines_where_it_is_asked_to(how: str, tmp_path: Path) -> None:
    write_curation(tmp_path)
    arguments = ["--log-format", "json", "-v"] if how == "option" else ["-v"]
    environment = os.environ | ({} if how == "option" else {FORMAT_VARIABLE: "JSON"})
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments, "plan", str(tmp_path / "curate.yaml")],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert found and all({"time", "level", "logger", "message", "run_id"} <= item.keys() for item in found)


def test_an_unknown_format_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "xml")
    found = CliRunner().invoke(app, ["status", "-"])
    assert found.exit_code == 2 and "'plain', 'json'" in found.output


@stage("speaking")
def speaking(store_uri: str, number: int) -> Json:
    """Log, in a thread of its own, too."""
    with ContextPool(1) as pool:
        pool.submit(_logger.info, "number %d", number).result()
    return {"number": number}


@flow
def two_speak() -> None:
    """Two tasks side by side, within a run and a stage."""
    with log_fields(run_id=RUN, stage="index"), Dispatcher(ThreadPoolTaskRunner(max_workers=2), window=2) as runner:
        run_all(runner, speaking, [{"number": 1}, {"number": 2}], store_uri="-")


def _logs() -> list[Any]:
    """Logs of the latest flow run, as the server has them."""
    run = last_flow_run()
    with get_client(sync_client=True) as client:
        body = {"logs": {"flow_run_id": {"any_": [str(run.id)]}}, "sort": "TIMESTAMP_ASC"}
        return list(client.request("POST", "/logs/filter", json=body).json())


@pytest.mark.usefixtures("prefect_harness")
def test_our_records_are_in_the_logs_of_their_flow_run() -> None:
    """Whether or not Prefect was told of our loggers."""
    stock = APILogHandler()
    logging.getLogger("rise_ops").addHandler(stock)
    arrange_logs.cache_clear()
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: True}):
        two_speak()
        _logger.warning("outside of every run")  # sent nowhere, and no warning of Prefect's
        found: list[Any] = []
        for _ in range(100):
            found = [log for log in _logs() if log["name"] == "rise_ops.of_a_test"]
            if len(found) >= 2:
                break
            time.sleep(0.1)
    place = f"[{RUN} index/speaking]"
    assert sorted(log["message"] for log in found) == [f"{place} number 1", f"{place} number 2"]
    assert len({log["task_run_id"] for log in found} - {None}) == 2
    handlers = [each for each in logging.getLogger("rise_ops").handlers if isinstance(each, APILogHandler)]
    assert all(isinstance(each, RunLogHandler) for each in handlers)


@pytest.mark.usefixtures("prefect_harness")
def test_a_run_logs_its_stages_with_counts_and_rates(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_curation(tmp_path)
    with (tmp_path / "raw" / "part-0.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    with caplog.at_level(logging.INFO):
        curate(load(path, "limits.bad_rows=5"), "ingest")
    said = [f"{record.name}: {record.getMessage()}" for record in caplog.records if record.name.startswith(PACKAGES)]
    assert any(text.startswith("tasks.recording: stage begins") for text in said)
    (ended,) = [text for text in said if "stage ends after" in text]
    assert "60 rows (" in ended and "/s)" in ended and "1 rejected" in ended
    assert any(text.startswith("tasks.metering: ingest done in") for text in said)
    assert any(text.startswith("rise_ops.quarantine: 1 of 61 rows are in quarantine") for text in said)


@pytest.mark.usefixtures("prefect_harness")
def test_another_process_writes_json_lines_with_the_run(tmp_path: Path) -> None:
    """As a Prefect worker starts one: no command line, Prefect's own console."""
    write_curation(tmp_path)
    program = (
        "from flows.curate import curate; from rise_ops.config import load_config; from pathlib import Path;"
        f"curate(load_config(Path({str(tmp_path / 'curate.yaml')!r})), 'ingest', run_id={RUN!r})"
    )
    environment = os.environ | prefect_child_environment() | {FORMAT_VARIABLE: "json"}
    environment["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    found = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    ours = [item for item in found if item["logger"].startswith("rise_ops") or item["logger"].startswith("tasks")]
    assert ours and {item["run_id"] for item in ours} == {RUN}
    assert {"ingest"} <= {item["stage"] for item in ours}


def test_formats_are_made_by_name() -> None:
    assert isinstance(formatter("plain"), PlainFormatter)
    assert not isinstance(formatter("json"), PlainFormatter)
