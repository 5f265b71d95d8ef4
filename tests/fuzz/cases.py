"""Cases: a seed, damaged, and what became of it. Whatever is not an outcome of `targets` is a finding."""

from __future__ import annotations

import faulthandler
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rise_ops.store import Store
from tests.fuzz import targets
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import fill_store, sources

CASE_SECONDS = 60
"""A case that takes longer ends the process, and is a finding."""


@dataclass(frozen=True)
class Finding:
    """An outcome that must not be."""

    name: str
    """Source, or key in the store."""
    data: bytes
    problem: str


class Sources:
    """Damaged sources of every format."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "sources"
        self._folder.mkdir(parents=True)
        self.seeds = sources()

    def pick(self, choose: random.Random) -> tuple[str, bytes]:
        """A name, and damaged bytes for it."""
        name = choose.choice(sorted(self.seeds))
        return name, mutated(self.seeds[name], choose)

    def run(self, name: str, data: bytes) -> Counter[str]:
        """What becomes of it."""
        path = self._folder / name
        path.write_bytes(data)
        return targets.read_source(path)


class Documents:
    """A store in which one object is damaged."""

    def __init__(self, folder: Path) -> None:
        self._store: Store = fill_store(folder / "curation")
        self._root = Path(self._store.uri)
        self._keys = sorted(key for key, _ in self._store.list("") if not key.endswith(("README.md", "/c/0")))
        blocks = self._store.scan_parquet([key for key in self._keys if key.startswith("blocks/")])
        self._doc_id = str(blocks.select("doc_id").head(1).collect().item())
        self._whole = {key: (self._root / key).read_bytes() for key in self._keys}

    def pick(self, choose: random.Random) -> tuple[str, bytes]:
        """A key, documents three times as often as others, and damaged bytes for it."""
        documents = [key for key in self._keys if key.endswith(".json") and ".zarr/" not in key]
        name = choose.choice(documents if choose.randrange(4) else self._keys)
        return name, mutated(self._whole[name], choose)

    def run(self, name: str, data: bytes) -> Counter[str]:
        """What becomes of it."""
        (self._root / name).write_bytes(data)
        try:
            return targets.read_store(self._store, self._doc_id)
        finally:
            (self._root / name).write_bytes(self._whole[name])
            shutil.rmtree(self._root / "damage", ignore_errors=True)


def run_case(target: Sources | Documents, name: str, data: bytes) -> tuple[Counter[str], Finding | None]:
    """One case."""
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    try:
        return target.run(name, data), None
    except Exception:  # noqa: BLE001 - every exception that got here is what is looked for
        return Counter(), Finding(name, data, traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()


def picked(target: Sources | Documents, seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """The first cases of a seed."""
    choose = random.Random(seed)
    for _ in range(count):
        yield target.pick(choose)
