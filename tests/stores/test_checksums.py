"""Checksums of parts, in any order, combine to the checksum of the whole."""

from __future__ import annotations

import os

import pytest

from streammerge.stores.checksums import CRC32, CRC32C, Checksum


@pytest.mark.parametrize("kind", [CRC32, CRC32C])
@pytest.mark.parametrize("sizes", [[0], [1], [5, 0, 3], [1 << 16, 1, 70_001], [3] * 50])
def test_checksums_join(kind: Checksum, sizes: list[int]) -> None:
    data, parts, cursor = os.urandom(sum(sizes)), [], 0
    for size in sizes:
        parts.append((cursor, size, kind.update(data[cursor : cursor + size])))
        cursor += size
    assert kind.join(reversed(parts)) == kind.update(data) == kind.update(data[3:], kind.update(data[:3]))
    assert kind.combine(kind.update(b"ab"), kind.update(b"c"), 1) == kind.update(b"abc")


def test_checksums_are_those_of_the_standards() -> None:
    assert (CRC32.update(b"123456789"), CRC32C.update(b"123456789")) == (0xCBF43926, 0xE3069283)
