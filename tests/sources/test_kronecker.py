"""Kronecker products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import Case, Disk, SourceSuite
from sources.test_product import small
from streammerge.errors import RecipeError
from streammerge.sources.kronecker import kronecker
from streammerge.tensors.dtypes import BY_TORCH_NAME


class TestKronecker(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in (torch.float32, torch.bfloat16):
            named = BY_TORCH_NAME[str(dtype)[6:]]
            for one, two in (((1, 1), (1, 1)), ((3, 2), (5, 7)), ((2, 3), (4, 5, 3, 3)), ((7, 11), (43, 31))):
                left, right = small(one, dtype, 1), small(two, dtype, 2)
                wide = left.double().reshape(*one, *(1,) * (len(two) - 2))
                expected = (0.5 * torch.kron(wide, right.double())).to(dtype)
                yield Case(kronecker("w", disk.stored(left), disk.stored(right), 0.5, dtype=named), expected)
        flat = kronecker("w", disk.stored(left), disk.stored(right), 1.0, (301, 341), named)
        yield Case(flat, torch.kron(left.double(), right.double()).to(dtype).reshape(301, 341))


def test_other_factors_are_refused(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(RecipeError, match="no factors of a Kronecker product"):
        kronecker("w", disk.stored(torch.zeros(3)), disk.stored(torch.zeros(2, 2)))
    with pytest.raises(RecipeError, match="no tensor of shape"):
        kronecker("w", disk.stored(torch.zeros(2, 2)), disk.stored(torch.zeros(2, 2)), shape=(8, 2))
