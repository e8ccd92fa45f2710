"""A tensor whose first axis comes last: views where that is possible, and columns of any other source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw
from streammerge.sources.joined import joined
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.sources.turned import Turned, turned, turned_back


def first_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(*range(1, tensor.dim()), 0).contiguous()


class TestTurned(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            for shape in ((5, 3), (1, 7), (7, 1), (4, 3, 2, 5)):
                tensor = draw(shape, dtype)
                whole = disk.stored(tensor)
                yield Case(turned(whole), first_last(tensor))
                halves = [disk.stored(tensor[:1]), disk.stored(tensor[1:])] if shape[0] > 1 else [whole]
                parts = joined("w", halves, 0)
                yield Case(turned(parts), first_last(tensor))
                yield Case(turned_back(turned(parts), parts.spec), tensor)
        large = draw((301, 433), torch.float32)
        parts = joined("w", [disk.stored(large[:200]), disk.stored(large[200:])], 0)
        yield Case(turned(parts), first_last(large))


def test_views_stay_views(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    tensor = draw((6, 5, 2), torch.bfloat16)
    plain, parts = disk.stored(tensor), joined("w", [disk.stored(tensor[:2]), disk.stored(tensor[2:])], 0)
    assert isinstance(turned(plain), Strided)
    assert isinstance(turned(parts), Turned | Strided)
    back = turned_back(turned(plain), plain.spec)
    assert isinstance(back, Stored)
    assert back == plain
