"""Pieces joined along any axis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streammerge as sm
from sources.suite import DTYPES, Case, Disk, SourceSuite, draw
from streammerge.sources.joined import joined


def cut(tensor: torch.Tensor, sizes: list[int], axis: int) -> list[torch.Tensor]:
    return [part.contiguous() for part in tensor.split(sizes, axis)]


class TestJoined(SourceSuite):
    def cases(self, disk: Disk) -> Iterator[Case]:
        for dtype in DTYPES:
            for shape, axis, sizes in (
                ((9,), 0, [4, 5]),
                ((9, 5), 0, [2, 0, 7]),
                ((9, 5), 1, [1, 4]),
                ((4, 6, 3), 1, [1, 2, 3]),
                ((4, 6, 3), -1, [1, 1, 1]),
                ((0, 6), 1, [2, 4]),
                ((3, 4), 1, [4]),
            ):
                tensor = draw(shape, dtype)
                yield Case(joined("w", [disk.stored(part) for part in cut(tensor, sizes, axis)], axis), tensor)
        for shape, axis, sizes in (
            ((500, 700), 0, [123, 377]),
            ((500, 700), 1, [1, 300, 399]),
            ((90, 30, 70), 2, [35, 35]),
            ((20, 40_000), 1, [39_990, 10]),
            ((3, 70_000), 1, [35_000, 35_000]),
        ):
            large = draw(shape, torch.float32)
            yield Case(joined("w", [disk.stored(part) for part in cut(large, sizes, axis)], axis), large)


def test_what_does_not_fit(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    one = disk.stored(draw((3, 4), torch.float32))
    for other, axis in (
        (draw((3, 5), torch.float32), 0),
        (draw((4, 4), torch.float32), 1),
        (draw((3, 4), torch.bfloat16), 0),
        (draw((12,), torch.float32), 0),
        (draw((3, 4), torch.float32), 2),
        (draw((3, 4), torch.float32), -3),
    ):
        with pytest.raises(sm.RecipeError, match="its pieces"):
            joined("w", [one, disk.stored(other)], axis)


def test_one_piece_is_itself(tmp_path: Path) -> None:
    one = Disk(tmp_path).stored(draw((3, 4), torch.float32))
    assert joined("w", [one]) == one
    assert joined("v", [one]) == one.named("v")
