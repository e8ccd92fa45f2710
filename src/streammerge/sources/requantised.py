"""Numbers as codes with scales again: the two tensors of a quantised weight, made of float32 numbers.

The scale of a block is its largest magnitude by the largest code. A block whose numbers are exactly codes times the scale
that another model has there keeps that scale, so that a model merged with itself comes back in its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.narrow import factor_of, scales_of, scratch_bytes, widened
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

if TYPE_CHECKING:
    import torch

LARGEST: dict[DType, float] = {DType.F8_E4M3: 448.0, DType.F8_E5M2: 57344.0}
"""The largest number of each dtype of codes."""
_SPAN_ELEMS = 32 * GRAIN


@dataclass(frozen=True, slots=True)
class Requantised(Source):
    """The codes of ``whole``, or its scales if ``of_scales``.

    ``codes`` and ``scales``: the dtypes. ``block``, ``height``: as :class:`streammerge.sources.scaled.Scaled` has them.
    ``like``: scales of the same grid that a block keeps if its numbers lie on their codes. ``powers``: whether scales are
    powers of two.
    """

    spec: TensorSpec
    whole: Source
    like: Source
    codes: DType
    scales: DType
    block: tuple[int, int]
    height: int
    powers: bool = False
    of_scales: bool = False

    def needs(self) -> Needs:
        span, columns = self.span_rows * self.columns, self.grid_columns
        sizes = (4 * span, span, scratch_bytes(self.codes, self.columns), self.like.spec.dtype.element_bytes * columns)
        held = 4 * (3 * span + 12 * self.columns + 8 * columns)
        needed = Needs(scratch_bytes=sum(map(region_bytes, sizes)), held_bytes=held, computes=True)
        return needed + self.whole.needs() + self.like.needs()

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def dequantises(self) -> bool:
        return False  # it has the dtype that a file has

    @property
    def columns(self) -> int:
        return max(self.whole.spec.shape[-1], 1)

    @property
    def grid_columns(self) -> int:
        return -(-self.columns // self.block[1])

    @property
    def grid_rows(self) -> int:
        """Rows of blocks in one matrix."""
        return -(-self.height // self.block[0])

    @property
    def span_rows(self) -> int:
        """Rows that are computed at once: those of a block, if they are not too many."""
        return min(self.block[0], max(_SPAN_ELEMS // self.columns, 1))


class _Reader(Reader):
    """Computes spans of rows below one row of scales, and keeps the last one."""

    def __init__(self, source: Requantised, room: Room) -> None:
        self._source, self._room = source, room
        self._whole, self._like = source.whole.open(room), source.like.open(room)
        span = source.span_rows * source.columns
        self._numbers, self._codes = room.take(4 * span), room.take(span)
        self._scratch = room.take(scratch_bytes(source.codes, source.columns))
        self._grid = room.take(source.like.spec.dtype.element_bytes * source.grid_columns)
        self._at = self._made = self._scaled = -1
        self._scales: torch.Tensor | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        return self._read_scales(start, stop, out) if self._source.of_scales else self._read_codes(start, stop, out)

    def _read_scales(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        width, dtype, at = self._source.grid_columns, self._source.scales, start
        while at < stop:
            row, column = divmod(at, width)
            end = min(stop, at - column + width)
            part = _stored(self._scales_at(row)[column : column + end - at], dtype)
            size = dtype.element_bytes
            torch.frombuffer(out[(at - start) * size : (end - start) * size], dtype=torch.uint8).copy_(
                part.view(torch.uint8)
            )
            at = end
        return out

    def _read_codes(self, start: int, stop: int, out: memoryview) -> memoryview:
        columns, at = self._source.columns, start
        while at < stop:
            first, rows = self._span_at(at // columns)
            if self._made != first:
                self._make(first, rows)
            begin = first * columns
            end = min(stop, begin + rows * columns)
            out[at - start : end - start] = self._codes[at - begin : end - begin]
            at = end
        return out

    def _span_at(self, row: int) -> tuple[int, int]:
        """Returns the first row of the span that contains a row, and the number of its rows."""
        source = self._source
        matrix, inner = divmod(row, source.height)
        top = inner // source.block[0] * source.block[0]
        bottom = min(top + source.block[0], source.height)
        first = top + (inner - top) // source.span_rows * source.span_rows
        return matrix * source.height + first, min(source.span_rows, bottom - first)

    def _values(self, first: int, rows: int) -> torch.Tensor:
        """Returns the numbers of whole rows."""
        import torch

        columns = self._source.columns
        part = self._numbers[: 4 * rows * columns]
        if self._at != first:
            self._room.halt()
            self._at = -1
            made = self._whole.read(first * columns, (first + rows) * columns, part)
            if made is not part:
                part[:] = made
            self._at = first
        return torch.frombuffer(part, dtype=torch.float32).view(rows, columns)

    def _make(self, first: int, rows: int) -> None:
        """Computes the codes of a span."""
        import torch

        source = self._source
        matrix, inner = divmod(first, source.height)
        scales = self._scales_at(matrix * source.grid_rows + inner // source.block[0])
        self._made = -1
        made = self._coded(self._values(first, rows), self._wide(scales))
        count = rows * source.columns
        torch.frombuffer(self._codes, dtype=torch.uint8, count=count).copy_(made.view(-1).view(torch.uint8))
        self._made = first

    def _coded(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns numbers divided by scales, as codes. Numbers beyond the largest code become that code."""
        import torch

        most = LARGEST[self._source.codes]
        made = torch.div(values, scales)
        infinite = made.isinf() if self._source.codes is DType.F8_E4M3 and bool(values.isinf().any()) else None
        made.clamp_(-most, most)
        if infinite is not None:
            made.masked_fill_(infinite, torch.nan)  # the dtype has no infinity
        return made.to(self._source.codes.torch)

    def _wide(self, scales: torch.Tensor) -> torch.Tensor:
        """Returns scales with one number for each column."""
        width = self._source.block[1]
        return scales.unsqueeze(-1).expand(len(scales), width).reshape(-1)[: self._source.columns]

    def _scales_at(self, row: int) -> torch.Tensor:
        """Returns a row of the grid of scales, in float32."""
        if self._scales is None or self._scaled != row:
            if self._source.whole.spec.numel and self._source.grid_rows * self._source.grid_columns == 1:
                self._scales = self._room.once(self._source, lambda: self._found(row))
            else:
                self._scales = self._found(row)
            self._scaled = row
        return self._scales

    def _found(self, row: int) -> torch.Tensor:
        """Computes a row of the grid of scales."""
        import torch

        source = self._source
        matrix, inner = divmod(row, source.grid_rows)
        top = matrix * source.height + inner * source.block[0]
        bottom = matrix * source.height + min((inner + 1) * source.block[0], source.height)
        begin = row * source.grid_columns
        made = self._like.read(begin, begin + source.grid_columns, self._grid)
        like = scales_of(made, source.like.spec.dtype).clone()
        largest = torch.zeros(source.grid_columns)
        kept = torch.ones(source.grid_columns, dtype=torch.bool)
        for first in range(top, bottom, source.span_rows):
            values = self._values(first, min(source.span_rows, bottom - first))
            largest = torch.maximum(largest, self._by_block(values.abs().amax(0)))
            for line in range(len(values)):  # mostly the first row tells that no block lies on its grid
                if not bool(kept.any()):
                    break
                kept &= self._on_grid(values[line], like)
        if not bool(largest.isfinite().all()):
            largest = self._of_finite(top, bottom)
        return torch.where(kept, like, self._by_rule(largest))

    def _by_block(self, largest: torch.Tensor) -> torch.Tensor:
        """Returns the largest of the numbers of each block of columns."""
        import torch

        width, columns = self._source.block[1], self._source.columns
        padded = torch.nn.functional.pad(largest, (0, -columns % width))
        return padded.view(-1, width).amax(1)

    def _of_finite(self, top: int, bottom: int) -> torch.Tensor:
        """Returns the largest finite magnitude of each block in a row of blocks."""
        import torch

        largest, step = torch.zeros(self._source.grid_columns), self._source.span_rows
        for first in range(top, bottom, step):
            values = self._values(first, min(step, bottom - first))
            finite = values.nan_to_num(0.0, 0.0, 0.0).abs_()
            largest = torch.maximum(largest, self._by_block(finite.amax(0)))
        return largest

    def _by_rule(self, largest: torch.Tensor) -> torch.Tensor:
        """Returns the scale of each block, as its dtype holds it. Blocks of zeros have the scale 1."""
        import torch

        scales = largest / LARGEST[self._source.codes]
        if self._source.powers:
            scales = scales.double().log2().ceil().exp2().float()
        scales = scales_of(_octets(_stored(scales, self._source.scales)), self._source.scales)
        return torch.where(scales > 0, scales, 1.0)

    def _on_grid(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Whether the numbers of each block in a row are exactly codes times these scales."""
        import torch

        wide = self._wide(like)
        again = torch.empty_like(values)
        widened(_octets(self._coded(values, wide)), self._source.codes, again, self._scratch)
        same = (again.mul_(factor_of(self._source.codes)).mul_(wide) == values).float()
        padded = torch.nn.functional.pad(same, (0, -len(values) % self._source.block[1]), value=1.0)
        return padded.view(-1, self._source.block[1]).amin(1) > 0


def _stored(scales: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Returns float32 scales in the dtype that they are stored in."""
    import torch

    if dtype in (DType.F32, DType.F16, DType.BF16):
        return scales.contiguous().to(dtype.torch)
    exponents = torch.frexp(scales).exponent.int() + 126  # a power of two is 0.5 * 2^exponent
    return exponents.clamp_(0, 254).to(torch.uint8)


def _octets(numbers: torch.Tensor) -> memoryview:
    import torch

    return memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]


def requantised(
    whole: Source, codes: Source, scales: Source, block: tuple[int, int], height: int, powers: bool
) -> tuple[Source, Source]:
    """Returns codes and scales of float32 numbers, like the codes and scales of another weight of the same shape."""
    shape = (whole, scales, codes.spec.dtype, scales.spec.dtype, block, height, powers)
    made = Requantised(TensorSpec(codes.spec.name, codes.spec.dtype, codes.spec.shape), *shape)
    of_scales = Requantised(scales.spec, *shape, of_scales=True)
    return made, of_scales
