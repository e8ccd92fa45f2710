"""Sums and products of tensors of one shape, element by element, computed in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Elementwise(Source):
    """``scales[0] * sources[0] + scales[1] * sources[1] + ...``, or the product of all of them if ``multiplied``.

    :func:`summed`, :func:`multiplied` and :func:`rounded` make it.
    """

    spec: TensorSpec
    sources: tuple[Source, ...]
    scales: tuple[float, ...]
    multiplied: bool = False

    def needs(self) -> Needs:
        needed = Needs(scratch_bytes=region_bytes(8 * self.span), computes=True)
        for source in self.sources:
            needed += wide_needs(source, self.span)
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def span(self) -> int:
        """Elements that are computed at once."""
        return min(GRAIN, self.spec.numel)


def summed(sources: Sequence[Source], scales: Sequence[float] | None = None, dtype: DType = DType.F64) -> Source:
    """Returns the sum of tensors, each times its scale, under the first one's name. Raises RecipeError.

    Sums of sums that round nothing are one sum.
    """
    terms: list[tuple[Source, float]] = []
    for source, scale in zip(sources, scales or [1.0] * len(sources), strict=True):
        inner = isinstance(source, Elementwise) and not source.multiplied and source.spec.dtype is DType.F64
        if inner and isinstance(source, Elementwise) and scale == 1.0:
            terms += zip(source.sources, source.scales, strict=True)
        else:
            terms.append((source, scale))
    return _made(sources[0], [source for source, _ in terms], tuple(scale for _, scale in terms), dtype, False)


def multiplied(sources: Sequence[Source], dtype: DType = DType.F64) -> Source:
    """Returns the elementwise product of tensors, under the first one's name. Raises RecipeError."""
    return _made(sources[0], sources, (1.0,) * len(sources), dtype, True)


def rounded(source: Source, dtype: DType) -> Source:
    """Returns a tensor in another dtype."""
    if source.spec.dtype is dtype:
        return source
    if isinstance(source, Elementwise) and source.spec.dtype is DType.F64:
        return replace(source, spec=TensorSpec(source.spec.name, dtype, source.spec.shape))
    return _made(source, [source], (1.0,), dtype, False)


def _made(first: Source, sources: Sequence[Source], scales: tuple[float, ...], dtype: DType, times: bool) -> Source:
    spec = first.spec
    for source in sources:
        if source.spec.shape != spec.shape or source.spec.dtype.kind != "float":
            raise RecipeError(
                f"{printable(spec.name)}: {source.spec.dtype} {list(source.spec.shape)} and {list(spec.shape)} cannot be "
                "added or multiplied"
            )
    return Elementwise(TensorSpec(spec.name, dtype, spec.shape), tuple(sources), scales, times)


class _Reader(Reader):
    def __init__(self, source: Elementwise, room: Room) -> None:
        self._source, self._room, self._span = source, room, source.span
        self._total = room.take(8 * self._span)
        self._wide = [Wide(each, room, self._span) for each in source.sources]

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        source, dtype = self._source, self._source.spec.dtype
        size = dtype.element_bytes
        for begin, end in ranges(stop - start, self._span):
            self._room.halt()
            total = torch.frombuffer(self._total, dtype=torch.float64, count=end - begin)
            for number, (wide, scale) in enumerate(zip(self._wide, source.scales, strict=True)):
                values = wide.read(start + begin, start + end)
                if scale != 1.0:
                    values.mul_(scale)
                if not number:
                    total.copy_(values)
                elif source.multiplied:
                    total.mul_(values)
                else:
                    total.add_(values)
            put(total, out[begin * size : end * size], dtype)
            if not math.isfinite(total.sum()):
                self._tell(total, start + begin, start + end)
        return out

    def _tell(self, total: torch.Tensor, start: int, stop: int) -> None:
        """Announces NaN and infinity that the first source does not have."""
        wrong = total.isfinite().logical_not_().logical_and_(self._wide[0].read(start, stop).isfinite())
        count = int(wrong.sum())
        if count:
            self._room.met(self._source.origin, count)
