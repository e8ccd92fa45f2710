"""Joining CRC-32 values: the checksum of a whole from those of its parts, whatever order they were made in."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320


def _times(matrix: tuple[int, ...], vector: int) -> int:
    product = 0
    for row in matrix:
        if not vector:
            break
        if vector & 1:
            product ^= row
        vector >>= 1
    return product


@lru_cache(maxsize=256)
def _append_zeros(nbytes: int) -> tuple[int, ...]:
    """The linear map, over bits, that appending ``nbytes`` zero bytes is to a CRC-32 register."""
    power = (_POLYNOMIAL, *(1 << bit for bit in range(31)))  # one zero bit
    result: tuple[int, ...] = tuple(1 << bit for bit in range(32))
    bits = 8 * nbytes
    while bits:
        if bits & 1:
            result = tuple(_times(power, row) for row in result)
        power = tuple(_times(power, row) for row in power)
        bits >>= 1
    return result


def combine(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of a + b, from crc32(a), crc32(b) and the length of b."""
    return _times(_append_zeros(second_bytes), first) ^ second


def join(parts: Iterable[tuple[int, int, int]]) -> int:
    """CRC-32 of a range of bytes, from (offset, bytes, crc) of parts that cover it; their order does not matter."""
    total = 0
    for _offset, nbytes, crc in sorted(parts):
        total = combine(total, crc, nbytes)
    return total
