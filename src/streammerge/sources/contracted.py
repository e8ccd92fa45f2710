"""A small tensor that is computed whole from other small tensors: a contraction of factors, or other axes."""

from __future__ import annotations

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
class Contracted(Source):
    """``einsum(equation, *sources)`` in float64, held whole by each worker. :func:`contracted` makes it."""

    spec: TensorSpec
    equation: str
    sources: tuple[Source, ...]

    def needs(self) -> Needs:
        largest = sum(source.spec.numel for source in self.sources) + 2 * self.spec.numel
        needed = Needs(held_bytes=8 * largest, computes=True)
        for source in self.sources:
            needed += wide_needs(source, min(GRAIN, source.spec.numel))
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def contracted(name: str, equation: str, *sources: Source, dtype: DType = DType.F64) -> Contracted:
    """Returns the contraction of sources by an equation of einsum, like ``"ia,abkl,bj->ijkl"``. Raises RecipeError.

    Each sum should have two operands, or a few numbers only, because the operands are combined from left to right.
    """
    left, _, right = equation.partition("->")
    sizes: dict[str, int] = {}
    for letters, source in zip(left.split(","), sources, strict=True):
        fits = len(letters) == len(source.spec.shape)
        for letter, size in zip(letters, source.spec.shape, strict=False):
            fits = fits and sizes.setdefault(letter, size) == size
        if not fits:
            shapes = ", ".join(str(list(each.spec.shape)) for each in sources)
            raise RecipeError(f"{printable(name)}: shapes {shapes} do not fit together")
    return Contracted(TensorSpec(name, dtype, tuple(sizes[letter] for letter in right)), equation, sources)


class _Reader(Reader):
    def __init__(self, source: Contracted, room: Room) -> None:
        self._source, self._room = source, room
        self._wide = [Wide(each, room, min(GRAIN, each.spec.numel)) for each in source.sources]

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        whole = self._room.once(self._source, self._whole)
        put(whole[start:stop], out, self._source.spec.dtype)
        return out

    def _whole(self) -> torch.Tensor:
        import torch

        parts = []
        for wide, source in zip(self._wide, self._source.sources, strict=True):
            part = torch.empty(source.spec.numel, dtype=torch.float64)
            for begin, end in ranges(source.spec.numel, GRAIN):
                part[begin:end].copy_(wide.read(begin, end))
            parts.append(part.view(source.spec.shape))
        return torch.einsum(self._source.equation, *parts).contiguous().view(-1)
