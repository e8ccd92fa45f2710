"""The same elements in another shape, and axes in another order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import octets

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw, room
from streammerge.errors import RecipeError
from streammerge.sources.base import read_whole
from streammerge.sources.joined import joined
from streammerge.sources.permuted import permuted, shaped
from streammerge.sources.stored import Stored


class TestPermuted(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            tensor = draw((6, 35), dtype)
            halves = [disk.stored(tensor[:2]), disk.stored(tensor[2:])]
            yield Case(shaped(joined("w", halves), 3, -1, 7), tensor.reshape(3, 10, 7))
            yield Case(shaped(disk.stored(tensor), -1), tensor.reshape(-1))
        for tensor in (draw((301, 433), torch.float32), draw((0, 3), torch.float32), draw((1, 7), torch.float32)):
            yield Case(permuted(disk.stored(tensor)), tensor.t().contiguous())
        tensor = draw((6, 5, 4), torch.bfloat16)
        yield Case(permuted(disk.stored(tensor), 2, 0, 1), tensor.permute(2, 0, 1).contiguous())


def test_a_computed_tensor_is_permuted_too(tmp_path: Path) -> None:
    disk, tensor = Disk(tmp_path), draw((4, 6, 5), torch.bfloat16)
    made = permuted(joined("w", [disk.stored(tensor[:2]), disk.stored(tensor[2:])]), 2, 0, 1)
    assert bytes(read_whole(made, room())) == octets(tensor.permute(2, 0, 1).contiguous())
    assert made.needs().held_bytes
    matrix = permuted(joined("w", [disk.stored(tensor[0]), disk.stored(tensor[1])]))
    assert bytes(read_whole(matrix, room())) == octets(torch.cat([tensor[0], tensor[1]]).t().contiguous())


def test_a_plain_range_stays_one(tmp_path: Path) -> None:
    stored = Disk(tmp_path).stored(draw((4, 6), torch.float32))
    assert isinstance(shaped(stored, 24), Stored)
    assert shaped(stored, 4, 6) is stored
    assert permuted(shaped(stored, 1, 24)).spec.shape == (24, 1)
    with pytest.raises(RecipeError, match="has no form"):
        shaped(stored, 5, 5)
