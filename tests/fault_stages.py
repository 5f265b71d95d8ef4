"""The stages of a run as calls that can be disturbed: each starts afresh and tells what it made, by content.

Everything is prepared once in a bucket: sources, a corpus, its index without a model, scores and decisions.
A stage then runs on stores and sources at whatever place it is given, under names that no other call used.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rise_ops.blocks import block_key
from rise_ops.config import CorpusConfig, ExportConfig, KeepConfig, LimitsConfig, SelectionConfig
from rise_ops.corpus import look_at_sources
from rise_ops.export import export_rows
from rise_ops.index import read_records
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_object
from rise_ops.objects import places_key
from rise_ops.parts import Part, part_of
from rise_ops.runs import decisions_key
from rise_ops.selection import decide
from rise_ops.signatures import RowSignatures
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.valuation import score_parts as score
from tests.corpora import NO_LIMITS, corpus_of, ingest_all, listed, make_rows, write_as
from tests.indexed import DIM, INDEX, SKETCH, Indexed, index_corpus, make_target, score_parts, signed, store_target

LIMITS = LimitsConfig(bad_rows=1_000_000)
MEMORY = 2**30
_LINEAGE: dict[str, Any] = {
    "identity": ["snapshot", "index"],
    "corpus": {"name": "corpus", "version": 1, "snapshot_id": "s" * 64},
    "model": {"name": "some/model", "fingerprint": "f" * 64},
    "index_id": INDEX,
    "weights": {"good": 1.0},
    "aggregate": "mean",
    "keep": {},
}


@dataclass(frozen=True)
class Made:
    """What a stage wrote, to be read when the disturbance is over, and what it said."""

    store: str
    keys: tuple[str, ...] = ()
    said: Any = None

    def content(self) -> Any:
        """All of it by content, without the names that no two calls share."""
        store = Store(self.store)
        return self.said, [hashlib.sha256(store.get(key)).hexdigest() for key in self.keys]


@dataclass(frozen=True)
class World:
    """What the stages find."""

    local: Path
    """Folder with the sources, and for stores of a stage's own."""
    store: str
    """Store with corpus, index, target, scores and decisions."""
    sources: str
    """Where the same sources are, as a glob."""
    indexed: Indexed
    parts: tuple[Part, ...]
    target: str

    @property
    def corpus(self) -> CorpusConfig:
        """The corpus that the sources make."""
        return corpus_of(self.sources)

    @property
    def files(self) -> list[Path]:
        """The sources on this machine."""
        return sorted((self.local / "raw").iterdir())


def make_world(local: Path, remote: str) -> World:
    """Prepare everything below a URL of a bucket, or, for tests of the disk, below a folder."""
    rows = make_rows(700, seed=1)
    write_as(local / "raw/a.jsonl", rows)
    write_as(local / "raw/b.jsonl.gz", make_rows(300, seed=2))
    write_as(local / "raw/c.parquet", make_rows(300, seed=3))
    write_as(local / "raw/small.jsonl", make_rows(20, seed=4))
    with (local / "raw/small.jsonl").open("a", encoding="utf-8") as file:
        file.write("{not JSON\n")
    place = Store(f"{remote}/raw")
    for file_ in sorted((local / "raw").iterdir()):
        place.create(file_.name, file_.read_bytes())
    store = Store(f"{remote}/store")
    indexed = index_corpus(store, corpus_of(f"{remote}/raw/*"))
    target = make_target(3)
    store_target(store, target)
    parts = score_parts(indexed, {"good": target}, run_id="base", size=2)
    world = World(local, store.uri, f"{remote}/raw/*", indexed, tuple(parts), target.target_id)
    _decide(store, world, "base")
    return world


def list_stage(world: World) -> Made:
    """A look at the sources, as `watch`, `plan` and a run's beginning take it."""
    version, diff = look_at_sources(Store(world.store), world.corpus, NO_LIMITS)
    seen = [(item.uri, item.size, item.etag) for item in (*diff.added, *diff.changed)]
    return Made(world.store, said=(version and version.version, seen, [entry.uri for entry in diff.unchanged]))


def read_stage(world: World) -> Made:
    """Ingestion of remote sources into a store on the disk."""
    store = Store(str(world.local / f"store-{uuid.uuid4().hex[:8]}"))
    try:
        return Made(store.uri, said=_ingest(store, [f"{world.sources.rstrip('*')}{file.name}" for file in world.files]))
    finally:
        shutil.rmtree(store.uri, ignore_errors=True)


def write_stage(world: World) -> Made:
    """Ingestion of local sources into a remote store, published."""
    store = Store(f"{world.store}-{uuid.uuid4().hex[:8]}")
    version = ingest_all(store, corpus_of(world.local / "raw/*"))
    keys = [places_key(entry.record) for entry in version.sources]
    keys += [block_key(block) for entry in version.sources for block in entry.blocks]
    return Made(store.uri, tuple(keys), (version.snapshot_id, version.rows, version.rejected))


def sketch_stage(world: World) -> Made:
    """Signatures of all blocks into a new index."""
    store = Store(world.store)
    identity = uuid.uuid4().hex
    blocks = world.indexed.blocks
    sketch_blocks(store, identity, blocks, dim=DIM, signer=_stub_signer)
    records = read_records(store, identity, blocks)
    keys = [f"indexes/{identity}/blocks/{block}.zarr/{name}" for block in blocks for name in records[block].crc32c]
    return Made(store.uri, tuple(keys), [record.crc32c for record in records.values()])


def value_stage(world: World) -> Made:
    """Scores of all blocks on one target."""
    store = Store(world.store)
    part = part_of(uuid.uuid4().hex, world.indexed.blocks, 0)
    targets = {"good": read_target(store, world.target)}
    score(store, INDEX, [part], targets=targets, aggregate="mean", sketch=SKETCH, memory=MEMORY)
    return Made(store.uri, (part.scores, part.extremes))


def select_stage(world: World) -> Made:
    """Decisions on the prepared scores."""
    store = Store(world.store)
    run_id = uuid.uuid4().hex
    selection = _decide(store, world, run_id)
    return Made(store.uri, (decisions_key(run_id),), selection)


def export_stage(world: World) -> Made:
    """An export of the prepared decisions."""
    store = Store(world.store)
    made = export_rows(
        store, world.indexed.version, run_id="base", name=f"e{uuid.uuid4().hex[:12]}", config=ExportConfig(),
        lineage=_LINEAGE, memory=MEMORY,
    )  # fmt: skip
    folder = f"exports/{made.label}"
    return Made(store.uri, (f"{folder}/data/train-00000.parquet",), (made.version, made.rows, made.files))


STAGES: Mapping[str, Callable[[World], Made]] = {
    "list": list_stage,
    "read": read_stage,
    "write": write_stage,
    "sketch": sketch_stage,
    "value": value_stage,
    "select": select_stage,
    "export": export_stage,
}


def _ingest(store: Store, uris: list[str]) -> list[tuple[str, int, int, tuple[str, ...]]]:
    made = [ingest_object(store, listed(uri), corpus=corpus_of(uri), limits=LIMITS) for uri in uris]
    return [(each.record, each.rows, each.rejected, each.blocks) for each in made]


def _decide(store: Store, world: World, run_id: str) -> Any:
    return decide(
        store, world.indexed.version, run_id=run_id, parts=list(world.parts), weights={"good": 1.0},
        targets=["good"], aggregate="mean", selection=SelectionConfig(keep=KeepConfig(fraction=0.5)), memory=MEMORY,
    )  # fmt: skip


def _stub_signer() -> Any:
    """Stands for the model: signatures that depend on the texts only."""

    def rows(texts: list[str]) -> RowSignatures:
        return signed(len(texts), seed=len(texts[0]))

    return SimpleNamespace(rows=rows, halvings=0, trunk=SimpleNamespace(device="cpu", dtype="torch.float32"))
