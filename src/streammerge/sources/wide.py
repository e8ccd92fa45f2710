"""The numbers of sources in float64, for readers that compute with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.sources.base import Needs, Room, Source, region_bytes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

_DIRECT = (DType.F64, DType.F32, DType.BF16)
"""Dtypes that torch converts to double quickly. The way of all others is over float32, which is exact too."""


def wide_needs(source: Source, elems: int) -> Needs:
    """Returns the memory of a :class:`Wide` for ``elems`` elements, the source's own reader included."""
    return Needs(scratch_bytes=sum(map(region_bytes, _sizes(source, elems))), computes=True) + source.needs()


def _sizes(source: Source, elems: int) -> list[int]:
    sizes = [elems * source.spec.dtype.element_bytes]
    sizes += [] if source.spec.dtype in _DIRECT else [4 * elems]
    return [*sizes, *([] if source.spec.dtype is DType.F64 else [8 * elems])]


class Wide:
    """Reads up to ``elems`` elements of a source at once, as float64. Its buffers come from the room."""

    def __init__(self, source: Source, room: Room, elems: int) -> None:
        self._reader, self._dtype = source.open(room), source.spec.dtype
        self._regions = [room.take(size) for size in _sizes(source, elems)]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Returns elements ``start`` to ``stop``. The tensor belongs to the caller until the next call."""
        import torch

        part = self._regions[0][: (stop - start) * self._dtype.element_bytes]
        made = self._reader.read(start, stop, part)
        values = torch.frombuffer(made, dtype=self._dtype.torch)
        if self._dtype is DType.F64:
            return values if made is part else torch.frombuffer(part, dtype=torch.float64).copy_(values)
        if self._dtype not in _DIRECT:
            values = torch.frombuffer(self._regions[1], dtype=torch.float32, count=stop - start).copy_(values)
        return torch.frombuffer(self._regions[-1], dtype=torch.float64, count=stop - start).copy_(values)


def not_finite(source: Source, room: Room) -> Source | None:
    """Returns the tensor inside an expression that has a NaN or infinity, the first in its order; None if none has one.
    Reads them all."""
    if source.parts:
        return next((found for part in source.parts if (found := not_finite(part, room)) is not None), None)
    if source.spec.dtype.kind != "float" or not source.spec.numel:
        return None
    wide = Wide(source, room, min(GRAIN, source.spec.numel))
    finite = (bool(wide.read(start, stop).isfinite().all()) for start, stop in ranges(source.spec.numel, GRAIN))
    return None if all(finite) else source


def put(values: torch.Tensor, out: memoryview, dtype: DType) -> None:
    """Rounds float64 numbers into the caller's buffer of this dtype."""
    import torch

    into = torch.frombuffer(out, dtype=dtype.torch)
    into.copy_(values if dtype in _DIRECT else values.float())
