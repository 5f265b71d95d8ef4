"""Columns of numbers that are in memory while they fit, and else in files of a folder.

A file is mapped, and after every access its pages are given back to the system, which keeps them as long as it has
memory to spare. So the process holds what it was allowed to, whatever the number of rows, and nothing that is
computed depends on it.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_PAGE = 4_096
_TOUCHED_BYTES = 16 * 2**20
"""Of a file's pages, mapped at a time."""


class Column:
    """An array of fixed shape whose rows are read and written by number; it begins as zeros.

    Parameters
    ----------
    data
        The array.
    mapped
        The file that it is in, where it is in one.
    """

    def __init__(self, data: npt.NDArray[Any], mapped: mmap.mmap | None) -> None:
        self._data, self._mapped = data, mapped
        row = data.dtype.itemsize * int(np.prod(data.shape[1:]))
        self._scattered = max(1, _TOUCHED_BYTES // max(_PAGE, row))

    def __len__(self) -> int:
        return len(self._data)

    def take(self, rows: npt.NDArray[np.integer[Any]], width: int | None = None) -> npt.NDArray[Any]:
        """Copies of these rows, or of the first `width` entries of each."""
        data = self._data if width is None else self._data[:, :width]
        if self._mapped is None:
            return np.asarray(data[rows])
        found = np.empty((len(rows), *data.shape[1:]), data.dtype)
        for start in range(0, len(rows), self._scattered):
            found[start : start + self._scattered] = data[rows[start : start + self._scattered]]
            self._release()
        return found

    def put(self, rows: npt.NDArray[np.integer[Any]], values: npt.NDArray[Any]) -> None:
        """Write these rows."""
        step = self._scattered if self._mapped is not None else max(1, len(rows))
        for start in range(0, len(rows), step):
            self._data[rows[start : start + step]] = values[start : start + step]
            self._release()

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """A copy of consecutive rows; not more than fit in memory."""
        found = self._data[start:stop].copy()
        self._release()
        return found

    def write(self, start: int, values: npt.NDArray[Any]) -> None:
        """Write consecutive rows; not more than fit in memory."""
        self._data[start : start + len(values)] = values
        self._release()

    @property
    def array(self) -> npt.NDArray[Any]:
        """The array itself, for a result; what is touched of it stays in memory while the system likes."""
        return self._data

    def _release(self) -> None:
        if self._mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapped.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: nothing that was written is lost


class Scratch:
    """Makes columns.

    Parameters
    ----------
    folder
        Local folder for those that do not fit.
    memory
        Bytes that all columns together may take; the first ones get it.
    """

    def __init__(self, folder: Path, memory: int) -> None:
        self._folder, self._left = folder, memory

    def column(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Column:
        """A column of zeros; `name` names its file, if any.

        Raises
        ------
        OSError
            The disk is full.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if size <= self._left:
            self._left -= size
            return Column(np.zeros(shape, dtype), None)
        with (self._folder / name).open("w+b") as file:
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapping kills the process
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
            mapped = mmap.mmap(file.fileno(), size)
        return Column(np.frombuffer(mapped, dtype).reshape(shape), mapped)
