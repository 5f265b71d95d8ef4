"""Streams: any cutting into chunks gives the same lines; damage is found; memory stays bounded."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rise_ops.streams import KEPT_BYTES, DamagedError, HashingReader, decompressed, lines
from tests.corpora import compress

_PAYLOAD = b"".join(b'{"text": "%d"}\n' % number for number in range(5000))


def _cut(data: bytes, points: list[int]) -> list[bytes]:
    places = [0, *sorted(min(point, len(data)) for point in points), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=12), st.integers(0, 40))
def test_chunk_borders_do_not_matter(data: bytes, points: list[int], limit: int) -> None:
    assert list(lines(_cut(data, points), limit=limit)) == list(lines([data], limit=limit))


@given(st.binary(max_size=300))
def test_lines_hold_every_byte(data: bytes) -> None:
    found = list(lines([data], limit=1000))
    assert b"".join(line + b"\n" * ended for line, _, ended in found) == data


def test_a_long_line_is_counted_but_not_held() -> None:
    chunks = (b"x" * 1000 for _ in range(10_000))
    ((line, length, ended),) = lines(chunks, limit=5000)
    assert (len(line), length, ended) == (KEPT_BYTES, 10_000_000, False)


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_members_and_frames_follow_each_other(codec: str) -> None:
    half = len(_PAYLOAD) // 2
    stored = compress(_PAYLOAD[:half], f".{codec}") + compress(_PAYLOAD[half:], f".{codec}")
    for size in (1, 7, 4096, len(stored)):
        chunks = [stored[start : start + size] for start in range(0, len(stored), size)]
        assert b"".join(decompressed(chunks, codec)) == _PAYLOAD


@pytest.mark.parametrize("codec", ["gz", "zst"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_stream_is_found(codec: str, keep: float) -> None:
    stored = compress(_PAYLOAD, f".{codec}")
    with pytest.raises(DamagedError, match="truncated"):
        list(decompressed([stored[: int(len(stored) * keep)]], codec))


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_other_bytes_are_damage(codec: str) -> None:
    with pytest.raises(DamagedError, match="damaged"):
        list(decompressed([b"this was never compressed"], codec))
    with pytest.raises(DamagedError, match="damaged"):
        list(decompressed([compress(_PAYLOAD, f".{codec}") + b"garbage after the end"], codec))


def test_a_flipped_bit_is_damage() -> None:
    for stored, codec in (
        (bytearray(gzip.compress(_PAYLOAD)), "gz"),
        (bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(_PAYLOAD)), "zst"),
    ):
        stored[len(stored) // 2] ^= 0x10
        with pytest.raises(DamagedError):
            list(decompressed([bytes(stored)], codec))


def test_zero_padding_after_gzip_is_allowed() -> None:
    assert b"".join(decompressed([gzip.compress(b"a\n") + b"\0" * 512], "gz")) == b"a\n"


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_a_bomb_comes_out_in_pieces(codec: str) -> None:
    stored = compress(b"\0" * 100_000_000, f".{codec}")
    pieces = (len(piece) for piece in decompressed([stored], codec))
    assert max(pieces) <= 33 * 2**20


def test_the_hash_covers_what_was_not_read() -> None:
    reader = HashingReader(io.BytesIO(_PAYLOAD), chunk_bytes=100)
    next(iter(reader))
    assert reader.sha256() == hashlib.sha256(_PAYLOAD).hexdigest()
