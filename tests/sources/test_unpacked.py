"""Packed numbers, against fields that are read bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantised.samples import packed
from sources.suite import Case, Disk, SourceSuite, room
from streammerge.errors import MismatchError
from streammerge.sources.base import read_whole
from streammerge.sources.unpacked import E2M1, pairs, unpacked, unpacked_down
from streammerge.tensors.dtypes import DType

SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (3, 7), (5, 64), (33, 100), (2, 3, 70), (2, 300_004), (0, 8))


def fields(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))


class TestUnpacked(SourceSuite):
    dtype = DType.F32

    def cases(self, disk: Disk) -> Iterator[Case]:
        for number, shape in enumerate(SHAPES):
            for bits in (4, 8, 1 + number % 7):
                numbers = fields(shape, bits)
                expected = (numbers - (1 << (bits - 1))).to(torch.int8)
                yield Case(unpacked("w", disk.stored(packed(numbers, bits)), shape, bits), expected)
            if shape[-1] % 2 == 0:
                numbers = fields(shape, 4)
                for high_first in (False, True):
                    low, high = (
                        (numbers[..., 1::2], numbers[..., ::2]) if high_first else (numbers[..., ::2], numbers[..., 1::2])
                    )
                    octets = (low | high << 4).to(torch.uint8)
                    made = unpacked("w", disk.stored(octets), shape, 4, floats=True, high_first=high_first)
                    yield Case(made, torch.tensor(E2M1)[numbers])

    def test_a_merge_takes_it_like_any_tensor(self, tmp_path: Path) -> None:
        """Integers are no weights, so only floats are merged."""

        class Floats(TestUnpacked):
            def cases(self, disk: Disk) -> Iterator[Case]:
                return (case for case in TestUnpacked.cases(self, disk) if case.expected.dtype == torch.float32)

        SourceSuite.test_a_merge_takes_it_like_any_tensor(Floats(), tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7])
def test_fields_that_cross_no_word(tmp_path: Path, bits: int) -> None:
    """Older packs leave the last bits of a word unused."""
    each, numbers = 32 // bits, fields((4, 320), bits)
    words = torch.zeros(4, -(-320 // each), dtype=torch.int64)
    for column in range(320):
        words[:, column // each] |= numbers[:, column] << (column % each * bits)
    source = unpacked("w", Disk(tmp_path).stored(words.to(torch.int32)), (4, 320), bits)
    found = torch.frombuffer(read_whole(source, room()), dtype=torch.int8).view(4, 320)
    assert torch.equal(found, (numbers - (1 << (bits - 1))).to(torch.int8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_zero_points_lie_along_the_first_axis(tmp_path: Path, bits: int) -> None:
    numbers = fields((45, 6), bits)
    source = unpacked_down("w", Disk(tmp_path).stored(packed(numbers.T.contiguous(), bits).T.contiguous()), (45, 6), bits)
    expected = (numbers - (1 << (bits - 1))).to(torch.int8)
    assert bytes(read_whole(source, room())) == bytes(expected.numpy())
    part = source.open(room()).read(7, 100, memoryview(bytearray(93)))
    assert bytes(part) == bytes(expected.view(-1)[7:100].numpy())


def test_packs_must_hold_the_shape(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for tensor, shape, bits in (
        (torch.zeros(3, 4).int(), (3, 33), 4),
        (torch.zeros(3, 4).int(), (4, 32), 4),
        (torch.zeros(3, 4).byte(), (3, 10), 4),
        (torch.zeros(3, 4), (3, 32), 4),
    ):
        with pytest.raises(MismatchError, match=r"w: \w+ \[3, 4\] of w does not hold .* numbers of 4 bits"):
            unpacked("w", disk.stored(tensor), shape, bits)
    with pytest.raises(MismatchError, match=r"does not hold \[45, 6\] zero points of 4 bits"):
        unpacked_down("w", disk.stored(torch.zeros(5, 6).int()), (45, 6), 4)


def test_pairs_are_the_floats_of_each_byte() -> None:
    found = pairs().view(torch.float32).view(256, 2)
    assert [found[octet].tolist() for octet in range(256)] == [[E2M1[octet & 15], E2M1[octet >> 4]] for octet in range(256)]
