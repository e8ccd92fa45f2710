"""Rows of a source: a range, and a gather."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import octets

import streammerge as sm
from sources.suite import DTYPES, Case, Disk, SourceSuite, draw, room
from streammerge.sources.base import read_whole
from streammerge.sources.rows import Rows, gathered, rows_of
from streammerge.sources.stored import Stored


class TestRows(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        chance = random.Random(0)
        for dtype in DTYPES:
            for shape in ((9,), (7, 5), (6, 2, 3), (5, 0)):
                tensor = draw(shape, dtype)
                indices = [chance.randrange(shape[0]) for _ in range(11)]
                yield Case(gathered(disk.stored(tensor), indices), tensor[indices])
                yield Case(rows_of(disk.stored(tensor), 2, 4), tensor[2:4])
                yield Case(
                    rows_of(disk.strided(tensor.t() if tensor.dim() == 2 else tensor), 0, 0),
                    tensor.new_empty((0, *((tensor.t() if tensor.dim() == 2 else tensor).shape[1:]))),
                )
        large = draw((3000, 65), torch.float32)
        for indices in (
            list(range(2999, -1, -1)),
            [chance.randrange(3000) for _ in range(4000)],
            [*range(100, 900), 5, 5, 5, *range(0, 3000, 7)],
            list(range(0, 3000, 2)),
        ):
            yield Case(gathered(disk.stored(large), indices), large[indices])
        line = draw((200_000,), torch.bfloat16)
        indices = [chance.randrange(200_000) for _ in range(70_001)]
        yield Case(gathered(disk.stored(line), indices), line[indices])
        wide = draw((40, 9001), torch.float64)
        indices = [chance.randrange(40) for _ in range(50)]
        yield Case(gathered(disk.stored(wide), indices), wide[indices])


def test_a_range_lies_where_it_lay(tmp_path: Path) -> None:
    tensor = draw((9, 4), torch.float32)
    whole = Disk(tmp_path).stored(tensor)
    assert rows_of(whole, 0, 9) is whole
    part = rows_of(whole, 2, 5)
    assert isinstance(part, Stored)
    assert part.offset == whole.offset + 2 * 16
    assert isinstance(gathered(whole, [2, 3, 4]), Stored)
    assert isinstance(gathered(whole, [2, 4]), Rows)
    assert bytes(read_whole(rows_of(gathered(whole, [8, 2, 4, 0]), 1, 3), room())) == octets(tensor[[2, 4]])


@pytest.mark.parametrize("indices", [[9], [-1], [0, 9]])
def test_rows_that_are_not_there(tmp_path: Path, indices: list[int]) -> None:
    whole = Disk(tmp_path).stored(draw((9, 4), torch.float32))
    with pytest.raises(sm.RecipeError, match="has no row"):
        gathered(whole, indices)
    for start, stop in ((0, 10), (-1, 3), (5, 4)):
        with pytest.raises(sm.RecipeError, match="has no rows"):
            rows_of(whole, start, stop)
    with pytest.raises(sm.RecipeError, match="has no row"):
        gathered(Disk(tmp_path).stored(torch.tensor(1.0)), [0])
