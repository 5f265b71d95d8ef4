"""Tables that lie: offsets, indices, footers, types and times; never a crash, never foreign memory."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from rise_ops import readers_arrow
from rise_ops.errors import SourceError
from rise_ops.readers import MAX_COLUMNS, MAX_NAME_BYTES
from tests.fuzz.targets import read_source
from tests.hostile import faults_of, read_all, write_ipc


@pytest.mark.parametrize("offsets", [(0, -5, 3), (0, 2**30, 2**30 + 1), (0, 3, 1), (2**31 - 1, 2**31 - 1, 2**31 - 1)])
def test_wrong_offsets_are_damage(tmp_path: Path, offsets: tuple[int, int, int]) -> None:
    path = write_ipc(tmp_path / "a.arrow", pa.record_batch([pa.array(["ab", "c"])], ["text"]))
    whole, good = path.read_bytes(), struct.pack("<3i", 0, 2, 3)
    assert whole.count(good) == 1
    path.write_bytes(whole.replace(good, struct.pack("<3i", *offsets)))
    with pytest.raises(SourceError, match=r"a\.arrow is damaged after row 0"):
        read_all(path)


def test_an_index_outside_its_dictionary_is_damage(tmp_path: Path) -> None:
    wrong = pa.DictionaryArray.from_arrays(pa.array([0, 10**8], pa.int32()), pa.array(["a"]), safe=False)
    with pytest.raises(SourceError, match="is damaged"):
        read_all(write_ipc(tmp_path / "a.arrow", pa.record_batch([wrong], ["text"])))


def test_an_index_of_parquet_outside_its_dictionary_is_damage(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c", "a", "b", "c", "a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none")
    whole, good = (tmp_path / "a.parquet").read_bytes(), b"\x02\x03\x24\x49"  # two bits each, packed
    assert whole.count(good) == 1
    (tmp_path / "a.parquet").write_bytes(whole.replace(good, b"\x02\x03\xff\xff"))
    with pytest.raises(SourceError, match=r"a\.parquet is damaged after row 0"):
        read_all(tmp_path / "a.parquet")


def test_a_decimal_that_is_too_large_for_its_type_costs_one_row(tmp_path: Path) -> None:
    prices = pa.array([1, 0x12345678, 3], pa.int32()).cast(pa.decimal128(10, 0)).cast(pa.decimal128(9, 0))
    table = pa.table({"text": ["a", "b", "c"], "price": prices})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_statistics=False)
    whole, good = (tmp_path / "a.parquet").read_bytes(), b"\x12\x34\x56\x78"
    assert whole.count(good) == 1
    (tmp_path / "a.parquet").write_bytes(whole.replace(good, b"\x7f\xff\xff\xff"))
    assert faults_of(tmp_path / "a.parquet") == ["", "bad_number", ""]


def test_text_of_an_arrow_file_that_is_not_utf8_costs_one_row(tmp_path: Path) -> None:
    path = write_ipc(tmp_path / "a.arrow", pa.record_batch([pa.array(["good", "caf\u00e9", "fine"])], ["text"]))
    path.write_bytes(path.read_bytes().replace("caf\u00e9".encode(), b"caf\xff\xff"))
    assert faults_of(path) == ["", "not_utf8", ""]


def test_an_extension_type_runs_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Evil())}
    schema = pa.schema([("text", pa.string()), pa.field("x", pa.int64(), metadata=metadata)])
    batch = pa.record_batch([pa.array(["a"]), pa.array([1])], schema=schema)
    pq.write_table(pa.Table.from_batches([batch]), tmp_path / "a.parquet")
    for path in (write_ipc(tmp_path / "a.arrow", batch), tmp_path / "a.parquet"):
        assert [row.value for row in read_all(path)] == [{"text": "a", "x": 1}]
    assert not (tmp_path / "ran").exists()


def test_an_encrypted_column_does_not_end_the_process(tmp_path: Path) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):  # type: ignore[misc, name-defined]
        def wrap_key(self, key: bytes, _: str) -> bytes:
            return key.hex().encode()

        def unwrap_key(self, key: bytes, _: str) -> bytes:
            return bytes.fromhex(key.decode())

    factory = encryption.CryptoFactory(lambda _: Keys())
    for plain in (True, False):
        settings_ = encryption.EncryptionConfiguration("f", column_keys={"c": ["text"]}, plaintext_footer=plain)
        properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings_)
        with pq.ParquetWriter(
            tmp_path / "a.parquet", pa.schema([("text", pa.string())]), encryption_properties=properties
        ) as writer:
            writer.write_table(pa.table({"text": ["a"]}))
        with pytest.raises(SourceError, match="encrypted"):
            read_all(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (pa.timestamp("us"), [0, 2**63 - 1, -(2**63)], ["", "bad_time", "bad_time"]),
        (pa.timestamp("ms", "UTC"), [0, 253_402_300_800_000, -62_167_219_200_001], ["", "bad_time", "bad_time"]),
        (pa.timestamp("ns", "Europe/Berlin"), [2**63 - 1, -(2**63), 0], ["", "bad_time", ""]),
        (pa.date32(), [2**31 - 1, 0, -719_529], ["bad_time", "", "bad_time"]),
    ],
)
def test_times_outside_the_calendar_cost_one_row(
    tmp_path: Path, kind: Any, values: list[int], expected: list[str]
) -> None:
    width = pa.int32() if kind == pa.date32() else pa.int64()
    times = pa.array(values, width).cast(kind)
    pq.write_table(
        pa.table({"text": ["a", "b", "c"], "t": times, "deep": [[time] for time in times]}), tmp_path / "a.parquet"
    )
    assert faults_of(tmp_path / "a.parquet") == expected
    assert read_source(tmp_path / "a.parquet")["rows"] == expected.count("")


@pytest.mark.parametrize(
    "table",
    [
        pa.table({}),
        pa.table({"text": pa.array([], pa.string())}),
        pa.table({f"c{place}": ["x"] for place in range(MAX_COLUMNS + 1)}),
        pa.table({"k" * (MAX_NAME_BYTES + 1): ["a"]}),
        pa.table(
            {
                "text": ["a"],
                "x": pa.array([{"a": 1}], pa.struct([("a", pa.int64())])).cast(pa.struct([("a", pa.int8())])),
            }
        ),
    ],
)
def test_tables_of_odd_widths(tmp_path: Path, table: Any) -> None:
    pq.write_table(table, tmp_path / "a.parquet")
    assert set(read_source(tmp_path / "a.parquet")) <= {"rows", "SourceError"}


def test_a_struct_that_names_a_field_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    with pytest.raises(SourceError, match="a struct names 'a' twice"):
        read_all(write_ipc(tmp_path / "a.arrow", pa.record_batch([pa.array(["t"]), twice], ["text", "x"])))


def test_unions_are_refused(tmp_path: Path) -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1]), pa.array(["a"])])
    with pytest.raises(SourceError, match="cannot be read"):
        read_all(write_ipc(tmp_path / "a.arrow", pa.record_batch([pa.array(["t"]), union], ["text", "x"])))


@pytest.mark.parametrize("length", [b"\xff\xff\xff\x7f", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x10\x00\x00\x00"])
def test_a_footer_that_lies_about_its_length(tmp_path: Path, length: bytes) -> None:
    pq.write_table(pa.table({"text": ["a"] * 10}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-8] + length + b"PAR1")
    with pytest.raises(SourceError, match=r"a\.parquet is damaged"):
        read_all(tmp_path / "a.parquet")


def test_a_table_needs_less_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers_arrow, "DECODED_BYTES", 1000)
    table = pa.table({"text": [f"{place:0100}" for place in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    write_ipc(tmp_path / "a.arrow", table.to_batches()[0], compression="zstd")
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(SourceError, match=r"needs 1\d,\d\d\d bytes of memory to decode a .* the most is 1,000"):
            read_all(tmp_path / name)
    write_ipc(tmp_path / "a.arrow", table.to_batches()[0])  # not compressed: nothing is decoded
    assert len(read_all(tmp_path / "a.arrow")) == 100
