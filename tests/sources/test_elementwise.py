"""Sums and products element by element, and tensors in another dtype."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import FLOATS, SHAPES, Case, Disk, SourceSuite, draw
from streammerge.errors import RecipeError
from streammerge.sources.elementwise import Elementwise, multiplied, rounded, summed
from streammerge.tensors.dtypes import BY_TORCH_NAME, DType


class TestElementwise(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in FLOATS:
            named = BY_TORCH_NAME[str(dtype)[6:]]
            for shape in SHAPES:
                one, two = draw(shape, dtype, 1), draw(shape, torch.float32, 2)
                sources = [disk.stored(one), disk.stored(two)]
                yield Case(summed(sources, [1.0, 0.25], named), _rounded(one.double() + 0.25 * two.double(), dtype))
                yield Case(multiplied(sources, named), _rounded(one.double() * two.double(), dtype))
        eighth = draw((5, 3), torch.float32).to(torch.float8_e4m3fn)
        yield Case(rounded(disk.stored(eighth), DType.F32), eighth.float())


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (values.float() if dtype == torch.float16 else values).to(dtype)


def test_sums_that_round_nothing_are_one_sum(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    one, two, three = (disk.stored(draw((4,), torch.bfloat16, seed)) for seed in range(3))
    nested = summed([summed([one, two], [1.0, 0.5]), three], [1.0, 2.0], DType.BF16)
    assert isinstance(nested, Elementwise)
    assert (nested.sources, nested.scales) == ((one, two, three), (1.0, 0.5, 2.0))
    inner = summed([one, two], dtype=DType.BF16)
    kept = summed([inner, three])
    assert isinstance(kept, Elementwise)
    assert kept.sources == (inner, three)
    assert rounded(one, DType.BF16) is one
    assert rounded(summed([one, two]), DType.F32) == summed([one, two], dtype=DType.F32)


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(RecipeError, match="cannot be added or multiplied"):
        summed([disk.stored(torch.zeros(3)), disk.stored(torch.zeros(4))])
