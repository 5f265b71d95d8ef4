"""Damage: whatever is broken in a store is named by `verify`, and the next run makes that again and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.curate import curate
from rise_ops.blocks import read_block
from rise_ops.config import CurationConfig, SelectionConfig
from rise_ops.damage import Damage, damage_of, heal, note_damage
from rise_ops.errors import DamagedError
from rise_ops.export import list_exports
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.curation import ROWS, load, write_curation

pytestmark = pytest.mark.usefixtures("prefect_harness")

KINDS = {
    "a block": "blocks/*.parquet",
    "an object's record": "objects/*.json",
    "an object's places": "objects/*.parquet",
    "a small object's rows": "objects/*.rows.parquet",
    "the snapshot": "snapshots/*.parquet",
    "the latest version": "corpora/tiny/versions/*.json",
    "the index": "indexes/*/index.json",
    "a sketch table": "indexes/*/tables.zarr/h_buckets/c/0",
    "an index record": "indexes/*/blocks/*.json",
    "a chunk of signatures": "indexes/*/blocks/*.zarr/signature/c/0/0",
    "token counts": "indexes/*/blocks/*.zarr/tokens/c/0",
    "a Zarr node": "indexes/*/blocks/*.zarr/signature/zarr.json",
    "a target's record": "targets/*.json",
    "a target's queries": "targets/*.parquet",
    "a target's signatures": "targets/*.zarr/signature/c/0/0",
    "a part's record": "scores/*/*.json",
    "a part's scores": "scores/*/*.parquet",
    "an exported file": "exports/tiny/0001/data/*.parquet",
    "a manifest": "exports/tiny/0001/manifest.json",
}
RECORDS = {"the latest version", "the index", "an index record", "a target's record", "a part's record", "a manifest"}
"""What says that something is there: without it, there is nothing that could be broken."""
SKETCHES = {"an index record", "a chunk of signatures", "token counts"}
"""What only forward passes can make again."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """A curation that ran once."""
    folder = tmp_path_factory.mktemp("finished")
    curate(load(write_curation(folder)))
    return folder


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> CurationConfig:
    """Its configuration, with a copy of its store."""
    shutil.copytree(finished / "store", tmp_path / "store")
    return load(finished / "curate.yaml", f"store={tmp_path / 'store'}")


def _exported(store: Store) -> Any:
    (manifest,) = list_exports(store)
    return store.scan_parquet([f"exports/tiny/0001/{file['path']}" for file in manifest["files"]]).collect()


def _break(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if how == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 0x55]) + data[middle + 1 :])
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("how", ["missing", "flipped", pytest.param("cut", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_broken_is_named_and_made_again(config: CurationConfig, kind: str, how: str) -> None:
    store = Store(config.store)
    before = _exported(store)
    contents = {key: store.get(key) for key, _ in store.list("") if not key.startswith(("runs/", "alive/"))}
    path = sorted(Path(store.uri).glob(KINDS[kind]))[0]
    key = str(path.relative_to(store.uri))
    _break(path, how)
    found = verify_store(store, deep=True)
    is_harmless = kind == "the snapshot" and how == "flipped"  # the byte is one that no reader looks at
    named = {item["key"].partition(".")[0] for item in found["broken"]}
    assert key.partition(".")[0] in named or is_harmless or (kind in RECORDS and how == "missing")
    again = curate(config)
    assert verify_store(store, deep=True)["broken"] == []
    assert again["rows_sketched"] == (ROWS if kind in SKETCHES else 0)
    assert _exported(store).equals(before)
    follows = kind == "the latest version" and how != "missing"  # by another number: readers have seen the old one
    made = key.replace("000000000001", "000000000002") if follows else key
    assert made in {name for name, _ in store.list("")}
    after = {name: store.get(name) for name in contents if store.exists(name)}
    differing = {name for name in contents if after.get(name) != contents[name]}
    assert differing <= _may_differ(key) | ({key} if is_harmless else set())
    assert not list(store.list("damage"))


def _is_pack(path: Path) -> bool:
    """Whether these places are read by selection: those of the pack that the small objects share."""
    return "object_sha" in pl.read_parquet_schema(path)


def _may_differ(key: str) -> set[str]:
    """Records hold times and names of runs; all else is made again bit by bit."""
    if key.startswith("corpora/"):
        return {key}
    stem, _, rest = key.partition(".zarr")
    if key.startswith("exports/"):
        return {"exports/tiny/0001/manifest.json"}
    return {f"{stem}.json", key} if rest or key.endswith(".json") else set()


@pytest.mark.parametrize("kind", ["a block", "a chunk of signatures", "a target's signatures", "an object's places"])
def test_a_run_that_meets_damage_mends_it_by_itself(config: CurationConfig, kind: str) -> None:
    """Without `verify`: scores and decisions are gone, so that the run has to read what is broken."""
    store = Store(config.store)
    before = _exported(store)
    shutil.rmtree(Path(store.uri, "scores"))
    for decided in Path(store.uri).glob("runs/*/decisions.json"):
        decided.unlink()
    paths = [path for path in Path(store.uri).glob(KINDS[kind]) if len(path.suffixes) < 2]
    shared = [path for path in paths if kind != "an object's places" or _is_pack(path)]
    _break(shared[0], "flipped" if kind != "an object's places" else "cut")  # only `verify` knows their checksum
    curate(config)
    assert verify_store(store, deep=True)["broken"] == []
    assert _exported(store).equals(before)


def test_what_cannot_be_made_again_is_left(config: CurationConfig) -> None:
    store = Store(config.store)
    (decisions,) = [key for key, _ in store.list("runs") if key.endswith("decisions.parquet")]
    note_damage(store, [Damage(decisions, "looks odd"), Damage("blocks/gone.parquet", "is missing")])
    assert heal(store) == ["blocks/gone.parquet"]
    assert store.exists(decisions)
    assert heal(store) == ["blocks/gone.parquet"]  # a run that was killed leaves this to the next one
    store.create("blocks/gone.parquet", b"again")
    assert heal(store) == []
    assert store.get("blocks/gone.parquet") == b"again"
    assert list(store.list("damage")) == []


def test_what_was_made_again_meanwhile_is_not_removed(config: CurationConfig) -> None:
    store = Store(config.store)
    store.create("blocks/x.parquet", b"broken")
    note_damage(store, [Damage("blocks/x.parquet", "is broken"), Damage("blocks/y.parquet", "is missing")])
    store.delete(["blocks/x.parquet"])
    store.create("blocks/x.parquet", b"whole")
    store.create("blocks/y.parquet", b"whole")
    assert heal(store) == []
    assert store.get("blocks/x.parquet") == store.get("blocks/y.parquet") == b"whole"
    assert list(store.list("damage")) == []


def test_exports_that_this_run_does_not_make_are_left_alone(config: CurationConfig) -> None:
    store = Store(config.store)
    (data,) = [key for key, _ in store.list("exports") if "/data/" in key]
    whole = store.get(data)
    _break(Path(store.url(data)), "flipped")
    assert [item["key"] for item in verify_store(store, deep=True)["broken"]] == [data]
    curate(config, "index")
    assert [manifest["version"] for manifest in list_exports(store)] == ["0001"]
    other = config.model_copy(update={"selection": SelectionConfig.model_validate({"keep": {"rows": 5}})})
    assert curate(other)["export"] == "tiny/0002"
    assert [manifest["version"] for manifest in list_exports(store)] == ["0001", "0002"]
    assert curate(config)["export"] == "tiny/0001"
    assert store.get(data) == whole
    assert verify_store(store, deep=True)["broken"] == []


def test_a_run_that_mends_itself_exports_one_version(config: CurationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are withdrawn while a run mends itself are not in its export."""
    store = Store(config.store)
    raw = Path(config.corpus.sources[0]).parent
    copy = Path(store.uri).parent / "raw"
    shutil.copytree(raw, copy)
    moved = config.model_copy(update={"corpus": config.corpus.model_copy(update={"sources": (f"{copy}/*.jsonl",)})})
    met: list[str] = []

    def damaged(store: Store, block_id: str, *options: Any, **named: Any) -> Any:
        if not met:
            met.append(block_id)
            (copy / "part-0.jsonl").unlink()
            raise DamagedError("broken", store.url(f"blocks/{block_id}.parquet"))
        return read_block(store, block_id, *options, **named)

    monkeypatch.setattr("rise_ops.export.read_block", damaged)
    found = curate(moved)
    manifest = next(item for item in list_exports(store) if f"{item['name']}/{item['version']}" == found["export"])
    assert manifest["rows"] == found["rows_kept"] < found["rows"] == ROWS - 30
    rows = store.scan_parquet([f"exports/{found['export']}/{file['path']}" for file in manifest["files"]]).collect()
    assert rows["source_uri"].unique().to_list() == [str(copy / "part-1.jsonl")]


def test_errors_know_their_object(config: CurationConfig) -> None:
    store = Store(config.store)
    error = DamagedError("x is broken", store.url("blocks/x.parquet"))
    assert damage_of(store, error) == Damage("blocks/x.parquet", "x is broken")
    assert damage_of(store, DamagedError("not ours", "/elsewhere/x")) is None


def test_a_store_that_takes_no_notes_is_still_verified(config: CurationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from rise_ops.errors import StoreError

    store = Store(config.store)
    next(Path(store.uri).glob("blocks/*.parquet")).unlink()

    def refuse(*_: object) -> bool:
        raise StoreError("read-only")

    monkeypatch.setattr(Store, "create_json", refuse)
    found = verify_store(store)
    assert (len(found["broken"]), found["noted"]) == (1, False)
