"""Inner products of stored signatures with queries, on the CPU: float16 rows, widened in the registers.

A row is widened to float32 on its way from the cache to the multiplication, for as many queries at a time as there are
registers for; nothing is written in between. With one query that takes 0.022 s of a core for a gigabyte of rows that
are in its cache, where widening with PyTorch and its matrix product take 0.24; with ten 0.15 instead of 0.60, with a
hundred 1.45 instead of 1.64 (AMD EPYC with AVX2, rows of 24,576). Matrix products catch up with the queries, and BLAS
knows wider vectors than the compiler takes (AVX-512): where there are some, it gets more than `_FEW_QUERIES`.

Products are exact in float32 up to its rounding; sums are float32, in an order that depends on nothing but the numbers
of rows and queries.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from rise_ops.compiled import compiled

_FEW_QUERIES = 64


def are_faster(queries: int) -> bool:
    """Whether this processor is better served by these products than by matrix products of widened rows.

    It has to widen float16 in an instruction: F16C on x86, which came with AVX2; ARM always does.
    """
    features = _features()
    return "widens" in features and ("wide" not in features or queries <= _FEW_QUERIES)


def multiplies_int8() -> bool:
    """Whether this processor has the instructions that PyTorch multiplies integers of 8 bits with."""
    return "int8" in _features()


@lru_cache(1)
def _features() -> frozenset[str]:
    found = binding.get_host_cpu_features()
    widens = found.get("f16c") or binding.get_process_triple().startswith("aarch64")
    there = {"widens": widens, "wide": found.get("avx512f"), "int8": found.get("avx512vnni")}
    return frozenset(name for name, is_there in there.items() if is_there)


def inner_products(rows: npt.NDArray[np.float16], queries: npt.NDArray[np.float32], out: npt.NDArray[np.float32],
                   ) -> None:  # fmt: skip
    """`out[rows, queries] = rows[rows, dim] · queries[queries, dim]`. Other threads run meanwhile.

    Parameters
    ----------
    rows, queries
        Each in one piece.
    """
    _multiply(rows.view(np.uint16), queries, out)


def _widen(context: Any, half: Any) -> Any:
    """The float32 that the bits of a float16 stand for."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


_widened: Any = intrinsic(_widen)


@compiled
def _multiply(rows: Any, queries: Any, out: Any) -> None:
    """Two rows by five queries at a time, whose ten sums fill the registers; then four rows by one query.

    Where rows are left over, the last one stands for those that are missing.
    """
    last, count = rows.shape[0] - 1, queries.shape[0]
    zero = np.float32(0)
    for k in range(0, count - 4, 5):
        v0, v1, v2, v3, v4 = queries[k], queries[k + 1], queries[k + 2], queries[k + 3], queries[k + 4]
        for r in range(0, last + 1, 2):
            second = min(r + 1, last)
            x, y = rows[r], rows[second]
            a0 = a1 = a2 = a3 = a4 = b0 = b1 = b2 = b3 = b4 = zero
            for i in range(x.shape[0]):
                xi, yi = _widened(x[i]), _widened(y[i])
                a0 += xi * v0[i]
                a1 += xi * v1[i]
                a2 += xi * v2[i]
                a3 += xi * v3[i]
                a4 += xi * v4[i]
                b0 += yi * v0[i]
                b1 += yi * v1[i]
                b2 += yi * v2[i]
                b3 += yi * v3[i]
                b4 += yi * v4[i]
            out[r, k], out[r, k + 1], out[r, k + 2], out[r, k + 3], out[r, k + 4] = a0, a1, a2, a3, a4
            out[second, k], out[second, k + 1], out[second, k + 2], out[second, k + 3], out[second, k + 4] = (
                b0, b1, b2, b3, b4,
            )  # fmt: skip
    for k in range(count - count % 5, count):
        query = queries[k]
        for r in range(0, last + 1, 4):
            second, third, fourth = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            w, x, y, z = rows[r], rows[second], rows[third], rows[fourth]
            a = b = c = d = zero
            for i in range(w.shape[0]):
                q = query[i]
                a += _widened(w[i]) * q
                b += _widened(x[i]) * q
                c += _widened(y[i]) * q
                d += _widened(z[i]) * q
            out[r, k], out[second, k], out[third, k], out[fourth, k] = a, b, c, d
