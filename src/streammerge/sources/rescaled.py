"""A tensor whose slices along one axis are multiplied by numbers of their own, or are given that norm (DoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Rescaled(Source):
    """``source`` with slice i along ``axis`` multiplied by ``factors[i]``, and divided by its norm if ``normed``.

    Computed in float64, rounded once. The norm is Euclidean, over all other axes; ``epsilon`` is added to it.
    :func:`rescaled` makes it. Along the first axis a slice is a row, and its norm is computed with it. Along another axis
    each worker makes one pass of its own over the tensor.
    """

    spec: TensorSpec
    source: Source
    factors: Source
    axis: int
    normed: bool = False
    epsilon: float = 0.0

    def needs(self) -> Needs:
        count = self.factors.spec.numel
        held = 8 * 3 * count + 8 * 2 * self.span
        needed = Needs(scratch_bytes=region_bytes(8 * self.span), held_bytes=held, computes=True)
        return needed + wide_needs(self.source, self.span) + wide_needs(self.factors, count)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def row(self) -> int:
        """Elements of a slice along the first axis."""
        return self.spec.numel // max(self.spec.shape[0], 1)

    @property
    def span(self) -> int:
        """Elements that are computed at once: a grain, or as many whole rows as are in one."""
        grain = min(GRAIN, self.spec.numel)
        return grain if self.axis or self.row > grain else grain // max(self.row, 1) * self.row


def rescaled(
    source: Source, factors: Source, axis: int, normed: bool = False, epsilon: float = 0.0, dtype: DType = DType.F64
) -> Rescaled:
    """Returns a tensor with its slices along ``axis`` multiplied by ``factors``. Raises RecipeError if they do not fit."""
    shape = source.spec.shape
    if axis >= len(shape) or factors.spec.numel != shape[axis]:
        raise RecipeError(
            f"{printable(source.spec.name)} of shape {list(shape)} has no {factors.spec.numel} slices along axis {axis}"
        )
    return Rescaled(TensorSpec(source.spec.name, dtype, shape), source, factors, axis, normed, epsilon)


class _Reader(Reader):
    def __init__(self, source: Rescaled, room: Room) -> None:
        self._source, self._room, self._span = source, room, source.span
        self._made = room.take(8 * self._span)
        self._values = Wide(source.source, room, self._span)
        self._factors = Wide(source.factors, room, source.factors.spec.numel)
        self._inner = math.prod(source.spec.shape[source.axis + 1 :])
        self._count = source.spec.shape[source.axis]
        self._begin = self._end = 0

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        dtype, at = self._source.spec.dtype, start
        size = dtype.element_bytes
        while at < stop:
            if not self._begin <= at < self._end:
                self._compute(at)
            end = min(stop, self._end)
            made = torch.frombuffer(self._made, dtype=torch.float64)
            part = made[at - self._begin : end - self._begin]
            put(part, out[(at - start) * size : (end - start) * size], dtype)
            at = end
        return out

    def _compute(self, at: int) -> None:
        """Computes the span that contains an element."""
        import torch

        numel, row, span = self._source.spec.numel, self._source.row, self._span
        by_rows = self._source.axis == 0 and self._source.normed
        self._begin = self._end = 0
        if by_rows and row > span:  # spans of one row
            first = at // row * row
            begin = first + (at - first) // span * span
            end = min(begin + span, first + row)
        else:
            begin = at // span * span
            end = min(begin + span, numel)
        self._room.halt()
        vector = self._room.once(self._source, self._vector)
        made = torch.frombuffer(self._made, dtype=torch.float64, count=end - begin)
        if not by_rows:
            made.copy_(self._values.read(begin, end)).mul_(vector[self._slices(begin, end)])
        elif row > span:
            norm = self._row_norm(begin // row)
            made.copy_(self._values.read(begin, end)).mul_(vector[begin // row] / norm)
        else:
            made.copy_(self._values.read(begin, end))
            rows = made.view(-1, row)
            norms = torch.linalg.vector_norm(rows, dim=1).add_(self._source.epsilon)
            rows.mul_((vector[begin // row : end // row] / norms).view(-1, 1))
        self._begin, self._end = begin, end

    def _slices(self, begin: int, end: int) -> torch.Tensor:
        """Returns the number of the slice of each element."""
        import torch

        return torch.arange(begin, end).div_(self._inner, rounding_mode="floor").remainder_(self._count)

    def _row_norm(self, row: int) -> torch.Tensor:
        import torch

        first, total = row * self._source.row, torch.zeros((), dtype=torch.float64)
        for begin, end in ranges(self._source.row, self._span):
            total += self._values.read(first + begin, first + end).square_().sum()
        return total.sqrt_().add_(self._source.epsilon)

    def _vector(self) -> torch.Tensor:
        """Returns the number that each slice is multiplied by; the wanted norms, if those of rows are not known yet."""
        import torch

        source = self._source
        wanted = self._factors.read(0, self._count).clone()
        if not source.normed or source.axis == 0:
            return wanted
        squares = torch.zeros(self._count, dtype=torch.float64)
        for begin, end in ranges(source.spec.numel, self._span):
            self._room.halt()
            squares.index_add_(0, self._slices(begin, end), self._values.read(begin, end).square_())
        return wanted / squares.sqrt_().add_(source.epsilon)
