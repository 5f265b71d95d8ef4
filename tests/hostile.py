"""What the tests of hostile sources share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc

from rise_ops.readers import SourceRow, open_rows
from rise_ops.rows import RowFault
from tests.corpora import listed

MIB = 2**20


def read_all(path: Path, *, row_bytes: int = MIB) -> list[SourceRow]:
    """Every row of a source."""
    with open_rows(listed(path), row_bytes=row_bytes) as reader:
        return list(reader)


def faults_of(path: Path) -> list[str]:
    """The class of each row's fault; nothing for a good one."""
    return [row.value.error if isinstance(row.value, RowFault) else "" for row in read_all(path)]


def write_ipc(path: Path, batch: Any, **options: Any) -> Path:
    """One batch as an Arrow file."""
    made = pa.ipc.IpcWriteOptions(**options)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema, options=made) as writer:
        writer.write_batch(batch)
    return path
