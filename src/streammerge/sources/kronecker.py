"""The Kronecker product of a small matrix and a tensor, times a number: the update of a LoKr adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Kronecker(Source):
    """``scale * kron(left, right)`` in float64, rounded once. :func:`kronecker` makes it.

    ``left``: [a, b]. ``right``: [c, d, ...]; the result is [a * c, b * d, ...]. Each worker holds both.
    """

    spec: TensorSpec
    left: Source
    right: Source
    scale: float = 1.0

    def needs(self) -> Needs:
        row = self.spec.numel // max(self.spec.shape[0], 1)
        needed = Needs(held_bytes=8 * (self.left.spec.numel + self.right.spec.numel + row), computes=True)
        for source in (self.left, self.right):
            needed += wide_needs(source, min(GRAIN, source.spec.numel))
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def kronecker(
    name: str,
    left: Source,
    right: Source,
    scale: float = 1.0,
    shape: tuple[int, ...] | None = None,
    dtype: DType = DType.F64,
) -> Kronecker:
    """Returns the Kronecker product of a matrix and a tensor of two or more axes, as a tensor of ``shape``.

    Raises RecipeError."""
    a, b = left.spec.shape, right.spec.shape
    if len(a) != 2 or len(b) < 2:
        raise RecipeError(f"{printable(name)}: {list(a)} and {list(b)} are no factors of a Kronecker product")
    made = (a[0] * b[0], a[1] * b[1], *b[2:])
    spec = TensorSpec(name, dtype, shape or made)
    if spec.numel != math.prod(made) or (spec.shape and spec.shape[0] != made[0]):
        raise RecipeError(f"{printable(name)}: a product of shape {list(made)} is no tensor of shape {list(spec.shape)}")
    return Kronecker(spec, left, right, scale)


class _Reader(Reader):
    def __init__(self, source: Kronecker, room: Room) -> None:
        self._source, self._room = source, room
        parts = (source.left, source.right)
        self._wide = [Wide(each, room, min(GRAIN, each.spec.numel)) for each in parts]
        self._row = source.spec.numel // max(source.spec.shape[0], 1)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        left, right = self._room.once(self._source, self._whole)
        dtype, at = self._source.spec.dtype, start
        size = dtype.element_bytes
        while at < stop:
            row, column = divmod(at, self._row)
            outer, inner = divmod(row, right.shape[0])
            end = min(stop, at - column + self._row)
            values = torch.outer(left[outer], right[inner]).view(-1).mul_(self._source.scale)
            put(values[column : column + end - at], out[(at - start) * size : (end - start) * size], dtype)
            at = end
        return out

    def _whole(self) -> list[torch.Tensor]:
        import torch

        parts = []
        for wide, source in zip(self._wide, (self._source.left, self._source.right), strict=True):
            part = torch.empty(source.spec.numel, dtype=torch.float64)
            for begin, end in ranges(source.spec.numel, GRAIN):
                part[begin:end].copy_(wide.read(begin, end))
            parts.append(part.view(source.spec.shape[0], -1))
        return parts
