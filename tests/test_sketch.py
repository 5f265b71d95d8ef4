"""CountSketch and the stored tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rise_ops.config import SketchConfig
from rise_ops.errors import IntegrityError, MissingObjectError
from rise_ops.sketch import CountSketch, SketchTables, load_tables
from rise_ops.store import Store

_GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))
_SMALL = SketchConfig(dim_r=8, dim_h=4, dim_g=6)


@pytest.mark.parametrize("path", _GOLDEN, ids=lambda path: path.stem)
def test_tables_are_bit_identical_with_the_reference(path: Path) -> None:
    golden = np.load(path)
    config = SketchConfig(**json.loads(str(golden["config"])))
    vocab_size, hidden_dim = golden["unembedding"].shape
    tables = SketchTables.from_config(config, hidden_dim=hidden_dim, vocab_size=vocab_size)
    for name, array in tables.arrays().items():
        assert np.array_equal(array, golden[name])


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32))
def test_sketch_is_the_loop_and_the_matrix(n_in: int, n_out: int, seed: int) -> None:
    sketch = CountSketch.from_seed(n_in, n_out, seed)
    x = torch.randn(3, n_in, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(3, n_out)
    for i in range(n_in):
        expected[:, sketch.buckets[i]] += sketch.signs[i] * x[:, i]
    torch.testing.assert_close(sketch(x), expected)
    torch.testing.assert_close(x @ sketch.matrix(), expected)


def test_tables_survive_the_store(store: Store) -> None:
    tables = SketchTables.from_config(_SMALL, hidden_dim=10, vocab_size=30)
    tables.save(store, "indexes/x/tables.zarr")
    tables.save(store, "indexes/x/tables.zarr")
    found = load_tables(store, "indexes/x/tables.zarr")
    assert found.sha256 == tables.sha256
    assert found.widths == {"h": 4, "g": 6, "r": 8}
    assert torch.equal(found.r.buckets, tables.r.buckets) and torch.equal(found.r.signs, tables.r.signs)


def test_other_tables_are_not_overwritten(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    SketchTables.from_config(_SMALL, hidden_dim=10, vocab_size=30).save(store, "t")
    other = SketchTables.from_config(_SMALL.model_copy(update={"seed": 1}), hidden_dim=10, vocab_size=30)
    with pytest.raises(IntegrityError, match="other sketch tables"):
        other.save(store, "t")


def test_a_write_that_was_cut_off_is_missing_and_is_completed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tables = SketchTables.from_config(_SMALL, hidden_dim=10, vocab_size=30)
    tables.save(store, "t")
    (tmp_path / "t" / "zarr.json").unlink()
    (tmp_path / "t" / "r_signs" / "c" / "0").unlink()
    with pytest.raises(MissingObjectError, match="not in the store"):
        load_tables(store, "t")
    tables.save(store, "t")
    assert load_tables(store, "t").sha256 == tables.sha256


def test_a_lost_chunk_is_noticed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    SketchTables.from_config(_SMALL, hidden_dim=10, vocab_size=30).save(store, "t")
    (tmp_path / "t" / "h_signs" / "c" / "0").unlink()
    with pytest.raises(IntegrityError, match="checksum"):
        load_tables(store, "t")


def test_no_tables(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="not in the store"):
        load_tables(Store(str(tmp_path)), "t")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    SketchTables.from_config(_SMALL, hidden_dim=10, vocab_size=30).save(store, "t")
    group = tmp_path / "t" / "zarr.json"
    document = json.loads(group.read_text())
    document["attributes"]["format_version"] = 2
    group.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="upgrade"):
        load_tables(store, "t")
