"""Signs of life: who is alive counts, who was killed does not, and a collector and a run never work together."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from rise_ops import alive as module
from rise_ops.alive import COLLECTOR, alive, signs, wait_for_collectors
from rise_ops.errors import ConflictError
from rise_ops.garbage import collect_garbage
from rise_ops.store import Store


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _names(store: Store) -> list[str]:
    with alive(store, "asking"):
        return [sign.name for sign in signs(store, but="asking")]


def test_a_run_is_alive_while_it_lasts(store: Store) -> None:
    with alive(store, "a.run"):
        assert _names(store) == ["a.run"]
        (sign,) = signs(store)
        assert (sign.name, sign.process) == ("a.run", os.getpid())
    assert _names(store) == []
    assert list(store.list("alive")) == []


def test_signs_are_given_again_and_again(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with alive(local, "run"):
        for _ in range(500):
            if len(list(local.list("alive"))) > 3:
                break
            time.sleep(0.01)
        assert len(list(local.list("alive"))) > 3
        assert _names(local) == ["run"]
    assert list(local.list("alive")) == []


def _live_forever(uri: str, ready: Any) -> None:
    with alive(Store(uri), "killed"):
        ready.set()
        time.sleep(600)


def test_a_killed_process_is_not_alive(local: Store) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    process = spawn.Process(target=_live_forever, args=(local.uri, ready))
    process.start()
    assert ready.wait(60)
    assert _names(local) == ["killed"]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(local.list("alive"))) == 1
    assert _names(local) == []
    assert collect_garbage(local)["keys"] == ["alive/killed.000000.json"]
    assert list(local.list("alive")) == []


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "before"}, {"namespace": "pid:[1]"}])
def test_a_process_that_cannot_be_seen_counts_until_its_sign_expires(
    local: Store, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    who = {**module._myself(), "process": 2**22 + 1, **change}
    local.create("alive/far.000000.json", json.dumps(who).encode())
    assert _names(local) == ["far"]
    monkeypatch.setattr(module, "EXPIRY_SECONDS", -1.0)
    assert _names(local) == []


def test_a_number_that_another_process_has_now_is_not_the_run(local: Store) -> None:
    who = {**module._myself(), "began": "1"}
    local.create("alive/before.000000.json", json.dumps(who).encode())
    assert _names(local) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}'])
def test_a_sign_that_cannot_be_read_counts(local: Store, content: bytes) -> None:
    local.create("alive/odd.000000.json", content)
    assert _names(local) == ["odd"]


def test_the_collector_gives_way_to_a_run(store: Store) -> None:
    store.create(f"blocks/{'0' * 64}.parquet", b"orphan")
    with alive(store, "20260101T000000-corpus-1"):
        with pytest.raises(ConflictError, match=r"in use by 20260101T000000-corpus-1 \(host .*nothing was removed"):
            collect_garbage(store)
        assert collect_garbage(store, dry_run=True)["objects"] == 1
    assert store.exists(f"blocks/{'0' * 64}.parquet")
    assert collect_garbage(store)["objects"] == 1
    assert list(store.list("")) == []


def test_a_run_waits_for_the_collector(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            local.delete([f"alive/{COLLECTOR}1.000000.json"])

    monkeypatch.setattr(time, "sleep", sleep)
    local.create_json(f"alive/{COLLECTOR}1.000000.json", module._myself())
    with alive(local, "run"):
        wait_for_collectors(local, "run")
    assert len(waited) == 3


def test_a_run_does_not_wait_for_ever(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.0)
    local.create_json(f"alive/{COLLECTOR}1.000000.json", module._myself())
    with alive(local, "run"), pytest.raises(ConflictError, match="is being cleaned by gc-1"):
        wait_for_collectors(local, "run")
