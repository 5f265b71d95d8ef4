"""Exchange with the index format of the reference implementation, which is written down here once more, by hand."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch

from rise_ops import exchange_import, exchange_write
from rise_ops.chunking import row_chunks
from rise_ops.config import CurationConfig, SketchConfig
from rise_ops.demo.corpus import pool_rows
from rise_ops.errors import ConfigError, CurationError, IntegrityError, ModelError, SourceError, StoreError
from rise_ops.exchange import effective, from_sketch, to_sketch
from rise_ops.exchange_import import import_reference_index
from rise_ops.exchange_read import ReferenceIndex, open_reference_index
from rise_ops.exchange_write import export_reference_index
from rise_ops.index import index_id, iter_signatures, list_indexed, prepare_index, read_counts, read_record
from rise_ops.indexing import sketch_blocks
from rise_ops.ingest import ingest_corpus
from rise_ops.model_files import model_fingerprint
from rise_ops.session import block_rows, open_corpus, open_signer
from rise_ops.store import Store
from rise_ops.verify import verify_store
from tests.curation import as_record, load, write_curation, write_lines

Json = dict[str, Any]

CONFIG = {"fusion_mode": "rh+gh", "Kr": 32, "Kh": 16, "Kg": 8, "tau_fallback": 1.0, "seed": 42}
DIM = 32 * 16 + 8 * 16


def index(store: Store, config: CurationConfig) -> str:
    """Ingest and index without a flow."""
    ingest_corpus(store, config, run_id="run")
    signer = open_signer(store, config)
    identity = prepare_index(store, signer, model=config.model)
    blocks = list(block_rows(store, open_corpus(store, config)))
    sketch_blocks(store, identity, blocks, dim=config.sketch.dim, signer=lambda: signer)
    return identity


def write_pool(path: Path) -> None:
    """A file that does not fit into one block: with a blank line, a bad one, a long row and one of a single token."""
    lines = [json.dumps(as_record(row)) for row in pool_rows()[:560]]
    lines.insert(3, "")
    lines.insert(100, "{broken")
    lines.append(json.dumps({"text": "walk the plank " * 250}))
    lines.append(json.dumps({"text": "a"}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Curated:
    """A curation of one file, indexed, and its export."""

    config: CurationConfig
    store: Store
    identity: str
    file: Path
    exported: Path

    def elsewhere(self, folder: Path) -> tuple[Store, CurationConfig]:
        """Another store with the same corpus, not indexed."""
        config = self.config.model_copy(update={"store": str(folder / "other-store")})
        store = Store(config.store)
        ingest_corpus(store, config, run_id="run")
        return store, config


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    folder = tmp_path_factory.mktemp("exchange")
    path = write_curation(folder)
    shutil.rmtree(folder / "raw")
    (folder / "raw").mkdir()
    write_pool(folder / "raw/pool.jsonl")
    config = load(path)
    store = Store(config.store)
    identity = index(store, config)
    export_reference_index(store, config, folder / "exported", block_size=200)
    return Curated(config, store, identity, folder / "raw/pool.jsonl", folder / "exported")


@pytest.fixture
def copied(curated: Curated, tmp_path: Path) -> Path:
    """The exported directory, to be spoilt."""
    return Path(shutil.copytree(curated.exported, tmp_path / "copied"))


def blocks_of(store: Store, identity: str, config: CurationConfig) -> dict[str, tuple[Any, ...]]:
    """Bits of all signatures and counts, by block."""
    found = {}
    for block in block_rows(store, open_corpus(store, config)):
        record = read_record(store, identity, block)
        signatures = np.concatenate(list(iter_signatures(store, identity, record)))
        found[block] = (signatures.view(np.uint16), *read_counts(store, identity, record))
    return found


def tables(vocab: int, hidden: int) -> dict[str, npt.NDArray[Any]]:
    """Random projections as the format has them: buckets, then signs, from one generator each."""
    found: dict[str, npt.NDArray[Any]] = {}
    for offset, (name, inputs, width) in enumerate((("h", hidden, 16), ("g", hidden, 8), ("r", vocab, 32))):
        generator = torch.Generator().manual_seed(CONFIG["seed"] + offset)  # type: ignore[operator]
        found[f"{name}_buckets"] = torch.randint(0, width, (inputs,), generator=generator).numpy().astype(np.int32)
        bits = torch.randint(0, 2, (inputs,), generator=generator).numpy()
        found[f"{name}_signs"] = np.where(bits == 1, 1, -1).astype(np.int8)
        found[f"{name}_out_dim"] = np.array(width, dtype=np.int64)
    return found


def handmade(folder: Path, vectors: npt.NDArray[np.float16], meta: list[Json], *, data: Json, model: Json,
             block_size: int = 128) -> Path:  # fmt: skip
    """An index directory, made of the format's description alone."""
    (folder / "shards").mkdir(parents=True)
    arrays = tables(model["vocab_size"], model["hidden_dim"])
    np.savez(folder / "projections.npz", **arrays)  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    attributes = {"workload": "rise", "config": CONFIG, "model": model, "tokenizer": {},
                  "projections_sha256": digest.hexdigest(), "data": data}  # fmt: skip
    plan = {"format": "rise.signature-index", "format_version": 1, "num_rows": len(vectors), "dim": vectors.shape[1],
            "dtype": "float16", "block_size": block_size, "num_blocks": -(-len(vectors) // block_size),
            "attrs": attributes, "attrs_sha256": "0" * 64}  # fmt: skip
    (folder / "build_plan.json").write_text(json.dumps(plan))
    shards = []
    for block, start in enumerate(range(0, len(vectors), block_size)):
        part = slice(start, start + block_size)
        file, lines = folder / f"shards/vectors-{block:05d}.npy", folder / f"shards/meta-{block:05d}.jsonl"
        np.save(file, vectors[part])
        lines.write_text("".join(json.dumps(row) + "\n" for row in meta[part]))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        record = {"block": block, "start": start, "rows": len(vectors[part]), "sha256": sha256, "stats": {}}
        (folder / f"shards/block-{block:05d}.json").write_text(json.dumps(record))
        shards.append({"file": f"shards/{file.name}", "meta": f"shards/{lines.name}", "start": start,
                       "rows": len(vectors[part]), "sha256": sha256})  # fmt: skip
    manifest = {**plan, "shards": shards, "build_totals": {}, "rise_version": "1.0", "finalized_utc": "2026-01-01"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@lru_cache(1)
def signed(curated: Curated) -> tuple[npt.NDArray[np.float16], list[Json]]:
    """Vectors and metadata of the curated file: lines are read, tokenized and signed here."""
    texts = []
    for line in curated.file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line or "{}")
        except ValueError:
            row = {"text": ""}
        parts = (row.get(name, "") for name in ("instruction", "input", "output"))
        if row:
            texts.append(row.get("text", "").strip() or "\n".join(part for part in parts if part).strip())
    signer = open_signer(curated.store, curated.config)
    tokens = [len(ids) for ids in signer.trunk.tokenizer(texts)["input_ids"]]
    meta = [
        {"idx": number, "length": len(text), "tok_len": min(count, 512), "num_chunks": len(row_chunks(0, count)),
         "label": "some", "text": text[:200]}
        for number, (text, count) in enumerate(zip(texts, tokens, strict=True))
    ]  # fmt: skip
    return signer.rows(texts).signature, meta


def handmade_of(curated: Curated, folder: Path, **other: Any) -> Path:
    """An index directory of the curated file; `other`: what it says of its model otherwise."""
    vectors, meta = signed(curated)
    data = {"file": "pool.jsonl", "rows": len(meta), "sha256": hashlib.sha256(curated.file.read_bytes()).hexdigest()}
    trunk = open_signer(curated.store, curated.config).trunk
    model = {"backend": "hf", "name_or_path": "org/other", "vocab_size": trunk.vocab_size,
             "hidden_dim": trunk.hidden_dim, "dtype": "float32"}  # fmt: skip
    return handmade(folder, vectors, meta, data=data, model={**model, **other})


def edit(path: Path, change: Callable[[Json], None], *others: Path) -> None:
    """Change JSON documents in place."""
    for each in (path, *others):
        value = json.loads(each.read_text(encoding="utf-8"))
        change(value)
        each.write_text(json.dumps(value), encoding="utf-8")


def put(name: str, value: Any) -> Callable[[Json], None]:
    """A change that sets a value by its dotted name."""

    def change(document: Json) -> None:
        *parents, last = name.split(".")
        node: Any = document
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[last] = value

    return change


def test_a_round_trip_keeps_every_bit(curated: Curated, tmp_path: Path) -> None:
    store, config = curated.elsewhere(tmp_path)
    found = import_reference_index(store, config, curated.exported)
    assert found.index_id == curated.identity
    assert (found.rows, found.rows_imported, found.rows_computed, found.rows_left) == (563, 562, 0, 0)
    assert found.sample_rows == exchange_import.SAMPLE_ROWS
    ours, theirs = (blocks_of(each, curated.identity, config) for each in (curated.store, store))
    assert len(ours) > 1
    for block, arrays in ours.items():
        assert all(np.array_equal(mine, other) for mine, other in zip(arrays, theirs[block], strict=True))
    assert verify_store(store, deep=True)["broken"] == []
    again = import_reference_index(store, config, curated.exported)
    assert (again.rows_imported, again.rows_there, again.cosine_min) == (0, 562, None)
    export_reference_index(store, config, tmp_path / "again", block_size=200)
    for name in ("shards/vectors-00001.npy", "shards/meta-00002.jsonl", "build_plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (curated.exported / name).read_bytes()


def test_an_export_is_what_the_format_says(curated: Curated) -> None:
    folder = curated.exported
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "build_plan.json").read_text(encoding="utf-8"))
    assert {name: manifest[name] for name in plan} == plan
    assert (plan["format"], plan["format_version"], plan["dtype"]) == ("rise.signature-index", 1, "float16")
    assert (plan["num_rows"], plan["dim"], plan["block_size"], plan["num_blocks"]) == (563, DIM, 200, 3)
    data = plan["attrs"]["data"]
    sha256 = hashlib.sha256(curated.file.read_bytes()).hexdigest()
    assert data == {"file": "pool.jsonl", "rows": 563, "sha256": sha256}
    config = plan["attrs"]["config"]
    assert config.items() >= CONFIG.items() and config["topL_cum_prob"] == 0.92 and config["chunk_overlap"] == 50
    with np.load(folder / "projections.npz", allow_pickle=False) as found:
        expected = tables(plan["attrs"]["model"]["vocab_size"], plan["attrs"]["model"]["hidden_dim"])
        assert set(found) == set(expected)
        for name, array in expected.items():
            assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    vectors, meta = [], []
    for number, shard in enumerate(manifest["shards"]):
        data = (folder / shard["file"]).read_bytes()
        record = json.loads((folder / f"shards/block-{number:05d}.json").read_text(encoding="utf-8"))
        assert record["sha256"] == shard["sha256"] == hashlib.sha256(data).hexdigest()
        vectors.append(np.load(io.BytesIO(data), allow_pickle=False))
        meta += [json.loads(line) for line in (folder / shard["meta"]).read_text(encoding="utf-8").splitlines()]
        assert record["stats"]["chunks"] == sum(row["num_chunks"] for row in meta[shard["start"] :])
    stacked = np.concatenate(vectors)
    assert stacked.dtype == np.float16 and stacked.shape == (563, DIM)
    norms = np.linalg.norm(stacked.astype(np.float32), axis=1)
    empty = [99, 562]  # the bad line, after a blank one, and the row of one token
    assert np.flatnonzero(norms == 0).tolist() == empty
    assert np.allclose(np.delete(norms, empty), 1, atol=2e-3)
    assert [row["idx"] for row in meta] == list(range(563))
    assert meta[99] == {"idx": 99, "length": 0, "tok_len": 0, "num_chunks": 0, "text": ""}
    assert meta[561]["tok_len"] == 512 and meta[561]["num_chunks"] > 2 and len(meta[561]["text"]) == 200
    assert meta[0]["label"] in ("clean", "backdoor")
    first = as_record(pool_rows()[0])
    assert meta[0]["text"].startswith(first["instruction"][:50])
    assert manifest["build_totals"]["empty_rows"] == 2


def test_a_handmade_index_is_read_searched_and_imported(curated: Curated, tmp_path: Path) -> None:
    folder = handmade_of(curated, tmp_path / "made")
    found = open_reference_index(folder)
    found.verify()
    assert found.sketch == SketchConfig(dim_r=32, dim_h=16, dim_g=8, temperature=1.0)
    assert (found.num_rows, found.dim, len(found.shards)) == (563, DIM, 5)
    rows = found.rows().filter(pl.col("num_chunks") > 0).select("idx", "label").head(100).collect()
    assert rows["idx"].to_list() == [*range(99), 100] and set(rows["label"]) == {"some"}
    queries = np.asarray(found.vectors(1)[:3], np.float32)
    hits = found.search(queries, k=4)
    everything = np.concatenate([found.vectors(number) for number in range(5)]).astype(np.float64)
    scores = everything @ queries.T.astype(np.float64)
    scores[(everything == 0).all(axis=1)] = -9
    for query, best in hits.partition_by("query", as_dict=True).items():
        order = np.argsort(-scores[:, int(query[0])], kind="stable")[:4]
        assert best["idx"].to_list() == order.tolist()
        assert np.allclose(best["score"], scores[order, int(query[0])], atol=1e-6)
        assert best["text"].null_count() == 0
    store, config = curated.elsewhere(tmp_path)
    with pytest.raises(ModelError, match="name_or_path is org/other"):
        import_reference_index(store, config, folder)
    done = import_reference_index(store, config, folder, any_name=True)
    assert done.rows_imported == 562 and done.rows_left == 0
    ours, theirs = (blocks_of(each, curated.identity, config) for each in (curated.store, store))
    for block, (signatures, tokens, chunks) in ours.items():
        other, *counts = theirs[block]
        cosines = (signatures.view("f2").astype(float) * other.view("f2").astype(float)).sum(axis=1)
        assert (cosines[chunks > 0] > 0.999).all()
        assert np.array_equal(tokens, counts[0]) and np.array_equal(chunks, counts[1])


def test_rows_that_the_index_has_otherwise_are_computed(curated: Curated, tmp_path: Path, copied: Path) -> None:
    lines = (copied / "shards/meta-00000.jsonl").read_text(encoding="utf-8").splitlines()
    for place, name, value in ((5, "length", 1), (6, "text", "other"), (7, "tok_len", 3), (8, "num_chunks", 2)):
        lines[place] = json.dumps({**json.loads(lines[place]), name: value})
    (copied / "shards/meta-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    store, config = curated.elsewhere(tmp_path)
    found = import_reference_index(store, config, copied)
    assert (found.rows_imported, found.rows_computed) == (558, 4)
    for block, (signatures, *_) in blocks_of(curated.store, curated.identity, config).items():
        record = read_record(store, curated.identity, block)
        assert record.rows_sketched in (0, 4)
        other = np.concatenate(list(iter_signatures(store, curated.identity, record)))
        assert np.allclose(other.astype(float), signatures.view("f2").astype(float), atol=2e-3)
    lines = [json.dumps({**json.loads(line), "length": 7}) for line in lines]
    (copied / "shards/meta-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    store, config = curated.elsewhere(tmp_path / "more")
    with pytest.raises(SourceError, match=r"of 562 rows of .*pool.jsonl differ"):
        import_reference_index(store, config, copied)


def test_blocks_with_rows_of_other_files_are_left_to_index(curated: Curated, tmp_path: Path) -> None:
    path = write_curation(tmp_path)  # two small files that share a block
    shutil.copy(curated.file, tmp_path / "raw/pool.jsonl")
    config = load(path)
    store = Store(config.store)
    ingest_corpus(store, config, run_id="run")
    found = import_reference_index(store, config, curated.exported)
    assert (found.rows_imported, found.rows_left, found.blocks_left) == (562, 60, 1)
    index(store, config)
    export = export_reference_index(store, config, tmp_path / "out", with_model=False)
    assert export.rows == 622
    data = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))["attrs"]["data"]
    assert data["sha256"] is None and data["sources"] == 3 and data["snapshot_id"]
    with pytest.raises(SourceError, match=r"attrs\.data\.sha256 is missing"):
        import_reference_index(store, config, tmp_path / "out")
    stored = np.concatenate([arrays[0] for arrays in blocks_of(store, found.index_id, config).values()])
    assert np.array_equal(np.asarray(open_reference_index(tmp_path / "out").vectors(0)).view(np.uint16), stored)


def test_an_interrupted_export_is_not_finished_and_goes_on(
    curated: Curated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, finish = tmp_path / "out", exchange_write._Shard.finish

    def dies(shard: exchange_write._Shard) -> None:
        if shard._number == 1:
            raise OSError(28, "No space left on device", "disk")
        finish(shard)

    monkeypatch.setattr(exchange_write._Shard, "finish", dies)
    with pytest.raises(StoreError, match=r"disk cannot be written .*free space there and give the same command"):
        export_reference_index(curated.store, curated.config, folder, block_size=200)
    monkeypatch.undo()
    with pytest.raises(IntegrityError, match=r"manifest\.json is missing: its build has not come to its end"):
        open_reference_index(folder)
    with pytest.raises(ConfigError, match=r"other settings \(block_size, num_blocks\)"):
        export_reference_index(curated.store, curated.config, folder, block_size=300)
    done = export_reference_index(curated.store, curated.config, folder, block_size=200)
    assert (done.shards, done.shards_written, done.rows_empty) == (3, 2, 2)
    assert open_reference_index(folder).shards == open_reference_index(curated.exported).shards
    assert not list(folder.rglob("*.part"))
    assert export_reference_index(curated.store, curated.config, folder, block_size=200).shards_written == 0
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        export_reference_index(curated.store, curated.config, tmp_path / "full")


BOTH: Any = [
    ("format_version", 2, "manifest.json: format_version is 2, this program reads up to 1"),
    ("format", "other", "manifest.json: format is 'other'"),
    ("attrs.workload", "embeddings", r"attrs\.workload is 'embeddings'"),
    ("dtype", "float32", "dtype is 'float32'"),
    ("dim", 1024, "dim is 1,024, attrs.config makes 640"),
    ("dim", 10**18, "manifest.json: dim"),
    ("num_rows", 10**15, r"attrs\.data\.rows is 563, num_rows 1,000,000,000,000,000"),
    ("num_rows", -1, "manifest.json: num_rows"),
    ("num_rows", True, "manifest.json: num_rows"),
    ("block_size", 0, "manifest.json: block_size"),
    ("num_blocks", 4, "3 shards, num_blocks 4"),
    ("attrs.config.adaptive_temperature", True, r"config\.adaptive_temperature is 'True'"),
    ("attrs.config.seq_len", 1024, r"config\.seq_len is '1024'"),
    ("attrs.config.l2_eps", "squared", r"config\.l2_eps"),
    ("attrs.config.future", 1, r"config\.future is not a field that rise-ops knows"),
    ("attrs.config.fusion_mode", "rh+xx", r"config\.fusion_mode"),
    ("attrs.config.tau_fallback", -0.1, r"config\.tau_fallback is '-0.1': Input should be greater than 0"),
    ("attrs.config.Kr", 64, "dim is 640, attrs.config makes 1,152"),
    ("attrs.model.vocab_size", 10**9, r"manifest.json: attrs\.model\.vocab_size"),
    ("attrs.model.hidden_dim", 3, "projections.npz: h_buckets is int32"),
    ("attrs.projections_sha256", "0" * 64, r"projections.npz does not match attrs\.projections_sha256"),
]
MANIFEST_ONLY: Any = [
    ("shards.1.start", 100, r"shards\.1 has 200 rows from 100 on, expected were 200 from 200 on"),
    ("shards.1.rows", 10**12, r"shards\.1 has 1,000,000,000,000 rows"),
    ("shards.1.file", "shards/../../../vectors-00001.npy", "which is not a name of its format"),
    ("shards.1.file", "/etc/vectors-00001.npy", "which is not a name of its format"),
    ("shards.1.meta", "shards/meta-00001.jsonl\n", "which is not a name of its format"),
    ("shards.1.file", "shards/vectors-00000.npy", "two shards have the same file"),
    ("shards.1.file", "shards/vectors-00007.npy", "vectors-00007.npy is missing"),
    ("shards.1.sha256", "x", "the sha256 of shards/vectors-00001.npy is 'x'"),
    ("shards", [], "0 shards"),
    ("attrs.data.rows", 7, "build_plan.json: attrs is not what manifest.json says"),
]


@pytest.mark.parametrize(("name", "value", "message"), BOTH)
def test_what_does_not_add_up_is_refused_by_file_and_field(copied: Path, name: str, value: Any, message: str) -> None:
    edit(copied / "manifest.json", put(name, value), copied / "build_plan.json")
    with pytest.raises((IntegrityError, ConfigError), match=message):
        open_reference_index(copied)


@pytest.mark.parametrize(("name", "value", "message"), MANIFEST_ONLY)
def test_a_manifest_that_lies_is_refused(copied: Path, name: str, value: Any, message: str) -> None:
    edit(copied / "manifest.json", put(name, value))
    with pytest.raises(IntegrityError, match=message):
        open_reference_index(copied)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"format":' + b"[" * 100_000, b'{"format": NaN}'])
def test_a_manifest_that_is_none_is_refused(copied: Path, content: bytes) -> None:
    (copied / "manifest.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        open_reference_index(copied)


def _npy(array: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ROWS = np.zeros((200, DIM), np.float16)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(_npy(np.array([None], dtype=object)), "holds pickled objects, which are not read", id="pickle"),
        pytest.param(_npy(ROWS.astype(np.float32)), "is float32", id="float32"),
        pytest.param(_npy(ROWS[:-1]), r"is float16 \[199, 640\]", id="rows"),
        pytest.param(_npy(ROWS)[:-2], "has 256,126 bytes, 200 rows of 640 take 256,128", id="truncated"),
        pytest.param(_npy(ROWS) + b"\0", "has 256,129 bytes, 200 rows", id="longer"),
        pytest.param(_npy(np.asfortranarray(ROWS)), "is stored column by column", id="fortran"),
        pytest.param(b"", "is not an .npy file", id="empty"),
        pytest.param(b"\x93NUMPY\x01\x00\xff\xff" + b"{" * 65_535, "is not an .npy file", id="header"),
    ],
)
def test_files_of_vectors_that_are_none_are_refused(copied: Path, content: bytes, message: str) -> None:
    (copied / "shards/vectors-00001.npy").write_bytes(content)
    with pytest.raises(IntegrityError, match=f"vectors-00001.npy {message}"):
        open_reference_index(copied)


def test_vectors_are_held_against_their_hash_and_their_length(copied: Path, curated: Curated, tmp_path: Path) -> None:
    path = copied / "shards/vectors-00001.npy"
    vectors = np.load(path)

    def write(row: int, value: float) -> None:
        changed = vectors.copy()
        changed[row] = value
        path.write_bytes(_npy(changed))

    write(5, 1 / np.sqrt(DIM))
    with pytest.raises(IntegrityError, match=r"vectors-00001\.npy does not match the sha256 in manifest\.json"):
        open_reference_index(copied).verify()
    store, config = curated.elsewhere(tmp_path)
    with pytest.raises(IntegrityError, match="does not match the sha256"):
        import_reference_index(store, config, copied)
    assert not list(store.list("indexes"))
    for value in (float("nan"), float("inf"), 2.0):
        write(5, value)
        with pytest.raises(IntegrityError, match="row 205 is no signature"):
            open_reference_index(copied).verify()
    write(5, float("nan"))
    with pytest.raises(IntegrityError, match="row 205 has entries that are not finite"):
        open_reference_index(copied).search(np.asarray(vectors[:1], np.float32))
    with pytest.raises(ConfigError, match=r"queries are \[1, 3\]"):
        open_reference_index(copied).search(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3 is not valid JSON"),
        ("[" * 50_000, "line 3 is not valid JSON"),
        ("7", "line 3 is not a JSON object"),
        ('{"idx": 9, "length": 1, "tok_len": 1, "num_chunks": 1}', "line 3: idx is 9, expected was 2"),
        ('{"idx": 2, "length": -1, "tok_len": 1, "num_chunks": 1}', "line 3: length is '-1'"),
        ('{"idx": 2, "length": 1, "tok_len": 1e400, "num_chunks": 1}', "line 3: tok_len is 'inf'"),
        ('{"idx": 2, "length": 1, "tok_len": 1, "num_chunks": 99999999999999999999}', "line 3: num_chunks"),
        ('{"idx": 2, "length": 1, "tok_len": 1, "num_chunks": 1, "text": 7}', "line 3: text is not text"),
        ("", "line 3 is not there"),
    ],
)
def test_metadata_that_is_none_is_refused(copied: Path, line: str, message: str) -> None:
    path = copied / "shards/meta-00000.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = open_reference_index(copied)
    with pytest.raises(IntegrityError, match=f"meta-00000.jsonl: {message}"):
        found.rows_of(0)
    lines[2:3] = []
    path.write_text("\n".join(lines[:199]) + "\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"meta-00000\.jsonl: line 3: idx"):
        found.rows_of(0)


def test_metadata_with_too_many_lines_or_odd_text(copied: Path) -> None:
    path = copied / "shards/meta-00002.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "text": "half \ud83d", "label": {"kind": 1}})
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    first = open_reference_index(copied).rows_of(2).row(0, named=True)
    assert first["text"] == "half ?" and first["label"] == '{"kind": 1}'
    path.write_text("\n".join([*lines, lines[-1]]) + "\n", encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"meta-00002\.jsonl has more than 163 lines"):
        open_reference_index(copied).rows_of(2)


def _spoil(change: Callable[[dict[str, npt.NDArray[Any]]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with np.load(path, allow_pickle=False) as found:
            arrays = dict(found)
        change(arrays)
        np.savez(path, **arrays)

    return spoil


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("h_out_dim", "h_buckets"):
            array = np.array(16, np.int64) if name == "h_out_dim" else np.zeros(50_000_000, np.int32)
            archive.writestr(f"{name}.npy", _npy(array))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged", id="truncated"),
        pytest.param(_spoil(lambda arrays: arrays.pop("r_signs")), "has no array r_signs", id="lacks"),
        pytest.param(_spoil(lambda arrays: arrays.update(g_out_dim=np.array(9))), "g_out_dim is 9", id="width"),
        pytest.param(
            _spoil(lambda arrays: arrays.update(h_buckets=arrays["h_buckets"] + 16)),
            "h_buckets has entries",
            id="bucket",
        ),
        pytest.param(_spoil(lambda arrays: arrays.update(r_signs=arrays["r_signs"] * 0)), "r_signs has", id="sign"),
        pytest.param(
            _spoil(lambda arrays: arrays.update(h_out_dim=np.array({"a": 1}, dtype=object))),
            "pickled|bytes",
            id="pickle",
        ),
        pytest.param(_bomb, "h_buckets has 200,000,128 bytes", id="bomb"),
    ],
)
def test_tables_that_are_none_are_refused(copied: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copied / "projections.npz")
    with pytest.raises(IntegrityError, match=rf"projections\.npz.*({message})"):
        open_reference_index(copied)


def test_a_folder_that_is_no_index_is_refused(tmp_path: Path, copied: Path) -> None:
    for folder, kind, message in (
        (tmp_path / "nowhere", ConfigError, "is not a folder"),
        ("s3://bucket/index", ConfigError, "is not a folder"),
        (tmp_path, IntegrityError, "it is no index directory"),
    ):
        with pytest.raises(kind, match=message):
            open_reference_index(folder)
    (copied / "build_plan.json").unlink()
    with pytest.raises(IntegrityError, match=r"build_plan\.json is missing"):
        open_reference_index(copied)


def _refused(curated: Curated, tmp_path: Path, folder: Path, *, kind: type[CurationError], message: str,
             config: Mapping[str, Any] | None = None, **options: Any) -> None:  # fmt: skip
    """An import that is refused and writes nothing."""
    store, plain = curated.elsewhere(tmp_path)
    with pytest.raises(kind, match=message):
        import_reference_index(store, plain.model_copy(update=dict(config or {})), folder, **options)
    assert not list(store.list("indexes"))


def test_other_models_are_refused(curated: Curated, tmp_path: Path, copied: Path) -> None:
    head = json.loads((copied / "manifest.json").read_text(encoding="utf-8"))["attrs"]["model"]
    for name in ("vocab_size", "hidden_dim"):
        other = handmade_of(curated, tmp_path / name, **{name: head[name] + 1})
        _refused(curated, tmp_path / f"{name}-store", other, kind=ModelError, message=rf"attrs\.model\.{name} is")
    probe = [value + 0.1 for value in head["unembedding_probe"]]
    both = (copied / "manifest.json", copied / "build_plan.json")
    edit(both[0], put("attrs.model.unembedding_probe", probe), both[1])
    _refused(
        curated, tmp_path / "probe", copied, kind=ModelError, message=r"unembedding_probe differs .* by up to 0\.1"
    )
    edit(both[0], put("attrs.model.unembedding_probe", None), both[1])
    vectors = np.concatenate([np.load(copied / f"shards/vectors-{number:05d}.npy") for number in range(3)])
    rolled = np.roll(vectors, 2, axis=1)  # such vectors another model could have made
    for number in range(3):
        path = copied / f"shards/vectors-{number:05d}.npy"
        path.write_bytes(_npy(rolled[200 * number : 200 * number + 200]))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        edit(both[0], put(f"shards.{number}.sha256", sha256))
    message = (
        r"32 of 32 rows that were computed .* below 0\.999 .*lowest -?0\.\d+, median -?0\.\d+\); nothing was written"
    )
    _refused(curated, tmp_path / "sample", copied, kind=ModelError, message=message)


def test_other_sketches_data_and_tables_are_refused(curated: Curated, tmp_path: Path) -> None:
    sketch = curated.config.sketch.model_copy(update={"temperature": 0.5})
    _refused(curated, tmp_path / "a", curated.exported, kind=ConfigError, config={"sketch": sketch},
             message=r"has sketch\.temperature 1\.0, configured is 0\.5")  # fmt: skip
    unused = curated.config.sketch.model_copy(update={"weight_rg": 0.9})
    store, config = curated.elsewhere(tmp_path / "b")
    done = import_reference_index(store, config.model_copy(update={"sketch": unused}), curated.exported)
    assert done.index_id != curated.identity and done.rows_imported == 562  # another name for the same vectors
    write_lines(tmp_path / "pool.jsonl", [{"text": "another corpus"}])
    other = config.corpus.model_copy(update={"name": "other", "sources": (str(tmp_path / "pool.jsonl"),)})
    elsewhere = config.model_copy(update={"corpus": other})
    ingest_corpus(store, elsewhere, run_id="run")
    with pytest.raises(SourceError, match=r"has no object with the bytes of pool\.jsonl"):
        import_reference_index(store, elsewhere, curated.exported)


def test_tables_are_taken_as_stored_and_must_be_those_of_our_index(curated: Curated, tmp_path: Path) -> None:
    made = handmade_of(curated, tmp_path / "made")
    with np.load(made / "projections.npz", allow_pickle=False) as found:
        arrays = dict(found)
    arrays["h_signs"] = -arrays["h_signs"]  # as another generator would draw them
    np.savez(made / "projections.npz", **arrays)
    digest = hashlib.sha256(b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))).hexdigest()
    edit(made / "manifest.json", put("attrs.projections_sha256", digest), made / "build_plan.json")
    vectors = open_reference_index(made).signer(curated.config.model, memory=2**30, any_name=True)
    assert not torch.equal(vectors.tables.h.signs, open_signer(curated.store, curated.config).tables.h.signs)
    with pytest.raises(IntegrityError, match=r"projections\.npz holds other tables than our index"):
        import_reference_index(curated.store, curated.config, made, any_name=True)
    store, config = curated.elsewhere(tmp_path)
    with pytest.raises(ModelError, match="have a cosine below"):  # signed with the other tables
        import_reference_index(store, config, made, any_name=True)
    for number, shard in enumerate(open_reference_index(made).shards):
        path = made / shard.file
        path.write_bytes(_npy(-np.load(path)))  # what these tables make: every entry has one factor h
        edit(made / "manifest.json", put(f"shards.{number}.sha256", hashlib.sha256(path.read_bytes()).hexdigest()))
    assert import_reference_index(store, config, made, any_name=True).rows_imported == 562
    identity = index_id(model_fingerprint(config.model), config.sketch)
    rows_of = block_rows(store, open_corpus(store, config))
    assert list_indexed(store, identity, rows_of, dim=DIM) == set(rows_of)


@pytest.mark.parametrize(
    "sketch",
    [
        SketchConfig(),
        SketchConfig(channels=("rh",)),
        SketchConfig(channels=("rh",), dim_r=200, seed=7),
        SketchConfig(channels=("rh", "gh", "rg"), temperature=0.7, weight_rg=0.25, mass=0.8),
        SketchConfig(channels=("gh",), adaptive_support=False, top_k=32),
    ],
)
def test_configurations_have_counterparts(sketch: SketchConfig) -> None:
    there = from_sketch(sketch)
    assert to_sketch(there, where="x") == sketch
    assert to_sketch({"fusion_mode": "rh"}, where="x").dim_r == 160
    assert effective(sketch) == effective(to_sketch(there, where="x"))


def test_another_order_of_channels_has_none() -> None:
    with pytest.raises(ConfigError, match="in the order rh, gh, rg"):
        from_sketch(SketchConfig(channels=("gh", "rh")))


def test_commands(
    curated: Curated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.cli import main

    def curate(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["curate", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    path = curated.file.parents[1] / "curate.yaml"
    code, out, _ = curate("export-index", path, tmp_path / "out", "--block-size", "500", "--without-model", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["shards"] == 2
    assert open_reference_index(tmp_path / "out").model.unembedding_probe is None
    store, _ = curated.elsewhere(tmp_path)
    code, out, _ = curate("import", path, tmp_path / "out", "--set", f"store={store.uri}", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["rows_imported"] == 562
    code, out, _ = curate("import", path, tmp_path / "out", "--set", f"store={store.uri}")
    assert code == 0 and "562 were there" in " ".join(out.split())
    (tmp_path / "out/manifest.json").unlink()
    code, _, err = curate("import", path, tmp_path / "out")
    assert code == 1 and "manifest.json is missing" in err and "Traceback" not in err
    assert isinstance(open_reference_index(curated.exported), ReferenceIndex)
