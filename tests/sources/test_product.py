"""Products of two matrices, and of stacks of matrices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import FLOATS, Case, Disk, SourceSuite, room
from streammerge.errors import RecipeError
from streammerge.sources.base import read_whole
from streammerge.sources.permuted import permuted
from streammerge.sources.product import product
from streammerge.tensors.dtypes import BY_TORCH_NAME

SHAPES = ((1, 1, 1), (5, 3, 7), (0, 2, 3), (31, 4, 1), (1, 9, 517), (301, 16, 433))


def small(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Draws small whole numbers, whose sums of products every dtype holds exactly."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class TestProduct(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in FLOATS:
            named = BY_TORCH_NAME[str(dtype)[6:]]
            for rows, rank, columns in SHAPES:
                left, right = small((rows, rank), dtype, 1), small((rank, columns), dtype, 2)
                made = product("w", disk.stored(left), disk.stored(right), 0.5, dtype=named)
                yield Case(made, (0.5 * (left.double() @ right.double())).to(dtype))
        left, right = small((3, 130, 4), torch.bfloat16, 3), small((3, 4, 517), torch.bfloat16, 4)
        stack = (left.double() @ right.double()).float()
        yield Case(product("w", disk.stored(left), disk.stored(right), dtype=BY_TORCH_NAME["float32"]), stack)
        shape = (3 * 130, 11, 47)
        shaped = product("w", disk.stored(left), disk.stored(right), 1.0, shape, BY_TORCH_NAME["float32"])
        yield Case(shaped, stack.reshape(shape))
        wide = small((4, 200_001), torch.float32, 5)  # rows longer than a block
        tall = small((3, 4), torch.float32, 6)
        made = product("w", disk.stored(tall), disk.stored(wide), dtype=BY_TORCH_NAME["float32"])
        yield Case(made, tall @ wide)
        across = product("w", permuted(disk.stored(wide)), permuted(disk.stored(tall)), dtype=BY_TORCH_NAME["float32"])
        yield Case(across, wide.t() @ tall.t())

    def test_real_numbers_are_rounded_once(self, tmp_path: Path) -> None:
        disk, make = Disk(tmp_path), torch.Generator().manual_seed(1)
        left, right = (torch.randn(shape, generator=make) for shape in ((700, 16), (16, 400)))
        made = product("w", disk.stored(left), disk.stored(right), 0.7, dtype=BY_TORCH_NAME["float32"])
        found = torch.frombuffer(read_whole(made, room()), dtype=torch.float32).view(700, 400)
        assert torch.equal(found, (0.7 * (left.double() @ right.double())).float())


def test_factors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, other = Disk(tmp_path).stored(torch.zeros(3, 4)), Disk(tmp_path).stored(torch.zeros(5, 6))
    with pytest.raises(RecipeError, match="no factors of a product"):
        product("w", one, other)
    with pytest.raises(RecipeError, match="no tensor of shape"):
        product("w", one, permuted(one), shape=(2, 2))
