"""Codes and scales of numbers, against the same rule on whole tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import octets

from quantised.samples import FP8, fp8_blocks, in_blocks, largest, numbers_of
from sources.suite import Case, Disk, SourceSuite, room
from streammerge.sources.base import read_whole
from streammerge.sources.requantised import LARGEST, requantised
from streammerge.sources.scaled import scaled
from streammerge.tensors.dtypes import DType

SHAPES = ((1, 1), (5, 3), (128, 128), (200, 300), (129, 2051), (3, 130, 260))
BLOCK = (128, 128)


def height(shape: tuple[int, ...]) -> int:
    return shape[-2]


def drawn(shape: tuple[int, ...], seed: int = 1) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(made.abs() < 0.1, 0, made)


class TestRequantised(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for number, shape in enumerate(SHAPES):
            whole = drawn(shape)
            codes, scales = fp8_blocks(whole, (torch.float32, torch.bfloat16, torch.float16)[number % 3])
            other = disk.stored(torch.full_like(scales, 7.0), "w_scale"), disk.stored(codes)
            pair = requantised(disk.stored(whole), other[1], other[0], BLOCK, height(shape), False)
            yield Case(pair[0], codes)
            yield Case(pair[1], scales)

    def test_one_scale_for_a_tensor(self, tmp_path: Path) -> None:
        """The tensor is longer than what is computed at once."""
        disk, whole = Disk(tmp_path), drawn((1030, 3001))
        scale = whole.abs().max() / 57344
        codes = (whole / scale).to(torch.float8_e5m2)
        like = disk.stored(codes), disk.stored(torch.ones(()))
        pair = requantised(disk.stored(whole), *like, (1030, 3001), 1030, False)
        made = [bytes(read_whole(each, room())) for each in pair]
        assert made[0] == bytes(codes.view(torch.uint8).numpy())
        assert made[1] == scale.numpy().tobytes()

    def test_scales_of_rows_groups_and_tensors(self, tmp_path: Path) -> None:
        """The rule of compressed-tensors: half the range of the codes. Some are longer than what is computed at once."""
        disk = Disk(tmp_path)
        for dtype, half in ((torch.int8, 127.5), (FP8, 448.0)):
            for shape, width in (((5, 3), 3), ((1030, 517), 517), ((3, 130, 256), 128), ((7, 300), 128), ((2, 9), 0)):
                whole = drawn(shape)
                rows = whole.reshape(-1, shape[-1])
                if width:
                    scales = largest(rows, 1, width) / half
                    wide = in_blocks(scales, *rows.shape, 1, width)
                else:
                    scales = wide = whole.abs().max().view(1, 1) / half
                codes = rows / wide
                codes = codes.round().clamp(-128, 127).to(dtype) if half < 128 else codes.clamp(-448, 448).to(dtype)
                like = disk.stored(codes.view(shape)), disk.stored(torch.full_like(scales, 7.0), "w_scale")
                block = (1, width) if width else (2, 9)
                pair = requantised(disk.stored(whole), *like, block, shape[-2], False)
                for source, expected in zip(pair, (codes, scales), strict=True):
                    assert bytes(read_whole(source, room())) == octets(expected)
                kept = scaled("w", like[0], like[1], block if width else (1, 1 << 62))
                again = requantised(kept, *like, block, shape[-2], False)
                assert bytes(read_whole(again[0], room())) == octets(codes)
                assert set(memoryview(read_whole(again[1], room())).cast("f")) == {7.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_lies_on_a_grid_keeps_it(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Scales that no rule would give come back, because other scales would not give other numbers."""
    disk = Disk(tmp_path)
    codes, _ = fp8_blocks(drawn(shape))
    scales = (torch.rand(largest(drawn(shape)).shape, generator=torch.Generator().manual_seed(5)) * 3).to(dtype)
    codes.view(-1)[:3] = torch.tensor([0.0, -0.0, 0.0]).to(codes.dtype)[: codes.numel()]
    stored = disk.stored(codes), disk.stored(scales, "w_scale")
    pair = requantised(scaled("w", *stored, BLOCK), *stored, BLOCK, height(shape), False)
    for source, expected in zip(pair, (codes, scales), strict=True):
        assert bytes(read_whole(source, room())) == bytes(expected.contiguous().view(-1).view(torch.uint8).numpy())


def test_powers_of_two(tmp_path: Path) -> None:
    disk, whole = Disk(tmp_path), drawn((200, 300)) * 1e-3
    exponents = torch.tensor([[120, 121, 122]] * 2, dtype=torch.uint8)
    codes, _ = fp8_blocks(whole)
    for scales in (exponents, torch.ones(2, 3)):
        pair = requantised(disk.stored(whole), disk.stored(codes), disk.stored(scales), BLOCK, 200, True)
        made = [bytes(read_whole(each, room())) for each in pair]
        expected = (largest(whole).double() / 448).log2().ceil()
        if scales.dtype == torch.uint8:
            assert list(made[1]) == (expected + 127).int().view(-1).tolist()
        else:
            assert made[1] == expected.exp2().float().numpy().tobytes()
        again = (whole / in_blocks(expected.exp2(), 200, 300)).to(codes.dtype)
        assert made[0] == bytes(again.view(torch.uint8).numpy())


def test_zeros_and_numbers_that_are_not_finite(tmp_path: Path) -> None:
    disk, whole = Disk(tmp_path), torch.zeros(128, 384)
    whole[3, 130], whole[4, 131], whole[5, 132] = torch.nan, torch.inf, 896.0
    like = disk.stored(whole.to(torch.float8_e4m3fn)), disk.stored(torch.full((1, 3), torch.nan))
    pair = requantised(disk.stored(whole), *like, BLOCK, 128, False)
    codes = torch.frombuffer(read_whole(pair[0], room()), dtype=torch.float8_e4m3fn).view(128, 384)
    scales = torch.frombuffer(read_whole(pair[1], room()), dtype=torch.float32).view(1, 3)
    assert scales.tolist() == [[1.0, 2.0, 1.0]]
    numbers = numbers_of(codes, scales)
    assert numbers[3, 130].isnan()
    assert numbers[4, 131].isnan()  # the dtype has no infinity
    assert numbers[5, 132] == 896
    assert int((numbers != 0).sum()) == 3
    assert LARGEST[DType.F8_E4M3] == 448
