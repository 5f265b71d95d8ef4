"""Inner products of stored signatures with queries, on the CPU: float16 rows, widened in the registers.

A row is widened to float32 on its way from memory to the multiplication, for as many queries at a time as there are
registers for; nothing is written in between. Some columns of some rows are multiplied with all queries before the next
ones, so that both stay in the caches, however many queries there are. A vector has as many lanes as the processor's
registers: 16 with AVX-512, 8 with AVX2, 4 on ARM. Seconds of a core for a gigabyte of rows of 24,576 in its cache with
1, 10 and 100 queries: 0.05, 0.11, 0.89; widening with PyTorch and its matrix product take 0.30, 0.36, 1.57 (Intel Xeon
with AVX-512, `tests.benchmarks.products`).

Products are exact in float32 up to its rounding. Sums are float32, one for each lane and part of the columns, in an
order that depends on the processor and the number of columns alone: the score of a row does not change with the rows
and queries beside it. (A processor that cannot widen float16 takes NumPy's products, whose order is its own.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, codegen, config
from numba.extending import intrinsic

from rise_ops.checksums import combine_crc32c, crc32c
from rise_ops.compiled import compiled
from rise_ops.memory import TILE_ROWS

_COLUMNS = 1_024
"""Multiplied with all queries before the next ones."""
_FEW_QUERIES = 16
_TILE_BYTES = 3 * 2**16
"""Of each part of the rows, multiplied with few queries before the next ones; with many, of `_COLUMNS` of them."""


def multiplies_int8() -> bool:
    """Whether this processor has the instructions that PyTorch multiplies integers of 8 bits with."""
    return bool(binding.get_host_cpu_features().get("avx512vnni"))


@lru_cache(1)
def _features() -> frozenset[str]:
    """What may be compiled: of this processor, or of the one that NUMBA_CPU_NAME or NUMBA_CPU_FEATURES ask for."""
    asked = vars(config)["CPU_FEATURES"]
    found = set((codegen.get_host_cpu_features() if asked is None else asked).split(","))
    is_arm = binding.get_process_triple().startswith("aarch64")
    there = {
        "arm": is_arm,
        "widens": is_arm or {"+f16c", "+fma"} <= found,
        "sums": ("+crc" if is_arm else "+sse4.2") in found,
        "wide": "+avx512f" in found,
    }
    return frozenset(name for name, is_there in there.items() if is_there)


def inner_products(rows: npt.NDArray[np.float16], queries: npt.NDArray[np.float32], out: npt.NDArray[np.float32],
                   ) -> None:  # fmt: skip
    """`out[rows, queries] = rows[rows, dim] · queries[queries, dim]`. Other threads run meanwhile.

    Parameters
    ----------
    rows, queries, out
        Each in one piece.

    Raises
    ------
    ValueError
        They do not fit together, or are not in one piece.
    """
    _refuse_misfits(rows, queries, out)
    if "widens" not in _features():
        for start in range(0, len(rows), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            np.matmul(rows[tile].astype(np.float32), queries.T, out=out[tile])
        return
    out[:] = 0
    halves, tile_rows = _bits(rows), _PARTS * _tile_rows(rows, queries)
    for start in range(0, len(rows), tile_rows):
        _multiply(halves, queries, out, start, min(start + tile_rows, len(rows)), 0)


def checked_products(rows: npt.NDArray[np.float16], queries: npt.NDArray[np.float32], out: npt.NDArray[np.float32],
                     ) -> int:  # fmt: skip
    """`inner_products`, and the CRC-32C of the rows' bytes, taken while they are in the registers.

    A processor's instruction for it gives a result every cycle, but each only after three, so several parts of the
    rows are gone through together. Multiplications take other parts of the processor: one hides behind the other.
    """
    _refuse_misfits(rows, queries, out)
    part = len(rows) // _PARTS
    if not {"widens", "sums"} <= _features() or not part or rows.shape[1] % _LANES or not len(queries):
        inner_products(rows, queries, out)
        return crc32c(rows.reshape(-1).view(np.uint16).data)
    out[:] = 0
    halves, sums = _bits(rows), np.full(_PARTS, _ONES, np.uint64)
    _multiply_and_sum(halves, queries, out, part, _tile_rows(rows, queries), sums)
    _multiply(halves, queries, out, _PARTS * part, len(rows), 0)
    value, size = int(sums[0]) ^ _ONES, part * rows.shape[1] * rows.itemsize
    for each in sums[1:]:
        value = combine_crc32c(value, int(each) ^ _ONES, size)
    return crc32c(halves.reshape(-1)[_PARTS * part * rows.shape[1] :].data, value)


def _tile_rows(rows: npt.NDArray[np.float16], queries: npt.NDArray[np.float32]) -> int:
    """Rows of each part that are multiplied with all queries before the next ones."""
    width = rows.shape[1] if len(queries) <= _FEW_QUERIES else min(rows.shape[1], _COLUMNS)
    return max(1, _TILE_BYTES // max(1, 2 * int(width)))


def _refuse_misfits(*arrays: npt.NDArray[Any]) -> None:
    """The compiled functions look at no shape."""
    rows, queries, out = arrays
    if rows.shape[1:] != queries.shape[1:] or out.shape != (len(rows), len(queries)):
        raise ValueError(f"{rows.shape} rows, {queries.shape} queries and {out.shape} products do not fit together")
    if not all(array.flags.c_contiguous for array in arrays):
        raise ValueError("rows, queries and products must each be in one piece")


def aligned(queries: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A copy that begins at a line of the cache: a vector that lies across two is loaded in twice the time."""
    room = np.empty(queries.size + _LINE // 4, np.float32)
    skip = -room.ctypes.data % _LINE // 4
    found = room[skip : skip + queries.size].reshape(queries.shape)
    found[:] = queries
    return found


def _bits(rows: npt.NDArray[np.float16]) -> npt.NDArray[np.uint16]:
    found = rows.view(np.uint16)
    found.flags.writeable = False  # compiled for one type
    return found


_LANES = 16 if "wide" in _features() else 4 if "arm" in _features() else 8
_ROWS, _QUERIES = (4, 5) if _LANES != 8 else (2, 5)
"""Their sums, the rows and a query fill the registers: 32, or 16 with AVX2."""
_ROWS_OF_ONE = 8 if _LANES != 8 else 4
_PARTS, _SUMMED = (4, 5) if _LANES != 8 else (4, 2)
"""Rows whose checksums are taken together, and queries that they are multiplied with meanwhile."""
_ONES = 2**32 - 1
_LINE = 64


def _emit(context: Any, builder: Any, signature: Any, arguments: Any, rows: int, queries: int, step: Any, sums: Any,
          ) -> Any:  # fmt: skip
    """Add the products of rows and queries, over some columns, to `out`; with `sums` go on with checksums of the rows.

    In the compiler's own language, as vectors of 16 lanes are not made of loops otherwise: it holds AVX-512 for slow.

    Parameters
    ----------
    rows, queries
        How many.
    step
        From one row to the next.
    sums
        Pointer to a checksum, 64 bits, of each row's part of the rows; or None.
    """
    vector, halves = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.HalfType(), _LANES)
    long = ir.IntType(64)
    arrays = [context.make_array(signature.args[place])(context, builder, arguments[place]) for place in (0, 2, 4)]
    lengths = [cgutils.unpack_tuple(builder, array.shape)[1] for array in arrays]
    _, first, _, other, _, begin, end = arguments[:7]

    def place(which: int, number: Any, column: Any, kind: Any) -> Any:
        pointer = builder.gep(arrays[which].data, [builder.add(builder.mul(number, lengths[which]), column)])
        return builder.bitcast(pointer, kind.as_pointer())

    def constant(number: int) -> Any:
        return ir.Constant(long, number)

    own_rows = [builder.add(first, builder.mul(step, constant(r))) for r in range(rows)]
    own_queries = [builder.add(other, constant(k)) for k in range(queries)]
    fused = ir.FunctionType(vector, [vector] * 3)
    reduced = ir.FunctionType(ir.FloatType(), [ir.FloatType(), vector])
    fma = cgutils.get_or_insert_function(builder.module, fused, f"llvm.fma.v{_LANES}f32")
    add = cgutils.get_or_insert_function(builder.module, reduced, f"llvm.vector.reduce.fadd.v{_LANES}f32")
    totals = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(rows * queries)]
    states = [cgutils.alloca_once_value(builder, builder.load(builder.gep(sums, [constant(r)])))
              for r in range(rows)] if sums else []  # fmt: skip
    with cgutils.for_range_slice(builder, begin, end, constant(_LANES)) as (column, _):
        wide = [builder.fpext(builder.load(place(0, row, column, halves), align=2), vector) for row in own_rows]
        for k, query in enumerate(own_queries):
            own = builder.load(place(1, query, column, vector), align=4)
            for r in range(rows):
                held = totals[r * queries + k]
                builder.store(builder.call(fma, [wide[r], own, builder.load(held)]), held)
        for word in range(0, _LANES, 4):
            for r, state in enumerate(states):
                at = place(0, own_rows[r], builder.add(column, constant(word)), long)
                builder.store(_crc_step(builder, builder.load(state), builder.load(at, align=2)), state)
    for r, row in enumerate(own_rows):
        for k, query in enumerate(own_queries):
            total = builder.call(add, [ir.Constant(ir.FloatType(), 0.0), builder.load(totals[r * queries + k])],
                                 fastmath=("reassoc",))  # fmt: skip
            target = place(2, row, query, ir.FloatType())
            builder.store(builder.fadd(builder.load(target), total), target)
    for r, state in enumerate(states):
        builder.store(builder.load(state), builder.gep(sums, [constant(r)]))
    return context.get_dummy_value()


def _block(rows: int, queries: int) -> Any:
    """A function that adds the products of so many rows, one after the other, and queries, over some columns."""

    def multiply(context: Any, x: Any, row: Any, q: Any, query: Any, out: Any, start: Any, stop: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return _emit(context, builder, signature, arguments, rows, queries, ir.Constant(ir.IntType(64), 1), None)

        return types.void(x, types.intp, q, types.intp, out, types.intp, types.intp), generate

    return intrinsic(multiply)


def _summed_block(queries: int) -> Any:
    """The same of a row of each part, `step` rows from each other, whose checksums go on."""

    def multiply(context: Any, x: Any, row: Any, q: Any, query: Any, out: Any, start: Any, stop: Any, step: Any,
                 sums: Any) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            held = context.make_array(signature.args[8])(context, builder, arguments[8]).data
            return _emit(context, builder, signature, arguments, _PARTS, queries, arguments[7], held)

        return types.void(x, types.intp, q, types.intp, out, types.intp, types.intp, types.intp, sums), generate

    return intrinsic(multiply)


def _crc_step(builder: Any, state: Any, word: Any) -> Any:
    """The checksum after 8 bytes more, by the processor's instruction."""
    long, short = ir.IntType(64), ir.IntType(32)
    if "arm" in _features():
        kind = ir.FunctionType(short, [short, long])
        step = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.crc32cx")
        return builder.zext(builder.call(step, [builder.trunc(state, short), word]), long)
    kind = ir.FunctionType(long, [long, long])
    step = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse42.crc32.64.64")
    return builder.call(step, [state, word])


def _widen(context: Any, half: Any) -> Any:
    """The float32 that the bits of a float16 stand for."""

    def generate(_: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


_widened: Any = intrinsic(_widen)
_several, _rows_alone, _queries_alone, _one = (
    _block(_ROWS, _QUERIES), _block(_ROWS_OF_ONE, 1), _block(1, _QUERIES), _block(1, 1)
)  # fmt: skip
_several_summed, _one_summed = _summed_block(_SUMMED), _summed_block(1)


@compiled
def _multiply(rows: Any, queries: Any, out: Any, first: int, last: int, done: int) -> None:
    """Add the products of some rows with all queries but the first to `out`: some columns at a time, in blocks."""
    count, width = queries.shape
    whole = width - width % _LANES
    grouped = done + (count - done) // _QUERIES * _QUERIES
    for start in range(0, whole, _COLUMNS):
        stop = min(start + _COLUMNS, whole)
        for k in range(done, grouped, _QUERIES):
            r = first
            while r + _ROWS <= last:
                _several(rows, r, queries, k, out, start, stop)
                r += _ROWS
            while r < last:
                _queries_alone(rows, r, queries, k, out, start, stop)
                r += 1
        for k in range(grouped, count):
            r = first
            while r + _ROWS_OF_ONE <= last:
                _rows_alone(rows, r, queries, k, out, start, stop)
                r += _ROWS_OF_ONE
            while r < last:
                _one(rows, r, queries, k, out, start, stop)
                r += 1
    for r in range(first, last):
        for k in range(done, count):
            total = out[r, k]
            for i in range(whole, width):
                total += _widened(rows[r, i]) * queries[k, i]
            out[r, k] = total


@compiled
def _multiply_and_sum(rows: Any, queries: Any, out: Any, part: int, tile: int, sums: Any) -> None:
    """Some rows of each part at a time: their checksums and products with the first queries, then with the others."""
    count, width = queries.shape
    done = _SUMMED if count >= _SUMMED else 1
    for first in range(0, part, tile):
        last = min(first + tile, part)
        for r in range(first, last):
            for start in range(0, width, _COLUMNS):
                stop = min(start + _COLUMNS, width)
                if done == 1:
                    _one_summed(rows, r, queries, 0, out, start, stop, part, sums)
                else:
                    _several_summed(rows, r, queries, 0, out, start, stop, part, sums)
        for number in range(_PARTS):
            _multiply(rows, queries, out, number * part + first, number * part + last, done)
