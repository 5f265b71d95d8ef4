"""Bombs, small on disk: memory stays flat, work is bounded, and a row that is too long is rejected unread.

Memory is read from a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rise_ops import expansion
from rise_ops.arrow_json import json_values
from rise_ops.errors import SourceError
from rise_ops.row_sizes import row_sizes
from rise_ops.store import Store
from tests.corpora import ingest_path, jsonl, make_rows, record_frame, rejections
from tests.hostile import MIB, read_all, write_ipc


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def _peak(path: Path) -> tuple[str, int]:
    """What reading a source gave in a fresh process, and by how many bytes that raised the process' peak."""
    code = (
        "import sys\n"
        "from rise_ops.errors import CurationError\n"
        "from rise_ops.readers import open_rows\n"
        "import rise_ops.readers_arrow, rise_ops.readers_csv\n"
        "from rise_ops.sources import stat_object\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().split('VmHWM:')\n"
        "    return int(lines[1].split()[0]) * 1024\n"
        "before = peak()\n"
        "try:\n"
        "    with open_rows(stat_object(sys.argv[1]), row_bytes=2**20) as reader:\n"
        "        kinds = {getattr(row.value, 'error', 'row') for row in reader}\n"
        "    print(','.join(sorted(kinds)))\n"
        "except CurationError as error:\n"
        "    print(type(error).__name__, error)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=200)
    outcome, grown = done.stdout.strip().rsplit("\n", 1)
    return outcome, int(grown)


def _gzip_line(path: Path, mebibytes: int) -> None:
    engine = zlib.compressobj(9, wbits=31)
    with path.open("wb") as file:
        file.write(engine.compress(b'{"text": "'))
        for _ in range(mebibytes):
            file.write(engine.compress(b"a" * MIB))
        file.write(engine.compress(b'"}\n{"text": "ok"}\n') + engine.flush())


def _zstd_line(path: Path, mebibytes: int) -> None:
    engine = zstandard.ZstdCompressor().compressobj()
    with path.open("wb") as file:
        file.write(engine.compress(b'{"text": "'))
        for _ in range(mebibytes):
            file.write(engine.compress(b"a" * MIB))
        file.write(engine.compress(b'"}\n{"text": "ok"}\n') + engine.flush())


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "write"), [("gz", _gzip_line), ("zst", _zstd_line)])
def test_a_line_of_a_gigabyte_is_one_row_in_quarantine(
    tmp_path: Path, suffix: str, write: Callable[[Path, int], None]
) -> None:
    path = tmp_path / f"a.jsonl.{suffix}"
    write(path, 1024)
    assert path.stat().st_size < 2 * MIB
    outcome, grown = _peak(path)
    assert outcome == "row,too_long"
    assert grown < 128 * MIB


def test_a_long_line_that_is_not_compressed_is_not_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(300 * MIB)  # zeros, without a newline
    assert _peak(path)[0] == "too_long"
    assert _peak(path)[1] < 40 * MIB


@pytest.mark.parametrize(
    ("name", "line"), [("a.jsonl.zst", b"\n"), ("a.jsonl.zst", b"x\n"), ("a.csv.zst", b"\n"), ("a.csv.zst", b'"\n')]
)
def test_work_is_bounded_by_stored_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: bytes
) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 2**24)
    (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(b"text\n" + line * (2**22 // len(line))))
    with pytest.raises(SourceError, match=r"a\.\w+\.zst expands to more than 1,000 times its .* store it decompressed"):
        read_all(tmp_path / name)


def test_what_compresses_well_is_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 2**20)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(jsonl(make_rows(20_000))))
    assert len(read_all(tmp_path / "a.jsonl.zst")) == 20_000


def test_a_zstd_window_that_is_too_large_is_damage(tmp_path: Path) -> None:
    options = zstandard.ZstdCompressionParameters(window_log=31)
    engine = zstandard.ZstdCompressor(compression_params=options).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(engine.compress(b'{"text": "a"}\n') + engine.flush())
    with pytest.raises(SourceError, match="too much memory"):
        read_all(tmp_path / "a.jsonl.zst")


def _dictionary_bomb(folder: Path) -> Path:
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["y" * MIB]))
    pq.write_table(pa.table({"text": repeated}), folder / "a.parquet")
    return folder / "a.parquet"


def _buffer_bomb(folder: Path) -> Path:
    return write_ipc(folder / "a.arrow", pa.record_batch([pa.array(["a" * (2**30 + 1)])], ["text"]), compression="zstd")


def _run_bomb(folder: Path) -> Path:
    run = pa.RunEndEncodedArray.from_arrays(pa.array([2**31 - 1], pa.int32()), pa.array(["z" * 100_000]))
    return write_ipc(folder / "a.arrow", pa.record_batch([run], ["text"]))


@pytest.mark.slow
@pytest.mark.parametrize("make", [_dictionary_bomb, _buffer_bomb, _run_bomb])
def test_a_table_that_expands_is_refused_in_little_memory(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path)
    assert path.stat().st_size < 2 * MIB
    outcome, grown = _peak(path)
    assert outcome.startswith("SourceError") and str(path) in outcome
    assert grown < 128 * MIB


def test_rows_of_nothing_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 2**20)
    path = write_ipc(tmp_path / "a.arrow", pa.record_batch([pa.nulls(10**9)], ["text"]))
    with pytest.raises(SourceError, match="expands to more than 1,000 times"):
        read_all(path)


def test_a_long_row_of_a_table_is_rejected_unread(local: Store, tmp_path: Path) -> None:
    texts = ["short", "x" * 9 * MIB, "also short"]
    coded = pa.array(texts).dictionary_encode()
    for place, column in enumerate(
        (pa.array(texts), pa.array(texts, pa.large_string()), coded, pa.array(texts, pa.string_view()))
    ):
        path = write_ipc(tmp_path / f"{place}.arrow", pa.record_batch([pa.array([1, 2, 3]), column], ["n", "text"]))
        made = ingest_path(local, path)
        assert rejections(local, made) == {1: "too_long"}
        assert record_frame(local, made).drop_nulls("error")["raw"][0].startswith('{"n":2,"text":"xxx')


_LISTS = st.none() | st.lists(st.none() | st.text("aé😀", max_size=5), max_size=4)


@given(
    st.lists(_LISTS, max_size=8),
    st.integers(0, 4),
    st.sampled_from(["list", "large", "struct", "map", "coded", "view"]),
)
def test_sizes_never_exceed_the_json(values: list[Any], start: int, form: str) -> None:
    array = pa.array(values, pa.list_(pa.string()))
    if form == "large":
        array = array.cast(pa.large_list(pa.large_string()))
    elif form == "struct":
        array = pa.StructArray.from_arrays(
            [array, array], ["a", "bé"], mask=pa.array([len(v or "") % 2 == 1 for v in values], pa.bool_())
        )
    elif form == "map":
        array = pa.array(
            [None if v is None else [(k or "", k) for k in v] for v in values], pa.map_(pa.string(), pa.string())
        )
    elif form == "coded":
        array = pa.array(
            [None if v is None else "".join(k or "" for k in v) for v in values], pa.string()
        ).dictionary_encode()
    elif form == "view":
        array = pa.array([None if v is None else "x".join(k or "" for k in v) for v in values], pa.string_view())
    array = array.slice(min(start, len(array)))
    texts = [json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() for value in json_values(array)]
    assert all(size <= len(text) for size, text in zip(row_sizes(array).tolist(), texts, strict=True))
