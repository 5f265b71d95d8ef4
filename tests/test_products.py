"""Products of float16 rows, with and without their checksum, as processors of several kinds compute them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from rise_ops import products
from rise_ops.products import checked_products, inner_products

_WITHOUT_AVX512 = """
from llvmlite import binding

features = binding.get_host_cpu_features()
features.update({name: False for name in features if "avx512" in name})
binding.get_host_cpu_features = lambda: features
from rise_ops import products
from tests import test_products

assert products._LANES == 8
for case in test_products.CASES:
    test_products.check(*case)
"""
CASES = [(rows, dim, queries) for rows in (1, 3, 4, 41) for dim in (3, 64, 1_100, 2_064) for queries in (1, 2, 5, 23)]


def check(rows: int, dim: int, queries: int) -> None:
    """Products are exact up to float32's rounding, checksums those of another library."""
    numbers = np.random.default_rng(rows * dim + queries)
    left = numbers.normal(size=(rows, dim)).astype(np.float16)
    right = numbers.normal(size=(queries, dim)).astype(np.float32)
    found, checked = np.full((2, rows, queries), np.nan, np.float32)
    inner_products(left, right, found)
    exact = left.astype(np.float64) @ right.T.astype(np.float64)
    size = np.abs(left.astype(np.float64)) @ np.abs(right.T.astype(np.float64))
    assert (np.abs(found - exact) <= 2**-20 * size).all()
    left.flags.writeable = False  # as what is mapped
    assert checked_products(left, right, checked) == google_crc32c.value(left.tobytes())
    np.testing.assert_array_equal(checked, found)


@pytest.mark.parametrize(("rows", "dim", "queries"), CASES)
def test_products_and_checksums(rows: int, dim: int, queries: int) -> None:
    check(rows, dim, queries)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 6e-8])
def test_special_numbers_stay_what_they_are(value: float) -> None:
    rows, queries = np.zeros((9, 64), np.float16), np.ones((7, 64), np.float32)
    rows[4, 33] = value
    out = np.empty((9, 7), np.float32)
    checked_products(rows, queries, out)
    np.testing.assert_array_equal(out[4], np.full(7, np.float32(rows[4, 33])))
    assert not out[[0, 1, 2, 3, 5, 6, 7, 8]].any()


@pytest.mark.parametrize("multiply", [inner_products, checked_products])
def test_nothing_is_asked_of_no_queries_and_no_rows(multiply: Callable[..., object]) -> None:
    rows, queries = np.ones((8, 64), np.float16), np.ones((3, 64), np.float32)
    multiply(rows, queries[:0], np.empty((8, 0), np.float32))
    multiply(rows[:0], queries, np.empty((0, 3), np.float32))


@pytest.mark.parametrize("multiply", [inner_products, checked_products])
def test_what_does_not_fit_together_is_refused(multiply: Callable[..., object]) -> None:
    rows, queries, out = np.ones((8, 64), np.float16), np.ones((3, 64), np.float32), np.empty((8, 3), np.float32)
    for wrong in ((rows[:, :32].copy(), queries, out), (rows, queries, out[1:]), (rows, queries[1:], out)):
        with pytest.raises(ValueError, match="do not fit together"):
            multiply(*wrong)
    with pytest.raises(ValueError, match="in one piece"):
        multiply(np.ones((16, 64), np.float16)[::2], queries, out)


@pytest.mark.parametrize("queries", [1, 5, 12, 40])
def test_the_score_of_a_row_does_not_depend_on_what_is_beside_it(queries: int) -> None:
    numbers = np.random.default_rng(0)
    rows = numbers.normal(size=(50, 2_048)).astype(np.float16)
    wanted = numbers.normal(size=(queries, 2_048)).astype(np.float32)
    whole, part = np.empty((50, queries), np.float32), np.empty((7, 1), np.float32)
    checked_products(rows, wanted, whole)
    checked_products(rows[11:18], wanted[-1:], part)
    np.testing.assert_array_equal(part[:, 0], whole[11:18, -1])


@pytest.mark.parametrize("features", [{"widens"}, set()], ids=["no checksums", "nothing"])
def test_processors_without_the_instructions_give_the_same(features: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_features", lambda: frozenset(features))
    for case in CASES:
        check(*case)


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other registers are those of x86")
def test_narrower_registers_give_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_AVX512],
        cwd=Path(__file__).parents[1], env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
