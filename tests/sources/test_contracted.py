"""Small tensors that are computed whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import Case, Disk, SourceSuite, draw
from sources.test_product import small
from streammerge.errors import RecipeError
from streammerge.sources.contracted import contracted
from streammerge.tensors.dtypes import DType


class TestContracted(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        a, b, c = small((5, 3), torch.float32, 1), small((3, 4, 2, 2), torch.bfloat16, 2), small((4, 7), torch.float16, 3)
        expected = torch.einsum("oa,abkl,bi->oikl", a.double(), b.double(), c.double()).float()
        yield Case(contracted("w", "oa,abkl,bi->oikl", *map(disk.stored, (a, b, c)), dtype=DType.F32), expected)
        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((1, 1), (0, 3), (301, 433)):
                tensor = draw(shape, dtype)
                turned = contracted("w", "ab->ba", disk.stored(tensor), dtype=disk.stored(tensor).spec.dtype)
                yield Case(turned, tensor.t().contiguous())


def test_shapes_must_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with pytest.raises(RecipeError, match="do not fit together"):
        contracted("w", "ab,bc->ac", disk.stored(torch.zeros(2, 3)), disk.stored(torch.zeros(4, 5)))
