"""Quantised tensors of torch: integers with a scale and a zero point for the tensor, or for each place on one axis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import FormatError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch

CODES = (DType.I8, DType.U8, DType.I32)
"""Dtypes of the integers."""


@dataclass(frozen=True, slots=True)
class Affine(Source):
    """``(codes - zero) * scale`` in float32, as ``dequantize()`` of torch computes it. :func:`affine` makes it.

    ``scales`` and ``zeros``: a scale and a zero point for each place on ``axis``, in float64 and int64, or both in float32.
    Without them ``scale`` and ``zero`` are those of all elements.
    """

    spec: TensorSpec
    codes: Source
    scale: float = 1.0
    zero: int = 0
    scales: Source | None = None
    zeros: Source | None = None
    axis: int = 0

    def needs(self) -> Needs:
        span = self.span
        made = Needs(scratch_bytes=region_bytes(span * self.codes.spec.dtype.element_bytes), computes=True)
        if self.scales is not None and self.zeros is not None:  # places, scales and products of a span; both tables
            made += Needs(held_bytes=span * (3 * 8 + 2 * 4) + 3 * (self.scales.nbytes + self.zeros.nbytes))
        for part in self.parts:
            made += part.needs()
        return made

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def span(self) -> int:
        """Elements that are computed at once."""
        return min(GRAIN, self.spec.numel)


def affine(
    name: str,
    codes: Source,
    scale: float = 1.0,
    zero: int = 0,
    scales: Source | None = None,
    zeros: Source | None = None,
    axis: int = 0,
) -> Affine:
    """Returns a quantised tensor as float32. Raises FormatError for helpers that do not fit the codes."""
    shape = codes.spec.shape
    fits = codes.spec.dtype in CODES
    if scales is not None and zeros is not None:
        kinds = (scales.spec.dtype, zeros.spec.dtype)
        fits = fits and kinds in ((DType.F64, DType.I64), (DType.F32, DType.F32)) and 0 <= axis < len(shape)
        fits = fits and scales.spec.shape == zeros.spec.shape == (shape[axis],)
    if not fits:
        raise FormatError(f"the quantised tensor {printable(name)} has scales or zero points that do not fit it")
    return Affine(TensorSpec(name, DType.F32, shape), codes, scale, zero, scales, zeros, axis)


class _Reader(Reader):
    def __init__(self, source: Affine, room: Room) -> None:
        self._source, self._room = source, room
        self._codes = source.codes.open(room)
        self._raw = room.take(source.span * source.codes.spec.dtype.element_bytes)
        self._inner = math.prod(source.spec.shape[source.axis + 1 :])
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        source, dtype = self._source, self._source.codes.spec.dtype
        values = torch.frombuffer(out, dtype=torch.float32)
        for begin, end in ranges(stop - start, source.span):
            self._room.halt()
            raw = self._raw[: (end - begin) * dtype.element_bytes]
            codes = torch.frombuffer(self._codes.read(start + begin, start + end, raw), dtype=dtype.torch)
            part = values[begin:end]
            part.copy_(codes)
            if source.scales is None or source.zeros is None:
                part.sub_(float(source.zero)).mul_(source.scale)
            else:
                self._by_channel(part, start + begin, source.scales, source.zeros)
        return out

    def _by_channel(self, part: torch.Tensor, start: int, scales: Source, zeros: Source) -> None:
        """Makes numbers of codes in place. Scales in float64 are multiplied in float64."""
        import torch

        if self._tables is None:
            self._tables = self._table(scales), self._table(zeros).float()
        factors, offsets = self._tables
        places = torch.arange(start, start + part.numel())
        places.floor_divide_(self._inner).remainder_(len(factors))
        part.sub_(offsets[places])
        part.copy_(factors[places].mul_(part))

    def _table(self, source: Source) -> torch.Tensor:
        import torch

        region = memoryview(bytearray(source.nbytes))
        made = source.open(self._room).read(0, source.spec.numel, region)
        return torch.frombuffer(made, dtype=source.spec.dtype.torch).clone()
