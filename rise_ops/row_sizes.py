"""How large the rows of an Arrow batch are as JSON, at least, found without expanding anything.

A few stored bytes can stand for gigabytes: an index into a dictionary, a run, a view of a shared buffer, a list
of nulls. The reader therefore measures before it converts: a row over the limit is rejected unread, and rows are
converted a few megabytes at a time. Every figure is a lower bound of the row's canonical size: text counts its
bytes, null four, every other value one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

Sizes = npt.NDArray[np.int64]

_NULL = 4
_MEASURED_ITEMS = 2**20
"""Items of a slice's lists up to which each is measured; beyond, each counts one."""


def batch_sizes(batch: Any) -> Sizes:
    """Least JSON bytes of each row of a `pyarrow.RecordBatch`."""
    total = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        total += row_sizes(column)
    return total


def pieces(batch: Any, *, most_rows: int, most_bytes: int) -> Iterator[tuple[Any, Sizes]]:
    """Consecutive slices of a batch with their rows' sizes, each below both limits or of one row."""
    for start in range(0, batch.num_rows, most_rows):
        yield from _halves(batch.slice(start, most_rows), most_bytes)


def row_sizes(array: Any) -> Sizes:
    """Least JSON bytes of each value of a `pyarrow.Array`."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return row_sizes(array.storage)
    if kinds.is_dictionary(kind):
        return _taken(row_sizes(array.dictionary), array.indices)
    if kinds.is_run_end_encoded(kind):
        return _runs(array)
    if kinds.is_string_view(kind) or kinds.is_binary_view(kind):
        return _views(array)
    if _has_length(kind):
        return _filled(pc.binary_length(array))
    if kinds.is_struct(kind):
        return _structs(array)
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_map(kind):
        return _lists(array)
    if kinds.is_fixed_size_list(kind):
        return _fixed_lists(array)
    return np.ones(len(array), dtype=np.int64)


def _halves(piece: Any, most_bytes: int) -> Iterator[tuple[Any, Sizes]]:
    sizes = batch_sizes(piece)
    if piece.num_rows <= 1 or int(sizes.sum()) <= most_bytes:
        yield piece, sizes
        return
    middle = piece.num_rows // 2
    yield from _halves(piece.slice(0, middle), most_bytes)
    yield from _halves(piece.slice(middle), most_bytes)


def _has_length(kind: Any) -> bool:
    return bool(
        kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_binary(kind) or kinds.is_large_binary(kind)
    )


def _filled(lengths: Any) -> Sizes:
    return np.asarray(pc.fill_null(lengths, _NULL).cast(pa.int64()), dtype=np.int64)


def _or_null(array: Any, sizes: Sizes) -> Sizes:
    """What lies under a null does not count."""
    if not array.null_count:
        return sizes
    return np.where(np.asarray(array.is_valid().to_numpy(zero_copy_only=False)), sizes, _NULL)


def _taken(sizes: Sizes, indices: Any) -> Sizes:
    if not len(sizes):
        return np.full(len(indices), _NULL, dtype=np.int64)
    places = np.asarray(pc.fill_null(indices, 0).cast(pa.int64()), dtype=np.int64)
    return _or_null(indices, sizes[places])


def _runs(array: Any) -> Sizes:
    first, count = array.find_physical_offset(), array.find_physical_length()
    sizes = row_sizes(array.values.slice(first, count))
    ends = np.asarray(array.run_ends.slice(first, count).cast(pa.int64()), dtype=np.int64) - array.offset
    return np.repeat(sizes, np.diff(np.clip(ends, 0, len(array)), prepend=0))


def _views(array: Any) -> Sizes:
    """A view is 16 bytes that begin with the length."""
    held = array.buffers()[1]
    if held is None or not len(array):
        return np.full(len(array), _NULL, dtype=np.int64)
    views = np.frombuffer(held, dtype="<i4", count=4 * (array.offset + len(array)))
    return _or_null(array, views[4 * array.offset :: 4].astype(np.int64))


def _structs(array: Any) -> Sizes:
    total = np.full(len(array), 2, dtype=np.int64)
    for field, child in zip(array.type, array.flatten(), strict=True):
        total += row_sizes(child) + len(field.name)
    return _or_null(array, total)


def _lists(array: Any) -> Sizes:
    offsets = np.asarray(array.offsets.cast(pa.int64()), dtype=np.int64)
    first, last = int(offsets[0]), int(offsets[-1])
    if last - first > _MEASURED_ITEMS or not _varies(array.values.type):
        return _or_null(array, np.maximum(np.diff(offsets), 1))
    ends = np.concatenate([[0], np.cumsum(row_sizes(array.values.slice(first, last - first)))])
    return _or_null(array, 2 + ends[offsets[1:] - first] - ends[offsets[:-1] - first])


def _fixed_lists(array: Any) -> Sizes:
    width = array.type.list_size
    if width * len(array) > _MEASURED_ITEMS or not width or not _varies(array.type.value_type):
        return _or_null(array, np.full(len(array), max(1, width), dtype=np.int64))
    values = row_sizes(array.values.slice(array.offset * width, len(array) * width))
    return _or_null(array, 2 + values.reshape(len(array), width).sum(axis=1))


def _varies(kind: Any) -> bool:
    """Whether values of a type can differ in length."""
    return not (kinds.is_primitive(kind) or kinds.is_null(kind))
