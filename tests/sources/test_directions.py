"""Directions of sums of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import Case, Disk, SourceSuite, draw, room
from streammerge.sources.base import read_whole
from streammerge.sources.directions import directions
from streammerge.tensors.dtypes import DType


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


class TestDirections(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        source = disk.stored(rows)
        wide = rows.double()
        first, second = unit(wide[[1, 1, 4]].sum(0)), unit(unit(wide[8]) - unit(wide[[0, 2]].sum(0)))
        want = torch.stack([first, second])
        yield Case(directions("g", source, ((1, 1, 4), (8,)), ((), (0, 2)), DType.F32), want.float())
        yield Case(directions("g", source, ((8,),), ((0, 2),), DType.BF16), want[1:].to(torch.bfloat16))


def test_no_direction_is_zero(tmp_path: Path) -> None:
    source = Disk(tmp_path).stored(draw((3, 4), torch.float32))
    made = read_whole(directions("g", source, ((1,),), ((1,),), DType.F32), room())
    assert not any(torch.frombuffer(made, dtype=torch.float32))
    with pytest.raises(IndexError):
        directions("g", source, ((3,),), ((),), DType.F32)
