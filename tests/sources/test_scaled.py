"""Weights with a scale for each block, against whole tensors in torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantised.samples import in_blocks
from sources.suite import Case, Disk, SourceSuite, draw, room
from streammerge.errors import MismatchError
from streammerge.sources.base import read_whole
from streammerge.sources.scaled import scaled
from streammerge.tensors.dtypes import DType

SHAPES: tuple[tuple[int, ...], ...] = ((1, 1), (7,), (5, 3), (200, 300), (129, 2051), (3, 130, 260), (2, 300_001), (0, 4))
BLOCKS = ((128, 128), (1, 64), (1, 10**9), (3, 5))


def codes(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(3)).float()
    drawn = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    return drawn if dtype == torch.int8 else torch.where((drawn & 0x7F) >= 0x78, 1, drawn).view(dtype)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape[-2] if len(shape) > 1 else 1, shape[-1]
    return (*shape[:-2], -(-rows // min(block[0], max(rows, 1))), -(-columns // block[1]))


def spread(numbers: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    rows, columns = shape[-2] if len(shape) > 1 else 1, shape[-1]
    return in_blocks(numbers, rows, columns, min(block[0], max(rows, 1)), min(block[1], max(columns, 1))).reshape(shape)


class TestScaled(SourceSuite):
    dtype = DType.F32

    def cases(self, disk: Disk) -> Iterator[Case]:
        for number, shape in enumerate(SHAPES):
            for at, block in enumerate(BLOCKS):
                dtype = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float32)[(number + at) % 4]
                own = codes(shape, dtype)
                scales = draw(grid(shape, block), (torch.float32, torch.bfloat16, torch.float16)[at % 3], number)
                made = scaled("w", disk.stored(own), disk.stored(scales, "w_scale"), block)
                wide = spread(scales, shape, block) if scales.numel() > 1 else scales.float().sum()
                yield Case(made, (own.float() * wide).reshape(shape))

    def test_zero_points_groups_and_whole_scales(self, tmp_path: Path) -> None:
        disk, own = Disk(tmp_path), codes((33, 96), torch.int8)
        scales, zeros = draw((33, 3), torch.float32), codes((33, 3), torch.int8)
        order = torch.arange(96).remainder(3).int()
        parts = {"zeros": disk.stored(zeros), "groups": disk.stored(order), "whole": disk.stored(torch.tensor([3.0]))}
        made = scaled("w", disk.stored(own), disk.stored(scales), (1, 32), **parts, divides=True)
        expected = (own.float() - zeros.float()[:, order]) * (scales / 3.0)[:, order]
        found = torch.frombuffer(read_whole(made, room()), dtype=torch.float32).view(33, 96)
        assert torch.equal(found, expected)
        reader = made.open(room())
        for start, stop in ((5, 90), (90, 300), (96, 192), (3167, 3168)):
            part = bytearray(reader.read(start, stop, memoryview(bytearray(4 * (stop - start)))))
            assert torch.equal(torch.frombuffer(part, dtype=torch.float32), expected.view(-1)[start:stop])

    def test_scales_that_are_too_large_to_be_doubled(self, tmp_path: Path) -> None:
        disk, own = Disk(tmp_path), torch.tensor([[0x01, 0x08]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        scales = torch.tensor([[2.0**125, 2.0**-149]])
        made = scaled("w", disk.stored(own), disk.stored(scales), (1, 1))
        found = torch.frombuffer(read_whole(made, room()), dtype=torch.float32)
        assert torch.equal(found, (own.float() * scales).view(-1))

    def test_nan_stays_nan(self, tmp_path: Path) -> None:
        disk, own = Disk(tmp_path), torch.tensor([[0x7F, 0xFF, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        made = scaled("w", disk.stored(own), disk.stored(torch.ones(1)), (1, 3))
        found = torch.frombuffer(read_whole(made, room()), dtype=torch.float32)
        assert found[:2].isnan().all()
        assert found[2] == 448


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"scales": torch.ones(2, 2)}, r"F32 \[2, 2\] of w are no scales of F8_E4M3 \[300, 200\] in blocks of 128 x 128"),
        ({"scales": torch.ones(3, 2).long()}, "are no scales"),
        ({"zeros": torch.ones(3, 3).char()}, r"I8 \[3, 3\] of w are no zero points beside scales of shape \[3, 2\]"),
        ({"whole": torch.ones(2)}, r"F32 \[2\] of w is no scale of a whole tensor"),
        ({"groups": torch.ones(199).int()}, r"I32 \[199\] of w does not give the groups of 200 columns"),
    ],
)
def test_helpers_must_fit(tmp_path: Path, parts: dict[str, torch.Tensor], said: str) -> None:
    disk = Disk(tmp_path)
    given = {"scales": torch.ones(3, 2)} | parts
    sources = {name: disk.stored(each) for name, each in given.items()}
    with pytest.raises(MismatchError, match=said):
        scaled("w", disk.stored(codes((300, 200), torch.float8_e4m3fn)), sources.pop("scales"), (128, 128), **sources)


def test_groups_beyond_the_scales_are_refused(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    groups = disk.stored(torch.tensor([0, 1, 2, 3], dtype=torch.int32))
    made = scaled("w", disk.stored(codes((2, 4), torch.int8)), disk.stored(torch.ones(2, 2)), (1, 2), groups=groups)
    with pytest.raises(MismatchError, match="w: its columns have groups beyond the 2 scales of a row"):
        read_whole(made, room())


def test_a_part_of_a_row_is_read_again_after_other_rows(tmp_path: Path) -> None:
    """Scales that are kept do not change when the memory that they were read into is used again."""
    disk = Disk(tmp_path)
    numbers, scales = codes((4, 5), torch.int8), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    reader = scaled("w", disk.stored(numbers), disk.stored(scales), (1, 5)).open(room())
    expected = (numbers.float() * scales).view(-1)
    for start, stop in ((0, 8), (10, 20), (5, 8)):
        out = memoryview(bytearray(4 * (stop - start)))
        made = torch.frombuffer(reader.read(start, stop, out), dtype=torch.float32)
        assert torch.equal(made, expected[start:stop]), (start, stop)
