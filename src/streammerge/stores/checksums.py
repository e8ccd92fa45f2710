"""Checksums of streamed bytes, and their combination: checksums of parts, made in any order, give that of the whole.

Zip archives contain CRC-32. Our own checksum is CRC-32C, for which processors have an instruction.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple


class Checksum(NamedTuple):
    """A kind of checksum: 32 bits, linear over bits."""

    name: str
    polynomial: int

    def update(self, data: Any, before: int = 0) -> int:
        """Returns the checksum of all bytes so far, from the checksum ``before`` and a buffer of more bytes."""
        if self.name == "crc32":
            return zlib.crc32(data, before)
        from streammerge.stores.crc32c import crc32c  # imported here, because plans and inspections do not need it

        return crc32c(data, before)

    def combine(self, first: int, second: int, second_bytes: int) -> int:
        """Returns the checksum of a + b, from the checksums of a and b and the bytes of b."""
        return _times(_append_zeros(self.polynomial, second_bytes), first) ^ second if first else second

    def join(self, parts: Iterable[tuple[int, int, int]]) -> int:
        """Returns the checksum of a byte range, from (offset, bytes, checksum) of parts that cover it, in any order."""
        total = 0
        for _offset, nbytes, checksum in sorted(parts):
            total = self.combine(total, checksum, nbytes)
        return total


CRC32 = Checksum("crc32", 0xEDB88320)
CRC32C = Checksum("crc32c", 0x82F63B78)


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
def _append_zeros(polynomial: int, nbytes: int) -> tuple[int, ...]:
    """Returns the linear map over bits by which ``nbytes`` appended zero bytes change a register."""
    power = (polynomial, *(1 << bit for bit in range(31)))  # appends one zero bit
    result: tuple[int, ...] = tuple(1 << bit for bit in range(32))
    bits = 8 * nbytes
    while bits:
        if bits & 1:
            result = tuple(_times(power, row) for row in result)
        power = tuple(_times(power, row) for row in power)
        bits >>= 1
    return result
