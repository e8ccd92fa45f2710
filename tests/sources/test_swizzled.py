"""Scales in the tiles of cuBLAS, against the place of each one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantised.samples import swizzled
from sources.suite import Case, Disk, SourceSuite
from streammerge.errors import MismatchError
from streammerge.sources.swizzled import unswizzled


class TestSwizzled(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for number, shape in enumerate(((1, 1), (128, 4), (127, 5), (300, 9), (1000, 70))):
            grid = torch.randint(0, 0x70, shape, generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
            grid = grid.view(torch.float8_e4m3fn) if number % 2 else grid
            yield Case(unswizzled(disk.stored(swizzled(grid)), shape), grid)


def test_tiles_must_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(MismatchError, match=r"are no tiles of a grid of 129 x 4 scales"):
        unswizzled(disk.stored(torch.zeros(128, 4).byte()), (129, 4))
    with pytest.raises(MismatchError, match="are no tiles"):
        unswizzled(disk.stored(torch.zeros(128, 1)), (128, 4))
