"""Runs: one execution, its stages and what they read and wrote.

    runs/<run_id>/run.json             the whole record, written once, when the run ends (also when it fails)
    runs/<run_id>/openlineage.jsonl    the same as OpenLineage events (`rise_ops.openlineage`), written just after
    runs/<run_id>/decisions.parquet    what became of each row (`rise_ops.selection`)
    runs/<run_id>/decisions.json       what decided on it, so that the same is decided once (`rise_ops.decided`)

A stage's record names inputs and outputs (URI, SHA-256 where there is one, rows), how long it took and whether
its result was already there. The code is named by version, a hash of
its sources and, in a git checkout, commit.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from rise_ops import __version__
from rise_ops.errors import ConfigError, MissingObjectError
from rise_ops.hashing import fingerprint, sha256_hex
from rise_ops.shapes import RunShape
from rise_ops.store import Store

FORMAT_VERSION = 1

Json = dict[str, Any]

_UNKNOWN: Json = {
    "status": "unknown",
    "started": "at an unknown time",
    "model": {"name": "unknown"},
    "corpus": {"name": "unknown"},
    "code": {"version": "unknown", "commit": None},
    "config_fingerprint": "",
    "index_id": None,
    "export": None,
    "counts": {},
    "stages": [],
}
"""What a record says that lacks one of these."""


def new_run_id(corpus: str) -> str:
    """A run id that sorts by time and a person can read: `20260131T235959-support-1a2b3c`."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{corpus}-{secrets.token_hex(3)}"


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def reference(uri: str, *, sha256: str | None = None, rows: int | None = None, size: int | None = None) -> Json:
    """An input or output of a stage; `size` in bytes, left out where it is not known."""
    return {"uri": uri, "sha256": sha256, "rows": rows} | ({} if size is None else {"bytes": size})


def stage_record(
    name: str, *, started: str, seconds: float, cached: bool, inputs: list[Json], outputs: list[Json]
) -> Json:
    """Lineage of one stage."""
    return {
        "name": name,
        "started": started,
        "seconds": round(seconds, 3),
        "cached": cached,
        "inputs": inputs,
        "outputs": outputs,
    }


@lru_cache(1)
def code_identity() -> Json:
    """The package's version, a hash of its sources and, in a checkout, its commit (`+`: with uncommitted changes)."""
    package = Path(__file__).resolve().parent
    root = package.parent
    sources = sorted(package.rglob("*.py"))
    content = [[str(file.relative_to(package)), sha256_hex(file.read_bytes())] for file in sources]
    commit = None
    if (root / ".git").exists():
        commit = _git(root, "rev-parse", "HEAD")
        if commit and _git(root, "status", "--porcelain", "--untracked-files=no"):
            commit += "+"
    return {"version": __version__, "commit": commit, "fingerprint": fingerprint(content)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not its checkout: the version alone names the code
    return done.stdout.strip() or None


def lineage_key(run_id: str) -> str:
    """Where a run's OpenLineage events are in the store."""
    return f"runs/{run_id}/openlineage.jsonl"


def decisions_key(run_id: str) -> str:
    """Where a run's decisions are in the store."""
    return f"runs/{run_id}/decisions.parquet"


def decided_key(run_id: str) -> str:
    """Where it is recorded what a run decided, and by what (`rise_ops.decided`)."""
    return f"runs/{run_id}/decisions.json"


def write_run(store: Store, record: Mapping[str, Any]) -> str:
    """Store a run's record. Returns its URI."""
    key = f"runs/{record['run_id']}/run.json"
    store.create_json(key, {"format_version": FORMAT_VERSION, **record})
    return store.url(key)


def read_run(store: Store, run_id: str) -> Json:
    """A run's record.

    Raises
    ------
    ConfigError
        The store has no such run.
    """
    try:
        found = store.get_json(
            f"runs/{run_id}/run.json", format_version=FORMAT_VERSION, shape=RunShape, holds={"run_id": run_id}
        )
    except MissingObjectError:
        known = list_runs(store)[-5:]
        raise ConfigError(f"{store.uri} has no run {run_id}; the latest are: {', '.join(known) or 'none'}") from None
    return _UNKNOWN | found


def list_runs(store: Store) -> list[str]:
    """Ids of the runs that ended, oldest first."""
    return [run_id for run_id in store.children("runs") if store.exists(f"runs/{run_id}/run.json")]
