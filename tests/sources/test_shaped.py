"""The same elements in another shape, and axes in another order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw
from streammerge.errors import RecipeError
from streammerge.sources.joined import joined
from streammerge.sources.shaped import shaped, turned
from streammerge.sources.stored import Stored


class TestShaped(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            tensor = draw((6, 35), dtype)
            halves = [disk.stored(tensor[:2]), disk.stored(tensor[2:])]
            yield Case(shaped(joined("w", halves), 3, -1, 7), tensor.reshape(3, 10, 7))
            yield Case(shaped(disk.stored(tensor), -1), tensor.reshape(-1))
        for tensor in (draw((301, 433), torch.float32), draw((0, 3), torch.float32), draw((1, 7), torch.float32)):
            yield Case(turned(disk.stored(tensor)), tensor.t().contiguous())
        tensor = draw((6, 5, 4), torch.bfloat16)
        yield Case(turned(disk.stored(tensor), 2, 0, 1), tensor.permute(2, 0, 1).contiguous())


def test_an_expression_is_turned_in_memory(tmp_path: Path) -> None:
    disk, tensor = Disk(tmp_path), draw((4, 6), torch.float32)
    made = turned(joined("w", [disk.stored(tensor[:2]), disk.stored(tensor[2:])]))
    assert made.spec.shape == (6, 4)
    assert made.needs().held_bytes


def test_a_plain_range_stays_one(tmp_path: Path) -> None:
    stored = Disk(tmp_path).stored(draw((4, 6), torch.float32))
    assert isinstance(shaped(stored, 24), Stored)
    assert shaped(stored, 4, 6) is stored
    with pytest.raises(RecipeError, match="has no form"):
        shaped(stored, 5, 5)
