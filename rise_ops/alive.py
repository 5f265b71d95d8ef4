"""Who is working in a store: signs of life of runs and of `curate gc`, which must not work at the same time.

    alive/<name>.<number>.json   host, boot, process; written at the start and every BEAT_SECONDS, removed at the end

A run may rely on objects that nothing refers to yet, so the collector removes nothing while a run is alive, and a
run does not start while a collector is. Each writes its own sign first and looks for the other's then: of two that
start together, at least one sees the other. A sign counts until its process is gone, where that can be seen from
here (same host, same boot, same process namespace), else until it is EXPIRY_SECONDS old by the store's own clock.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rise_ops.errors import ConflictError, CurationError, IntegrityError, MissingObjectError, StoreError
from rise_ops.store import Store

BEAT_SECONDS = 240.0
EXPIRY_SECONDS = 1_200.0
COLLECTOR = "gc-"
"""What names of collectors begin with."""
PATIENCE_SECONDS = 600.0
"""How long a run waits for a collector."""

_POLL_SECONDS = 2.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sign:
    """Someone who is alive."""

    name: str
    """A run id, or the name of a collector."""
    host: str
    process: int
    seconds: float
    """Age of the latest sign."""


@contextmanager
def alive(store: Store, name: str) -> Iterator[None]:
    """Give signs of life while the context lasts.

    Raises
    ------
    ConflictError
        Someone of that name is alive already.
    StoreError, TransientError
        The first sign cannot be written.
    """
    keys = [_key(name, 0)]
    if not store.create_json(keys[0], _myself()):
        others = [sign for sign in signs(store) if sign.name == name]
        if others:
            raise ConflictError(f"{described(others)} is at work in {store.uri} already; wait until it has ended")
        store.delete(keys)
        store.create_json(keys[0], _myself())
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, name, keys, ended), name=f"alive {name}", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        try:
            store.delete(keys)
        except CurationError as error:
            _logger.warning("%s: the signs of life stay (%s); they expire", name, error)


@contextmanager
def alive_if_possible(store: Store, kind: str) -> Iterator[None]:
    """The same for who only reads, and may not be allowed to write; waits for collectors."""
    name = f"{kind}-{secrets.token_hex(4)}"
    with ExitStack() as stack:
        try:
            if store.children("corpora"):  # else there is no store yet, and reading must not make one
                stack.enter_context(alive(store, name))
                wait_for_collectors(store, name)
        except StoreError:
            _logger.info("%s takes no signs of life; a collector could disturb this", store.uri)
        yield


def sign_of(key: str) -> str | None:
    """Whose sign of life a key is; None for other keys."""
    folder, _, file = key.partition("/")
    return file.rsplit(".", 2)[0] if folder == "alive" else None


def signs(store: Store, *, but: str | None = None) -> list[Sign]:
    """Who is alive, by name, except `but`, who is the one that asks and has given a sign."""
    latest: dict[str, tuple[Any, str]] = {}
    now = None
    for key, _, written in store.list_times("alive"):
        name = sign_of(key) or ""
        latest[name] = max(latest.get(name, (written, key)), (written, key))
        now = written if now is None else max(now, written)
    found = []
    for name, (written, key) in sorted(latest.items()):
        age = (now - written).total_seconds()
        if name != but and age <= EXPIRY_SECONDS:
            sign = _living(store, key, name, age)
            found += [] if sign is None else [sign]
    return found


def wait_for_collectors(store: Store, name: str) -> None:
    """Return when no collector is alive; `name` has given its own sign already.

    Raises
    ------
    ConflictError
        One still is after PATIENCE_SECONDS.
    """
    until = time.monotonic() + PATIENCE_SECONDS
    while collectors := [sign for sign in signs(store, but=name) if sign.name.startswith(COLLECTOR)]:
        if time.monotonic() >= until:
            raise ConflictError(f"{store.uri} is being cleaned by {described(collectors)}; run again when it has ended")
        time.sleep(_POLL_SECONDS)


def described(found: Sequence[Sign]) -> str:
    """Who it is, for messages."""
    each = [f"{sign.name} (host {sign.host}, process {sign.process})" for sign in found[:3]]
    return ", ".join(each) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _key(name: str, number: int) -> str:
    return f"alive/{name}.{number:06d}.json"


def _beat(store: Store, name: str, keys: list[str], ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        keys.append(_key(name, len(keys)))
        try:
            store.create_json(keys[-1], _myself())
        except CurationError as error:
            _logger.warning("no sign of life could be written: %s", error)


def _living(store: Store, key: str, name: str, age: float) -> Sign | None:
    try:
        who = store.get_json(key)
        sign = Sign(name, str(who["host"]), int(who["process"]), age)
    except MissingObjectError:
        return None  # ended just now
    except (IntegrityError, ValueError, KeyError, TypeError):
        return Sign(name, "unknown", 0, age)
    here = _myself()
    same_place = all(who.get(part) == here[part] for part in ("host", "boot", "namespace"))
    return None if same_place and not _is_running(sign.process, who.get("began")) else sign


def _myself() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "process": process,
        "began": _began(process),
    }


def _is_running(process: int, began: object) -> bool:
    return _began(process) == began


def _began(process: int) -> str:
    """When a process began, in ticks since the boot; empty where there is none (a number may be used again)."""
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
