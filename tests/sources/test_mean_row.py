"""The mean of all rows of a source."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sources.suite import FLOATS, Case, Disk, SourceSuite, draw
from streammerge.sources.mean_row import mean_rows
from streammerge.sources.rows import gathered


def exact(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Draws numbers whose sums in float64 are exact, so that the order of the terms changes nothing."""
    return ((draw(shape, torch.float32) * 16).round() / 16).to(dtype)


class TestMeanRow(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in FLOATS:
            for shape in ((1, 5), (7,), (6, 2, 3), (3001, 65), (2, 90_001), (1500, 1)):
                tensor = exact(shape, dtype)
                for count in (1, 4):
                    mean = tensor.double().mean(0).to(dtype).expand(count, *shape[1:])
                    yield Case(mean_rows(disk.stored(tensor), count), mean)
        tensor = exact((700, 33), torch.float32)
        rows = list(range(699, 0, -3))
        yield Case(mean_rows(gathered(disk.stored(tensor), rows), 3), tensor[rows].double().mean(0).float().expand(3, 33))
