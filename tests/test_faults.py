"""Every cell of the fault matrix (`tests.fault_matrix`), and how retrying is bounded."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.states import Failed

from rise_ops import retry, signatures
from rise_ops.blocks import block_key, read_block
from rise_ops.config import ModelConfig, SketchConfig
from rise_ops.connections import obstore_options, polars_options, s3fs_options
from rise_ops.demo.corpus import MODEL_FOLDER
from rise_ops.errors import CurationError, DamagedError, StoreError, TransientError, is_transient
from rise_ops.retry import BUDGET, Budget
from rise_ops.signatures import Signer
from rise_ops.store import Store
from rise_ops.trunk import load_trunk
from tasks import policy
from tasks.policy import RETRIES
from tests import oracle
from tests.conftest import use_server
from tests.corpora import corpus_of, ingest_all, ingest_path, make_rows, write_as
from tests.fault_matrix import EXPECTED, HALVED, HOPELESS, NETWORK, QUICK, SAME, SPOOL_FULL, Outcome, cells, markdown
from tests.fault_proxy import Fault, FaultProxy, Rule
from tests.fault_stages import STAGES, Made, World, make_world
from tests.servers import S3Server


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint).running() as proxy:
        yield proxy


@pytest.fixture
def behind(proxy: FaultProxy, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """This process works on the S3 server through the proxy, with short pauses."""
    use_server(monkeypatch, s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setattr(retry, "BUDGET", QUICK)
    return proxy


@pytest.fixture(scope="module")
def world(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as environment:
        use_server(environment, s3_server)
        return make_world(tmp_path_factory.mktemp("faults"), f"s3://tests/{os.urandom(6).hex()}")


@pytest.fixture(scope="module")
def undisturbed() -> dict[tuple[str, str], Any]:
    """What each stage of each world makes in peace, once it was asked for."""
    return {}


def _expect(outcome: Outcome, world: World, stage: str, made: dict[tuple[str, str], Any], disturbance: Any, *,
            retries: int = RETRIES) -> None:  # fmt: skip
    """Run a stage as a task would, with its retries, and hold what happens against the table."""
    if (world.store, stage) not in made:
        made[world.store, stage] = STAGES[stage](world).content()
    with disturbance:
        result, error, attempts = _as_task(lambda: STAGES[stage](world), retries)
    if outcome.error is None:
        assert error is None, error
        assert result is not None and result.content() == made[world.store, stage]
        assert attempts == 1
        return
    assert type(error) is outcome.error, error
    assert re.search(outcome.remedy, str(error)), error
    assert attempts == (1 + retries if is_transient(error) else 1)
    assert not any(secret in str(error) for secret in (os.environ.get("AWS_SECRET_ACCESS_KEY", "no secret"),))


def _as_task(call: Callable[[], Made], retries: int) -> tuple[Made | None, CurationError | None, int]:
    for attempt in range(1, retries + 2):
        try:
            return call(), None, attempt
        except CurationError as error:
            if not is_transient(error) or attempt > retries:
                return None, error, attempt
    raise AssertionError("the last attempt returns")


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize(("fault", "stage"), cells(NETWORK))
def test_a_fault_of_the_network(
    behind: FaultProxy, world: World, undisturbed: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch,
    fault: str, stage: str,
) -> None:  # fmt: skip
    budget, make_rules = NETWORK[fault]
    rules = make_rules()
    monkeypatch.setattr(retry, "BUDGET", budget)
    begun = time.monotonic()
    retries = 0 if budget is HOPELESS else RETRIES
    _expect(EXPECTED[fault][stage], world, stage, undisturbed, behind.spoiling(*rules), retries=retries)
    assert sum(rule.spoilt.total() for rule in rules) > 0
    if budget is HOPELESS:
        assert time.monotonic() - begun < 10 * budget.longest_seconds


@pytest.mark.s3
@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet"])
def test_an_object_that_changes_while_it_is_read(behind: FaultProxy, world: World, tmp_path: Path, name: str) -> None:
    outcome = EXPECTED["object changes while it is read"]["read"]
    place = Store(f"s3://tests/{os.urandom(6).hex()}")
    content = (world.local / "raw" / name).read_bytes()
    place.create(name, content)

    def change() -> None:
        place.delete([name])
        place.create(name, content[:-2] + content[:2])

    rule = Rule(None, "GET", name, most=1, meanwhile=change)
    assert outcome.error is not None
    with behind.spoiling(rule), pytest.raises(outcome.error, match=outcome.remedy):
        ingest_path(Store(str(tmp_path / "store")), place.url(name))
    assert rule.spoilt.total() == 1


@pytest.mark.s3
def test_a_body_that_is_shorter_than_listed_is_not_ingested(behind: FaultProxy, tmp_path: Path) -> None:
    """However consistent the server is: every line that came is whole."""
    place = Store(f"s3://tests/{os.urandom(6).hex()}")
    row = b'{"text": "one more row like all others"}\n'
    place.create("rows.jsonl", row * 64)
    lie = Rule(Fault.SHORT_LENGTH, "GET", "rows.jsonl")
    with behind.spoiling(lie), pytest.raises(TransientError, match=r"ended after 2,\d+ of 2,624 bytes"):
        ingest_path(Store(str(tmp_path / "store")), place.url("rows.jsonl"))


@pytest.mark.s3
def test_what_is_damaged_in_the_store_is_damage_at_once(behind: FaultProxy, world: World) -> None:
    """Two looks tell a stored object that is damaged from one that was damaged on its way."""
    store = Store(f"s3://tests/{os.urandom(6).hex()}")
    key = block_key(world.indexed.blocks[0])
    whole = Store(world.store).get(key)
    store.create(key, whole[: len(whole) // 2])
    watch = Rule(None, "GET", key)
    with behind.spoiling(watch), pytest.raises(DamagedError, match=r"is damaged.*run again") as caught:
        read_block(store, world.indexed.blocks[0])
    assert caught.value.where == store.url(key)
    assert watch.spoilt.total() == 3  # twice, and once to see that nothing was cut


@pytest.mark.s3
def test_the_writer_of_a_lost_answer_is_told_that_it_wrote(behind: FaultProxy) -> None:
    store = Store(f"s3://tests/{os.urandom(6).hex()}")
    with behind.spoiling(Rule(Fault.LOST_ANSWER, "PUT", times=2)):
        assert store.create("mine", b"mine")
        assert not store.create("mine", b"mine")
    rival = Rule(Fault.RESET, "PUT", "theirs", most=1, meanwhile=lambda: Store(store.uri).create("theirs", b"theirs"))
    with behind.spoiling(rival):
        assert not store.create("theirs", b"mine")
    assert store.get("theirs") == b"theirs"
    with behind.spoiling(Rule(Fault.LOST_ANSWER, "PUT", times=1)):
        store.probe()


@pytest.mark.s3
def test_a_lost_answer_publishes_one_version(behind: FaultProxy, world: World) -> None:
    store = Store(f"s3://tests/{os.urandom(6).hex()}/store")
    with behind.spoiling(Rule(Fault.LOST_ANSWER, "PUT", "/versions/", times=1)):
        version = ingest_all(store, corpus_of(world.local / "raw/*"))
    assert version.version == 1
    assert store.children("corpora/corpus/versions") == ["000000000001.json"]


@pytest.mark.s3
def test_a_listing_goes_on_where_it_was_cut(behind: FaultProxy) -> None:
    store = Store(f"s3://tests/{os.urandom(6).hex()}")
    keys = [f"many/{number:04d}" for number in range(1_010)]
    for key in keys:
        store.create(key, b"")
    with behind.spoiling(Rule(Fault.TRUNCATED, "GET", "list-type", times=1)):
        assert [key for key, _ in store.list("many")] == keys


def test_waiting_is_bounded_and_irregular(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = [pause for pause in retry.pauses() if pause is not None]
    assert len(waits) == BUDGET.tries - 1
    for number, wait in enumerate(waits):
        longest = min(BUDGET.longest_pause, BUDGET.first_pause * 2**number)
        assert longest / 2 <= wait <= longest
    assert waits != [pause for pause in retry.pauses() if pause is not None]
    monkeypatch.setattr(retry, "BUDGET", Budget(9, 1.0, 1.0, 0.0, 0.1, 1.0))
    assert list(retry.pauses()) == [None]


def test_a_call_that_has_spent_its_budget_is_not_repeated_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BUDGET", QUICK)
    calls = []

    def call() -> None:
        calls.append(1)
        raise TransientError("busy")

    with pytest.raises(TransientError):
        retry.retried(lambda: retry.retried(call))
    assert len(calls) == QUICK.tries


def test_all_clients_have_the_same_budget() -> None:
    store = obstore_options("s3://bucket", tries=BUDGET.tries)
    assert store["client_options"]["timeout"].total_seconds() == BUDGET.try_seconds
    assert store["retry_config"]["retry_timeout"].total_seconds() == BUDGET.retry_seconds
    assert store["retry_config"]["max_retries"] == BUDGET.tries - 1
    tables = polars_options("s3://bucket")
    assert (tables["max_retries"], tables["retry_timeout_ms"]) == (BUDGET.tries - 1, BUDGET.retry_seconds * 1000)
    sources = s3fs_options()["config_kwargs"]
    assert sources["read_timeout"] == BUDGET.try_seconds
    assert sources["retries"]["total_max_attempts"] == 1  # `rise_ops.sources` repeats


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (TransientError("busy"), True),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (StoreError("refused"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_a_task_begins_again_only_after_what_passes(error: Exception, again: bool) -> None:
    @policy.stage("some stage")
    def work(store_uri: str) -> dict[str, Any]:
        return {}

    assert work.retries == RETRIES
    assert work.retry_jitter_factor == 0.5
    assert work.retry_delay_seconds == [1, 2, 4]
    run: Any = None
    assert work.retry_condition_fn is not None
    assert work.retry_condition_fn(work, run, Failed(data=error)) is again


class Disk:
    """A small file system of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def full(self) -> Iterator[None]:
        """With no byte left."""
        ballast = self.root / "ballast"
        with ballast.open("wb", buffering=0) as file:
            piece = bytes(4096)
            while True:
                try:
                    file.write(piece)
                except OSError:
                    break
        try:
            yield
        finally:
            ballast.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Mounted read-only."""
        subprocess.run(["mount", "-o", "remount,ro", str(self.root)], check=True)
        try:
            yield
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(self.root)], check=True)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    root = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(root)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system: not root, or in a container without that right")
    try:
        yield Disk(root)
    finally:
        subprocess.run(["umount", "--lazy", str(root)], check=True)


@pytest.fixture(scope="module")
def local_world(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("sources"), str(disk.root / "world"))


@pytest.mark.parametrize(("fault", "stage"), cells(["full disk", "read-only store"]))
def test_a_fault_of_the_disk(
    disk: Disk, local_world: World, undisturbed: dict[tuple[str, str], Any], fault: str, stage: str
) -> None:
    disturbance = disk.full() if fault == "full disk" else disk.read_only()
    _expect(EXPECTED[fault][stage], local_world, stage, undisturbed, disturbance)
    _expect(SAME, local_world, stage, undisturbed, _peace())


@pytest.mark.parametrize("stage", [stage for _, stage in cells(["full temporary disk"])])
def test_a_full_temporary_disk(
    disk: Disk, tmp_path_factory: pytest.TempPathFactory, undisturbed: dict[tuple[str, str], Any],
    monkeypatch: pytest.MonkeyPatch, elsewhere: World, stage: str,
) -> None:  # fmt: skip
    outcome = EXPECTED["full temporary disk"][stage]
    STAGES[stage](elsewhere)
    monkeypatch.setattr(tempfile, "tempdir", str(disk.root))
    _expect(outcome, elsewhere, stage, undisturbed, disk.full())
    assert list(disk.root.glob("curate-*")) == []


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("sources"), str(tmp_path_factory.mktemp("elsewhere")))


@pytest.mark.s3
def test_a_remote_table_that_does_not_fit_the_temporary_disk(
    behind: FaultProxy, world: World, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(disk.root))
    with disk.full(), pytest.raises(StoreError, match=SPOOL_FULL.remedy):
        ingest_path(Store(str(tmp_path / "store")), f"{world.sources.rstrip('*')}c.parquet")


def test_without_a_temporary_folder_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    write_as(tmp_path / "a.jsonl", make_rows(3))
    with pytest.raises(StoreError, match=r"no usable temporary folder.*set TMPDIR"):
        ingest_path(Store(str(tmp_path / "store")), tmp_path / "a.jsonl")


def test_a_device_out_of_memory(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert EXPECTED["device out of memory"]["sketch"] is HALVED
    sketch = SketchConfig(dim_r=32, dim_h=16, dim_g=8)
    signer = Signer(load_trunk(ModelConfig(name=str(MODEL_FOLDER), device="cpu")), sketch, memory=2**28)
    texts = [row["text"] for row in make_rows(40)]
    expected = signer.rows(texts).signature
    plain = signer._head.signatures

    def small(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(hidden) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(hidden, *arguments, **options)

    monkeypatch.setattr(signer._head, "signatures", small)
    found = signer.rows(texts).signature
    assert min(oracle.cosine(one, other) for one, other in zip(found, expected, strict=True)) >= 0.9999
    said = [record for record in caplog.records if record.name == signatures.__name__]
    assert said and "ran out of memory" in said[0].message and said[-1].message.endswith("5 chunks at a time")
    assert signer.halvings == len(said)


@contextmanager
def _peace() -> Iterator[None]:
    yield


def test_the_published_table_is_the_tested_one() -> None:
    assert markdown() in (Path(__file__).parents[1] / "deployments" / "faults.md").read_text(encoding="utf-8")


def test_every_cell_has_a_test() -> None:
    others = {"object changes while it is read", "full disk", "read-only store", "full temporary disk"}
    assert set(EXPECTED) == set(NETWORK) | others | {"device out of memory"}
