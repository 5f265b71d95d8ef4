"""Codes beside the index: made by a run and by a command, searched, known to verify, gc, status and lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.attribute import attribute
from flows.cli import app
from flows.curate import curate
from rise_ops.codes import codes_folder
from rise_ops.config import SimHashConfig
from rise_ops.garbage import collect_garbage
from rise_ops.runs import read_run
from rise_ops.status import store_status
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.curation import ROWS, load, write_curation, write_lines

pytestmark = pytest.mark.usefixtures("prefect_harness")

BITS = 1_024
TEXT = "Arr, ye be welcome aboard, matey!"


def ask(*arguments: str) -> Any:
    found = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    return json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, prefect_harness: None) -> Path:
    """Configuration of a corpus that was indexed with codes, changed, and indexed again."""
    path = write_curation(tmp_path_factory.mktemp("codes"), simhash={"bits": BITS})
    curate(load(path), "index")
    write_lines(
        path.parent / "raw" / "more.jsonl",
        [{"text": f"row {number} of others", "label": "new"} for number in range(300)],
    )
    curate(load(path), "index")
    return path


def folder(path: Path) -> Path:
    config = load(path)
    (identity,) = [index["index_id"] for index in store_status(Store(config.store))["indexes"]]
    return Path(config.store, codes_folder(identity, SimHashConfig(bits=BITS)))


def test_a_run_makes_the_codes_that_are_missing(indexed: Path) -> None:
    config = load(indexed)
    third = curate(config, "index")
    assert third["stages"]["compress"]["cached"]
    store = Store(config.store)
    (stage,) = [item for item in read_run(store, third["run_id"])["stages"] if item["name"] == "compress"]
    assert [Path(item["uri"]) for item in stage["outputs"]] == [folder(indexed) / "simhash.npz"]
    sizes = [file.stat().st_size for file in folder(indexed).glob("*.bin")]
    assert sum(sizes) >= (ROWS + 300) * BITS // 8
    assert store_status(store)["indexes"][0]["codes"] == [f"{BITS}-42"]


def test_the_command_makes_them_too(indexed: Path) -> None:
    found = ask("compress", str(indexed), "--set", "simhash.seed=7")
    assert (found["rows"], found["rows_written"], found["bytes"]) == (ROWS + 300, ROWS + 300, (ROWS + 300) * BITS // 8)
    assert ask("compress", str(indexed), "--set", "simhash.seed=7")["rows_written"] == 0


def test_codes_and_index_give_the_same_answer(indexed: Path) -> None:
    exact = ask("attribute", str(indexed), "--text", TEXT, "-k", "5", "--bottom")
    found = ask("attribute", str(indexed), "--text", TEXT, "-k", "5", "--bottom", "--compressed", "--rescore", "30")
    assert found == exact
    (estimated,) = ask("attribute", str(indexed), "--text", TEXT, "-k", "5", "--compressed", "--rescore", "0")
    assert estimated["hits"] != exact[0]["hits"]


def test_searches_stay_where_they_are_asked_to(indexed: Path) -> None:
    raw = indexed.parent / "raw"
    (one,) = ask("attribute", str(indexed), "--text", TEXT, "--source", str(raw / "part-1.jsonl"))
    assert {hit["source_uri"] for hit in one["hits"]} == {str(raw / "part-1.jsonl")}
    (new,) = ask("attribute", str(indexed), "--text", TEXT, "--label", "label=new", "--compressed")
    assert {hit["source_uri"] for hit in new["hits"]} == {str(raw / "more.jsonl")}
    (old,) = ask("attribute", str(indexed), "--text", TEXT, "--version", "1", "-k", "1000")
    assert len(old["hits"]) == ROWS
    assert {hit["source_uri"] for hit in old["hits"]} == {str(raw / f"part-{number}.jsonl") for number in range(2)}
    flow = attribute(load(indexed), text=TEXT, k=5, version=1, rescore=20)
    answer = Store(load(indexed).store).get_json(flow["outputs"][0])
    assert answer["corpus"]["version"] == 1
    assert answer["queries"][0]["hits"] == old["hits"][:5]


def test_damage_is_named_and_mended(indexed: Path) -> None:
    store = Store(load(indexed).store)
    assert verify_store(store, deep=True)["broken"] == []
    file = max(folder(indexed).glob("*.bin"))
    right = file.read_bytes()
    file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert verify_store(store)["broken"] == []
    (broken,) = verify_store(store, deep=True)["broken"]
    assert broken["key"].endswith(file.name)
    ask("compress", str(indexed))
    assert file.read_bytes() == right
    file.unlink()
    (broken,) = verify_store(store)["broken"]
    assert "curate compress" in broken["remedy"]
    curate(load(indexed), "index")
    assert file.read_bytes() == right
    for mend in (lambda: curate(load(indexed), "index"), lambda: ask("compress", str(indexed))):
        (file.parent / "simhash.npz").write_bytes(b"no archive")
        assert len(verify_store(store)["broken"]) == 1
        mend()
    assert verify_store(store, deep=True)["broken"] == []
    assert not list(store.list("damage"))


def test_codes_and_answers_go_with_what_they_are_of(tmp_path: Path) -> None:
    path = write_curation(tmp_path, simhash={"bits": BITS})
    config = load(path)
    curate(config, "index")
    store = Store(config.store)
    first = attribute(config, text=TEXT, k=1)["outputs"][0]
    before = set(folder(path).iterdir())
    (tmp_path / "raw" / "part-0.jsonl").unlink()
    curate(config, "index")
    last = attribute(config, text=TEXT, k=1)["outputs"][0]
    assert collect_garbage(store)["objects"] == 0
    found = collect_garbage(store, keep=1)
    left = set(folder(path).iterdir())
    assert found["removed"]["codes"]["objects"] == found["removed"]["code records"]["objects"] == 1
    assert len(left) == len(before) == 3
    assert left != before
    assert (store.exists(first), store.exists(last)) == (False, True)
    assert verify_store(store, deep=True)["broken"] == []
