"""SimHash codes: a rotation, its signs, and what they say of inner products."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rise_ops import code_search
from rise_ops.code_search import CodeScorer
from rise_ops.errors import IntegrityError
from rise_ops.simhash import SimHash, hadamard, scale, standard_error


def _unit(rows: int, dim: int, seed: int = 0) -> npt.NDArray[np.float32]:
    x = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize("n", [2, 8, 32, 64, 1024, 2048])
def test_the_transform_is_walsh_and_hadamards(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float32)
    entries = [[-1.0 if (row & column).bit_count() % 2 else 1.0 for column in range(n)] for row in range(n)]
    expected = x.double().numpy() @ np.array(entries)
    np.testing.assert_allclose(hadamard(x).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(("dim", "bits"), [(1024, 1024), (640, 1024), (640, 2048)])
def test_a_whole_rotation_keeps_inner_products(dim: int, bits: int) -> None:
    x = _unit(5, dim)
    z = SimHash.from_seed(dim, bits, 1).project(x)
    np.testing.assert_allclose(z @ z.T / bits, x @ x.T, atol=1e-5)


def test_codes_are_the_signs_most_significant_bit_first() -> None:
    simhash = SimHash.from_seed(640, 512, 7)
    x = _unit(300, 640)
    codes = simhash.codes(x.astype(np.float16))
    assert codes.shape == (300, 64)
    expected = simhash.project(x.astype(np.float16)) > 0
    assert (np.unpackbits(codes, axis=1).astype(bool) == expected).all()


def test_the_estimate_is_unbiased_and_as_sure_as_it_says() -> None:
    """Also for vectors with few entries, which one round alone would leave uneven."""
    dim, bits, seeds = 512, 256, 400
    sparse = np.zeros((2, dim), np.float32)
    sparse[0, 3], sparse[1, [3, 400]] = 1, np.float32(np.sqrt(0.5))
    x = np.concatenate([_unit(4, dim), sparse])
    q = np.concatenate([_unit(2, dim, 5) * 2, x[:2] * 0.5 + _unit(2, dim, 6) * 0.5, sparse[:1]])
    found = []
    for seed in range(seeds):
        simhash = SimHash.from_seed(dim, bits, seed)
        signs = np.unpackbits(simhash.codes(x), axis=1).astype(np.float32) * 2 - 1
        found.append(scale(bits) * signs @ simhash.project(q).T)
    error = np.stack(found) - x @ q.T
    most = np.array([standard_error(bits, query_norm=float(norm)) for norm in np.linalg.norm(q, axis=1)])
    spread = error.std(axis=0)
    assert (spread <= 1.15 * most).all()
    assert (np.abs(error.mean(axis=0)) < 4.5 * most / np.sqrt(seeds)).all()


def test_the_estimate_is_linear_in_the_query() -> None:
    simhash = SimHash.from_seed(512, 256, 0)
    q = _unit(7, 512)
    np.testing.assert_allclose(simhash.project(q.mean(axis=0)[None]), simhash.project(q).mean(axis=0)[None], atol=1e-5)


def test_parameters_survive_storage_and_name_themselves() -> None:
    simhash = SimHash.from_seed(640, 512, 7)
    again = SimHash.from_bytes(simhash.to_bytes(), where="here")
    assert again.identity == simhash.identity
    assert simhash.identity != SimHash.from_seed(640, 512, 8).identity
    x = _unit(3, 640)
    assert (again.codes(x) == simhash.codes(x)).all()


@pytest.mark.parametrize("damage", ["cut", "pickle", "picks", "dim", "shape"])
def test_damaged_parameters_are_refused(damage: str) -> None:
    simhash = SimHash.from_seed(640, 512, 7)
    data = simhash.to_bytes()
    if damage == "cut":
        data = data[:-100]
    elif damage == "pickle":
        data = b"\x80\x04N."
    elif damage == "picks":
        data = SimHash(simhash.signs, simhash.picks + 10_000, 640).to_bytes()
    elif damage == "dim":
        data = SimHash(simhash.signs, simhash.picks, 2_000).to_bytes()
    else:
        data = SimHash(simhash.signs[:, :1], simhash.picks, 640).to_bytes()
    with pytest.raises(IntegrityError, match=r"here holds parameters|here does not hold"):
        SimHash.from_bytes(data, where="here")


@pytest.mark.parametrize("rows", [1, 31, 500])
def test_products_in_float_are_those_of_integers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(rows)
    codes = generator.integers(0, 256, (rows, 1_024 // 8), dtype=np.uint8)
    queries = generator.standard_normal((3, 1_024), dtype=np.float32)
    found = []
    for has_int8 in (True, False):
        monkeypatch.setattr(code_search, "multiplies_int8", lambda there=has_int8: there)
        found.append(CodeScorer(queries).score(codes))
    np.testing.assert_array_equal(found[0], found[1])
    signs = np.unpackbits(codes, axis=1).astype(np.float64) * 2 - 1
    rounding = np.abs(queries).max(axis=1) / 254 * np.sqrt(1_024) * 5
    assert (np.abs(found[0] / scale(1_024) - signs @ queries.T) < rounding).all()
