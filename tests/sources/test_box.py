"""Blocks, single matrices of a stack, and transposed ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from sources.suite import DTYPES, Case, Disk, SourceSuite, draw
from streammerge.sources.box import box
from streammerge.sources.joined import joined
from streammerge.sources.memory import in_memory

BOXES = (
    ((9,), (2,), (4,), (0,)),
    ((5, 7), (0, 0), (5, 7), (0, 1)),
    ((5, 7), (1, 2), (3, 4), (0, 1)),
    ((5, 7), (1, 2), (4, 3), (1, 0)),
    ((4, 6, 5), (2, 0, 0), (6, 5), (1, 2)),
    ((4, 6, 5), (3, 2, 1), (4, 3), (2, 1)),
    ((4, 6, 5), (1, 0, 2), (2, 6, 3), (0, 1, 2)),
    ((4, 9, 3, 3), (0, 4, 0, 0), (4, 5, 3, 3), (0, 1, 2, 3)),
    ((4, 6), (0, 0), (0, 6), (0, 1)),
)


def cut(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...], axes: tuple[int, ...]) -> torch.Tensor:
    for axis, begin in enumerate(start):
        tensor = tensor.narrow(axis, begin, shape[axes.index(axis)] if axis in axes else 1)
    dropped = [axis for axis in range(len(start)) if axis not in axes]
    return tensor.permute(*axes, *dropped).reshape(shape)


class TestBox(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            for shape, *wanted in BOXES:
                tensor = draw(shape, dtype)
                sources = [disk.stored(tensor), in_memory("w", tensor.clone())]
                if tensor.dim() > 1:
                    sources.append(disk.strided(tensor.transpose(0, 1).contiguous().transpose(0, 1)))
                for source in sources:
                    made = box(source, "w", *wanted)
                    assert made is not None
                    yield Case(made, cut(tensor, *wanted))
        array = draw((4, 6, 5), torch.float32)
        made = box(in_memory("w", array.numpy()), "w", (3, 2, 1), (4, 3), (2, 1))
        assert made is not None
        yield Case(made, cut(array, (3, 2, 1), (4, 3), (2, 1)))
        large = draw((40, 301, 433), torch.float32)
        for start, shape, axes in (((7, 0, 0), (433, 301), (2, 1)), ((7, 100, 0), (33, 201, 400), (0, 1, 2))):
            made = box(disk.stored(large), "w", start, shape, axes)
            assert made is not None
            yield Case(made, cut(large, start, shape, axes))


def test_an_expression_has_no_box(tmp_path: Path) -> None:
    one = Disk(tmp_path).stored(draw((3, 4), torch.float32))
    assert box(joined("w", [one, one]), "w", (0, 0), (2, 2), (0, 1)) is None
