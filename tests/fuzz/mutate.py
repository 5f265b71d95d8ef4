"""Seeded damage: one input becomes a similar one that nobody wrote."""

from __future__ import annotations

import random
import struct

TOKENS = (
    b"\x00", b"\xff", b"\n", b"\r", b'"', b'""', b",", b"\\", b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xe2\x80\xa8",
    b"\xef\xbb\xbf", b"NaN", b"-Infinity", b"1e999", b"-0", b"9223372036854775808", b"1" * 4400, b"[" * 200,
    b'{"a":' * 120, b"}", b"]", b"null", b"true", b'"text":', b'{"text":1}', b"../", b"%2e%2e/", b"/etc/passwd", b"{}",
    b"[]", b"-1", b"1.5", b"PAR1", b"ARROW1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd",
)  # fmt: skip
NUMBERS = (0, 1, -1, 7, 127, 128, 255, 256, 65535, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, -(2**63), 2**63 - 1)


def mutated(data: bytes, choose: random.Random) -> bytes:
    """A few changes at random places."""
    found = bytearray(data)
    for _ in range(choose.choice((1, 1, 1, 2, 3, 6))):
        _change(found, choose)
    return bytes(found)


def _change(data: bytearray, choose: random.Random) -> None:
    place = choose.randrange(len(data) + 1)
    length = min(choose.choice((1, 1, 2, 4, 8, 32, 200)), len(data) - place)
    match choose.randrange(9):
        case 0 if length:
            data[place] ^= 1 << choose.randrange(8)
        case 1:
            data[place : place + length] = choose.randbytes(length)
        case 2:
            data[place:place] = choose.choice(TOKENS)
        case 3:
            token = choose.choice(TOKENS)
            data[place : place + len(token)] = token
        case 4:
            kind = choose.choice("bhiq")
            number = struct.pack(f"<{kind}", _wrapped(choose.choice(NUMBERS), struct.calcsize(kind)))
            data[place : place + len(number)] = number
        case 5:
            del data[place : place + length]
        case 6:
            data[place:place] = data[place : place + length] * choose.choice((1, 2, 50))
        case 7:
            other = choose.randrange(len(data) + 1)
            data[place : place + length] = data[other : other + length]
        case _:
            if choose.randrange(4) == 0:
                del data[place:]


def _wrapped(number: int, width: int) -> int:
    half = 1 << (8 * width - 1)
    return (number + half) % (2 * half) - half
