"""Entity tags that are digests."""

from __future__ import annotations

import hashlib

import pytest

from stores.suite import noise
from streammerge.stores.checksums import CRC32C
from streammerge.stores.tags import CELL_BYTES, cells, part_sizes, read_through

MIB = 1 << 20


def composed(data: bytes, each: int) -> str:
    parts = [hashlib.md5(data[at : at + each]).digest() for at in range(0, max(len(data), 1), each)]
    return f'"{hashlib.md5(b"".join(parts)).hexdigest()}-{len(parts)}"'


@pytest.mark.parametrize("size", [0, 1, CELL_BYTES, 5 * MIB, 16 * MIB + 3])
def test_the_tag_of_the_bytes_is_known_and_no_other(size: int) -> None:
    data = noise(size)
    blocks = [data[at : at + 4 * MIB] for at in range(0, size, 4 * MIB)]
    plain = hashlib.md5(data).hexdigest()
    for tag in (f'"{plain}"', composed(data, 8 * MIB), composed(data, 5 * MIB)):
        is_digest, digest, sums = read_through(tag, size, blocks)
        assert is_digest
        assert digest == plain
        assert sums == [CRC32C.update(data[at : at + CELL_BYTES]) for at in range(0, size, CELL_BYTES)]
    if size:
        wrong = [bytes([blocks[0][0] ^ 1]) + blocks[0][1:], *blocks[1:]]
        for tag in (f'"{plain}"', composed(data, 8 * MIB)):
            assert not read_through(tag, size, wrong)[0]


def test_only_digests_are_read_as_such() -> None:
    assert part_sizes("W/abc", 10) == part_sizes('"abc"', 10) == part_sizes("2026-01-01", 10) == []
    digest = "0" * 32
    assert part_sizes(f'"{digest}"', 10) == [10]
    assert 8 * MIB in part_sizes(f'"{digest}-3"', 17 * MIB)
    assert 5 * MIB not in part_sizes(f'"{digest}-3"', 17 * MIB)
    assert part_sizes(f'"{digest}-999"', 10) == []


def test_cells_of_a_range_are_those_of_the_file() -> None:
    data = noise(3 * CELL_BYTES + 5)
    assert list(cells(data))[1:] == list(cells(data[CELL_BYTES:]))
