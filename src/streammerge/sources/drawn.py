"""Random numbers as a tensor: a function of a seed, a name and the element."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.kernels.random import uniform
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Drawn(Source):
    """Numbers in float64: of the normal distribution with deviation 1, or if ``normal`` is false between -1 and 1.

    ``drawn_as``: the name that they depend on. Each grain is computed whole, so no number depends on how it is read.
    """

    spec: TensorSpec
    seed: int
    drawn_as: str
    normal: bool = True

    def needs(self) -> Needs:
        return Needs(scratch_bytes=region_bytes(8 * GRAIN), held_bytes=32 * GRAIN, computes=True)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)


def drawn(name: str, shape: tuple[int, ...], seed: int, normal: bool = True) -> Source:
    """Returns random numbers under a name, which they depend on."""
    return Drawn(TensorSpec(name, DType.F64, shape), seed, name, normal)


class _Reader(Reader):
    def __init__(self, source: Drawn, room: Room) -> None:
        self._source = source
        self._grain = room.take(8 * GRAIN)
        self._begin = -1

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        first = start // GRAIN * GRAIN
        for begin, _ in ranges(stop - first, GRAIN):
            begin += first
            if begin != self._begin:
                self._draw(begin)
            low, high = max(start, begin), min(stop, begin + GRAIN)
            out[(low - start) * 8 : (high - start) * 8] = self._grain[(low - begin) * 8 : (high - begin) * 8]
        return out

    def _draw(self, begin: int) -> None:
        import torch

        into = torch.frombuffer(self._grain, dtype=torch.float64)
        if self._source.normal:  # the method of Box and Muller
            radius = self._uniform(0, begin).neg_().add_(1).log_().mul_(-2).sqrt_()
            torch.mul(radius, self._uniform(1, begin).mul_(2 * math.pi).cos_(), out=into)
        else:
            into.copy_(self._uniform(0, begin).mul_(2).sub_(1))
        self._begin = begin

    def _uniform(self, stream: int, begin: int) -> torch.Tensor:
        import torch

        made, scratch = torch.empty(GRAIN, dtype=torch.float32), torch.empty(GRAIN, dtype=torch.int32)
        return uniform(self._source.seed, self._source.drawn_as, stream, begin, made, scratch).double()
