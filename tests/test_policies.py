"""The S3 policies of `deployments/s3-policy/`, enforced by a real server: each command may do its work, and no more."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.curate import curate
from rise_ops.alive import alive
from rise_ops.attribution import attribute
from rise_ops.config import CurationConfig
from rise_ops.damage import Damage, note_damage
from rise_ops.errors import SourceError, StoreError
from rise_ops.garbage import collect_garbage
from rise_ops.plan import plan_run
from rise_ops.session import ad_hoc_queries
from rise_ops.sources import hash_object
from rise_ops.status import store_status
from rise_ops.store import Store
from rise_ops.verify import verify_store
from rise_ops.watching import look
from tests.conftest import s3_filesystem, use_server
from tests.curation import load, write_curation
from tests.servers import S3Server

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("prefect_harness")]

POLICIES = Path(__file__).parents[1] / "deployments" / "s3-policy"
STORE, RAW = "curation", "raw"
"""Buckets that the policies name; the team is `support`."""


@dataclass(frozen=True)
class Role:
    """The store of a team, seen by a user with one policy."""

    config: CurationConfig
    take: Callable[[str], None]
    """Have the policy of that name; `owner` may do everything."""


def attached(name: str, bucket: str, principal: str) -> str:
    """What a policy says of a bucket, as the bucket's own policy."""
    document = json.loads((POLICIES / f"{name}.json").read_text(encoding="utf-8"))
    statements = [
        {**statement, "Principal": {"AWS": [principal]}}
        for statement in document["Statement"]
        if all(resource.split(":::")[1].split("/")[0] == bucket for resource in statement["Resource"])
    ]
    return json.dumps({**document, "Statement": statements})


@pytest.fixture
def role(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Role:
    if not s3_server.enforces_access:
        pytest.skip(f"{s3_server.kind} keeps no policies")
    use_server(monkeypatch, s3_server)
    files = s3_filesystem()
    for bucket in (STORE, RAW):
        if files.exists(bucket):
            files.rm(bucket, recursive=True)
        files.mkdir(bucket)
    sources = {"name": "support", "sources": [f"s3://{RAW}/support/*.jsonl"]}
    queries = {"backdoor": {"queries": f"s3://{RAW}/support/queries.jsonl.gz"}}
    path = write_curation(tmp_path, store=f"s3://{STORE}/support", corpus=sources, targets=queries)
    for file in (tmp_path / "raw").iterdir():
        files.put(str(file), f"{RAW}/support/{file.name}")
    files.pipe(f"{RAW}/support/queries.jsonl.gz", gzip.compress((tmp_path / "queries.jsonl").read_bytes()))

    def take(name: str) -> None:
        use_server(monkeypatch, s3_server)
        if name == "owner":
            return
        for bucket in (STORE, RAW):
            policy = attached(name, bucket, s3_server.guest_arn)
            s3_filesystem().call_s3("put_bucket_policy", Bucket=bucket, Policy=policy)
        for variable, value in s3_server.guest.environment.items():
            monkeypatch.setenv(variable, value)

    return Role(load(path), take)


def keys(config: CurationConfig) -> set[str]:
    return {key for key, _ in Store(config.store).list("")}


def test_a_run_needs_no_more_than_the_policy_of_runs(role: Role) -> None:
    role.take("curate")
    first = curate(role.config)
    again = curate(role.config)
    assert (first["rows"], first["rows_rejected"], again["rows_sketched"]) == (60, 0, 0)
    assert verify_store(Store(role.config.store), deep=True)["broken"] == []
    assert look(role.config)["is_changed"] is False
    assert not [key for key in keys(role.config) if key.startswith((".probe/", "alive/", "damage/"))]


def test_readers_need_no_more_than_the_policy_of_readers(role: Role) -> None:
    role.take("curate")
    run = curate(role.config)
    role.take("read-only")
    before = keys(role.config)
    store = Store(role.config.store)
    assert plan_run(role.config)["rows_to_sketch"] == 0
    assert store_status(store)["runs"]
    assert look(role.config)["is_changed"] is False
    assert verify_store(store, deep=True)["broken"] == []
    queries = ad_hoc_queries(role.config, queries=None, text="Arr, matey!", prompt=None)
    (found,) = attribute(store, role.config, queries, k=3)
    assert len(found.to_json(bottom=False)["hits"]) == 3
    with pytest.raises(StoreError, match="access refused"):
        curate(role.config)
    assert keys(role.config) == before and run["export"]


@pytest.mark.parametrize(("name", "said"), [("read-only", "read and write"), ("curate", "deployments/s3-policy")])
def test_garbage_is_for_maintenance_only(role: Role, name: str, said: str) -> None:
    role.take("curate")
    curate(role.config)
    store = Store(role.config.store)
    orphan = f"blocks/{'0' * 64}.parquet"
    store.create(orphan, b"")
    before = keys(role.config)
    role.take(name)
    assert collect_garbage(Store(role.config.store), dry_run=True)["keys"] == [orphan]
    with pytest.raises(StoreError, match=rf"access refused.*{said}"):
        collect_garbage(Store(role.config.store))
    role.take("owner")
    assert keys(role.config) == before
    role.take("maintain")
    assert collect_garbage(Store(role.config.store))["keys"] == [orphan]
    assert keys(role.config) == before - {orphan}


def test_damage_is_mended_by_maintenance_only(role: Role) -> None:
    role.take("curate")
    curate(role.config)
    role.take("owner")
    store = Store(role.config.store)
    block = next(key for key in keys(role.config) if key.startswith("blocks/"))
    s3_filesystem().pipe(f"{STORE}/support/{block}", b"broken")
    assert note_damage(store, [Damage(block, "not a Parquet file")]) == 1
    role.take("curate")
    with pytest.raises(StoreError, match=r"access refused.*deployments/s3-policy"):
        curate(role.config)
    role.take("maintain")
    curate(role.config)
    assert verify_store(Store(role.config.store), deep=True)["broken"] == []


@pytest.mark.parametrize("name", ["read-only", "curate", "maintain"])
def test_no_policy_reaches_beyond_its_team(role: Role, name: str) -> None:
    role.take("owner")
    files = s3_filesystem()
    files.pipe(f"{STORE}/search/blocks/a", b"1")
    files.pipe(f"{RAW}/search/part.jsonl", b'{"text": "a"}\n')
    role.take(name)
    with pytest.raises(StoreError, match="access refused"):
        Store(f"s3://{STORE}/search").get("blocks/a")
    with pytest.raises(StoreError, match="access refused"):
        Store(f"s3://{STORE}/search").create("blocks/b", b"2")
    with pytest.raises(SourceError, match="access refused"):
        hash_object(f"s3://{RAW}/search/part.jsonl")


def test_a_glob_that_matches_nothing_is_not_taken_for_a_refusal(role: Role) -> None:
    role.take("read-only")
    with pytest.raises(SourceError, match="matches nothing"):
        look(_of(role.config, f"s3://{RAW}/support/none/*.jsonl"))


def test_sources_are_never_written(role: Role) -> None:
    role.take("maintain")
    with pytest.raises(StoreError, match="access refused"):
        Store(f"s3://{RAW}/support").create("planted.jsonl", b"")


def _of(config: CurationConfig, source: str) -> CurationConfig:
    corpus: Any = config.corpus.model_copy(update={"sources": (source,)})
    return config.model_copy(update={"corpus": corpus})


def test_one_sign_of_life_is_removed_with_the_policy_of_runs(role: Role) -> None:
    role.take("curate")
    store = Store(role.config.store)
    store.create_json("corpora/support/versions/000000000001.json", {})
    with alive(store, "someone"):
        assert [key for key, _ in store.list("alive")]
    assert not list(store.list("alive"))
    with pytest.raises(StoreError, match="access refused"):
        store.delete(["corpora/support/versions/000000000001.json"])
