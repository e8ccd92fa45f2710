"""Slices that are multiplied by numbers of their own, or given a norm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import Case, Disk, SourceSuite, draw, room
from streammerge.errors import RecipeError
from streammerge.sources.base import read_whole
from streammerge.sources.rescaled import rescaled
from streammerge.tensors.dtypes import DType

CASES = (((1, 1), 0), ((5, 3), 0), ((5, 3), 1), ((4, 6, 3, 3), 0), ((4, 6, 3, 3), 1), ((301, 433), 0), ((301, 433), 1))


def along(factors: torch.Tensor, shape: tuple[int, ...], axis: int) -> torch.Tensor:
    return factors.double().view([-1 if each == axis else 1 for each in range(len(shape))])


class TestRescaled(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for shape, axis in CASES:
            tensor, factors = draw(shape, torch.float32), draw((shape[axis],), torch.bfloat16, 1)
            made = rescaled(disk.stored(tensor), disk.stored(factors), axis, dtype=DType.F32)
            yield Case(made, (tensor.double() * along(factors, shape, axis)).float())

    @pytest.mark.parametrize("long", [False, True])
    def test_norms_are_those_that_were_asked_for(self, tmp_path: Path, long: bool) -> None:
        disk = Disk(tmp_path)
        for shape, axis in CASES if not long else (((2, 70_003), 0), ((2, 70_003), 1), ((3, 2, 40_001), 0)):
            tensor, factors = draw(shape, torch.bfloat16), draw((shape[axis],), torch.float32, 1).abs() + 0.5
            made = rescaled(disk.stored(tensor), disk.stored(factors), axis, True, 1e-3, DType.F64)
            found = torch.frombuffer(read_whole(made, room()), dtype=torch.float64).view(shape)
            others = [each for each in range(len(shape)) if each != axis]
            norms = tensor.double().pow(2).sum(others, keepdim=True).sqrt() + 1e-3
            expected = tensor.double() / norms * along(factors, shape, axis)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
            reader, size = made.open(room()), tensor.numel()
            for start, stop in ((size // 3, size // 2 + 1), (size - 1, size), (0, 1)):
                part = bytes(reader.read(start, stop, memoryview(bytearray(8 * (stop - start)))))
                assert torch.equal(torch.frombuffer(bytearray(part), dtype=torch.float64), found.view(-1)[start:stop])


def test_factors_must_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(RecipeError, match="slices along axis 1"):
        rescaled(disk.stored(torch.zeros(3, 4)), disk.stored(torch.zeros(3)), 1)
