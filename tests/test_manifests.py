"""Damaged stores: whatever is in a document, a table or a name, readers give an error that names the object."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rise_ops.blocks import read_block
from rise_ops.corpus import current_version, read_snapshot
from rise_ops.documents import document
from rise_ops.errors import ConfigError, CurationError, IntegrityError, StoreError
from rise_ops.export import list_exports
from rise_ops.index import describe_index, read_record
from rise_ops.lineage import trace
from rise_ops.objects import read_record as read_object
from rise_ops.packs import read_pack
from rise_ops.report import render_report
from rise_ops.runs import read_run
from rise_ops.shapes import RecordShape
from rise_ops.status import store_status
from rise_ops.store import Store
from rise_ops.targets import read_target
from rise_ops.verify import verify_store
from tests.fuzz.cases import Documents
from tests.fuzz.seeds import RUN, fill_store
from tests.indexed import INDEX

Read = Callable[[Store, str], object]

_READERS: dict[str, Read] = {
    "corpora/corpus/versions/000000000001.json": lambda store, _: current_version(store, "corpus"),
    "objects/*.json": lambda store, name: read_object(store, name),
    "packs": lambda store, name: read_pack(store, name),
    f"indexes/{INDEX}/index.json": lambda store, _: describe_index(store, INDEX),
    f"indexes/{INDEX}/blocks/*.json": lambda store, name: read_record(store, INDEX, name),
    "targets/*.json": lambda store, name: read_target(store, name),
    "exports/out/0001/manifest.json": lambda store, _: list_exports(store, "out"),
    "exports/out/0001/lineage.json": lambda store, _: trace(store, "out/0001"),
    f"runs/{RUN}/run.json": lambda store, _: read_run(store, RUN),
}
_UNSHAPED = ("exports/out/0001/lineage.json",)
"""Documents that are only shown: any JSON object will do."""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill_store(tmp_path_factory.mktemp("filled"))


def _key(store: Store, pattern: str) -> str:
    """The first key of a kind."""
    is_pack = pattern == "packs"
    folder, _, _ = ("objects/*" if is_pack else pattern).partition("*")
    for key, _ in sorted(store.list(folder.rpartition("/")[0])):
        if key == pattern:
            return key
        if "*" in pattern or is_pack:
            name = key.removeprefix(folder)
            if name.endswith(".json") and "/" not in name and ("members" in store.get_json(key)) == is_pack:
                return key
    raise AssertionError(pattern)


def _with(store: Store, key: str, data: bytes, read: Read) -> str:
    """The error of reading a key whose bytes are replaced; they are put back."""
    path = Path(store.uri) / key
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        with pytest.raises(IntegrityError) as caught:
            read(store, path.name.removesuffix(".json"))
    finally:
        path.write_bytes(whole)
    assert store.url(key) in str(caught.value)
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("pattern", _READERS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1e999}', "not a finite"),
        (b'{"a": NaN}', "not a finite"),
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
        (b'{"format_version": "1"}', "format version that is not a number"),
        (b'{"format_version": 1.5}', "format version that is not a number"),
        (b'{"format_version": -1}', "format version that is not a number"),
    ],
)
def test_what_is_no_document_is_named(filled: Store, pattern: str, data: bytes, message: str) -> None:
    error = _with(filled, _key(filled, pattern), data, _READERS[pattern])
    assert message in error
    assert error.endswith("delete it and run again")


@pytest.mark.parametrize("pattern", [pattern for pattern in _READERS if pattern not in _UNSHAPED])
def test_a_newer_format_asks_for_an_upgrade(filled: Store, pattern: str) -> None:
    key = _key(filled, pattern)
    for version in (99, 2**200):
        data = json.dumps(filled.get_json(key) | {"format_version": version}).encode()
        assert "upgrade it" in _with(filled, key, data, _READERS[pattern])


_WRONG: list[Any] = [
    None,
    True,
    -1,
    1.5,
    "x",
    "9" * 50,
    [],
    [None],
    {},
    {"a": {}},
    2**63,
    -(2**70),
    [[[]]],
    ["../../x"],
]


@pytest.mark.parametrize("pattern", [pattern for pattern in _READERS if pattern not in _UNSHAPED])
def test_wrong_types_and_missing_keys_are_named(filled: Store, pattern: str) -> None:
    """Each key is removed and replaced by values of other types: an error, or it did not matter."""
    key = _key(filled, pattern)
    whole = filled.get_json(key)
    path, name = Path(filled.uri) / key, key.rsplit("/", 1)[-1].removesuffix(".json")
    good, messages = path.read_bytes(), list[str]()
    changed = [{other: whole[other] for other in whole if other != field} for field in whole]
    changed += [whole | {field: wrong} for field in whole for wrong in _WRONG]
    try:
        for value in changed:
            path.write_text(json.dumps(value))
            try:
                _READERS[pattern](filled, name)
                json.dumps(store_status(filled))
            except CurationError as error:
                messages.append(str(error))
    finally:
        path.write_bytes(good)
    assert all(filled.uri in message for message in messages)
    assert len(messages) > len(changed) / 4


def test_keys_that_nobody_knows_are_ignored(filled: Store) -> None:
    for pattern, read in _READERS.items():
        key = _key(filled, pattern)
        path = Path(filled.uri) / key
        good = path.read_bytes()
        path.write_text(json.dumps(json.loads(good) | {"later": [1, {"x": None}]}))
        try:
            read(filled, path.name.removesuffix(".json"))
        finally:
            path.write_bytes(good)


@pytest.mark.parametrize(
    ("pattern", "field", "value"),
    [
        ("corpora/corpus/versions/000000000001.json", "version", 2),
        ("corpora/corpus/versions/000000000001.json", "corpus", "other"),
        ("objects/*.json", "record", "0" * 64),
        ("packs", "pack", "0" * 64),
        (f"indexes/{INDEX}/index.json", "index_id", "0" * 64),
        (f"indexes/{INDEX}/blocks/*.json", "block_id", "../../../x"),
        ("exports/out/0001/manifest.json", "version", "../0002"),
        (f"runs/{RUN}/run.json", "run_id", "../run-2"),
    ],
)
def test_a_document_in_the_place_of_another_is_found(filled: Store, pattern: str, field: str, value: Any) -> None:
    key = _key(filled, pattern)
    data = json.dumps(filled.get_json(key) | {field: value}).encode()
    assert f"says that its {field} is" in _with(filled, key, data, _READERS[pattern])


def test_a_record_whose_counts_do_not_match_is_damaged(filled: Store) -> None:
    key = _key(filled, "objects/*.json")
    data = json.dumps(filled.get_json(key) | {"block_rows": [1] * 99}).encode()
    assert "differ in number" in _with(filled, key, data, _READERS["objects/*.json"])


@pytest.mark.parametrize("folder", ["blocks", "snapshots", "objects", "runs", "scores", "targets"])
@pytest.mark.parametrize("kind", ["empty", "cut", "text", "other"])
def test_damaged_tables_are_named(filled: Store, folder: str, kind: str) -> None:
    for key, _ in sorted(filled.list(folder)):
        if not key.endswith(".parquet"):
            continue
        path = Path(filled.uri) / key
        whole, messages = path.read_bytes(), list[str]()
        other = pl.DataFrame({"doc_id": [1], "block_id": [2.5], "n": [None]})
        if kind == "other":
            other.write_parquet(path)
        else:
            path.write_bytes({"empty": b"", "cut": whole[:-9], "text": b"PAR1 no table PAR1"}[kind])
        try:
            broken = {fault["key"] for fault in verify_store(filled, deep=True)["broken"]}
            for look in (lambda: store_status(filled), lambda: trace(filled, RUN), lambda: render_report(filled, RUN)):
                try:
                    look()
                except CurationError as error:
                    messages.append(str(error))
        finally:
            path.write_bytes(whole)
        assert all(filled.uri in message for message in messages)
        assert any(key.split(".")[0] in name for name in broken) or folder in ("runs", "scores")


def test_a_block_with_the_content_of_another_is_damaged(filled: Store) -> None:
    first, second, *_ = sorted(Path(filled.uri, "blocks").iterdir())
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    try:
        with pytest.raises(IntegrityError, match=rf"{first.name} does not hold the content that its name says"):
            read_block(filled, first.stem)
    finally:
        first.write_bytes(whole)


def test_columns_of_other_types_are_damage(filled: Store) -> None:
    version = current_version(filled, "corpus")
    assert version is not None
    path = Path(filled.uri, "snapshots", f"{version.snapshot_id}.parquet")
    whole = path.read_bytes()
    pl.DataFrame({"block_id": ["a"], "rows": ["b"], "characters": [1]}).write_parquet(path)
    try:
        with pytest.raises(IntegrityError, match=r"\.parquet is damaged \(column rows is String\)"):
            read_snapshot(filled, version.snapshot_id)
    finally:
        path.write_bytes(whole)


# Keys

_OUTSIDE = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "..",
    ".",
    "a/./b",
    "a//b",
    "a\\..\\b",
    "a\x00b",
    "a\nb",
    "a\x1bb",
    "\ud800",
    "runs/../../x/run.json",
]


@pytest.mark.parametrize("key", _OUTSIDE)
def test_no_key_leaves_the_store(store: Store, key: str, tmp_path: Path) -> None:
    store.create("a/b", b"1")
    (tmp_path / "x").write_bytes(b"outside")
    (tmp_path / "file").write_bytes(b"data")
    calls: list[Callable[[], object]] = [
        lambda: store.url(key),
        lambda: store.get(key),
        lambda: store.get_buffer(key),
        lambda: store.get_json(key),
        lambda: store.create(key, b"2"),
        lambda: store.create_from_file(key, tmp_path / "file"),
        lambda: store.exists(key),
        lambda: list(store.list(key)),
        lambda: store.children(key),
        lambda: store.zarr(key),
        lambda: store.scan_parquet([key]),
        lambda: store.delete(["a/b", key]),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="is not a key of store"):
            call()
    assert store.get("a/b") == b"1"
    assert (tmp_path / "x").read_bytes() == b"outside"


@pytest.mark.parametrize("key", ["a", "a/b/", "%2e%2e/x", "..a/b..", "a b/c", "é/é", "-", "~", "*"])
def test_plain_names_are_keys(store: Store, key: str) -> None:
    assert store.create(key.rstrip("/"), b"1")
    assert store.get(key.rstrip("/")) == b"1"


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/../..", "..", "x\x00"])
def test_names_that_somebody_types_stay_in_the_store(filled: Store, name: str) -> None:
    for look in (read_run, render_report, trace):
        with pytest.raises((ConfigError, StoreError)):
            look(filled, name)


# Properties

_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(_ANY | st.dictionaries(st.sampled_from(["record", "rows", "blocks", "format_version", "small"]), _ANY))
def test_any_json_is_a_document_or_damage(value: Any) -> None:
    found = _document_or_error(json.dumps(value).encode(), format_version=1, shape=RecordShape)
    assert found == value or str(found).startswith("here ")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_damage(data: bytes) -> None:
    found = _document_or_error(data)
    assert isinstance(found, dict) or found.startswith("here ")


def _document_or_error(data: bytes, **options: Any) -> dict[str, Any] | str:
    try:
        return document(data, where="here", **options)
    except IntegrityError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_little_fuzzing_finds_nothing(tmp_path: Path, seed: int) -> None:
    target, choose = Documents(tmp_path), random.Random(seed)
    for _ in range(40):
        target.run(*target.pick(choose))
