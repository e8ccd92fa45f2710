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

LARGEST: dict[DType, float] = {DType.F8_E4M3: 448.0, DType.F8_E5M2: 57344.0, DType.I8: 127.5}
"""What a largest magnitude is divided by to give a scale: the largest number of the codes, or half the range of integers,
as in compressed-tensors."""
_SPAN_ELEMS = 32 * GRAIN
_ROWS_ELEMS = 4 * GRAIN
"""Elements of rows with scales of their own that are computed at once. The merge below is computed grain by grain."""


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
        span, grid = self.span_rows * self.columns, self.span_scales
        checked = self.checked_rows * self.columns
        sizes = (4 * span, span, scratch_bytes(self.codes, checked), self.like.spec.dtype.element_bytes * grid)
        held = 4 * (3 * span + (4 * span if self.by_rows else 12 * self.columns) + 8 * grid)
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
        """Rows that are computed at once: those of a block, if they are not too many, or many rows with own scales."""
        if self.by_rows:
            return max(min(_ROWS_ELEMS // self.columns, self.whole.spec.numel // self.columns), 1)
        return min(self.block[0], max(_SPAN_ELEMS // self.columns, 1))

    @property
    def by_rows(self) -> bool:
        """Whether each row has scales of its own."""
        return self.block[0] == 1

    @property
    def checked_rows(self) -> int:
        """Rows that are compared with the grid of their codes at once."""
        return self.span_rows if self.by_rows else 1

    @property
    def span_scales(self) -> int:
        """Scales of a span."""
        return self.checked_rows * self.grid_columns


class _Reader(Reader):
    """Computes spans of rows, and keeps the last one. They have one row of scales together, or each its own."""

    def __init__(self, source: Requantised, room: Room) -> None:
        self._source, self._room = source, room
        self._whole, self._like = source.whole.open(room), source.like.open(room)
        span = source.span_rows * source.columns
        self._numbers, self._codes = room.take(4 * span), room.take(span)
        self._scratch = room.take(scratch_bytes(source.codes, source.checked_rows * source.columns))
        self._grid = room.take(source.like.spec.dtype.element_bytes * source.span_scales)
        self._at = self._made = self._scaled = -1
        self._scales: torch.Tensor | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        return self._read_scales(start, stop, out) if self._source.of_scales else self._read_codes(start, stop, out)

    def _read_scales(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        width, dtype, at = self._source.grid_columns, self._source.scales, start
        while at < stop:
            row = at // width
            first, rows = self._span_at(row) if self._source.by_rows else (row, 1)
            end, inner = min(stop, (first + rows) * width), at - first * width
            part = _stored(self._scales_at(first).view(-1)[inner : inner + end - at], dtype)
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
        if source.by_rows:
            first = row // source.span_rows * source.span_rows
            return first, min(source.span_rows, source.whole.spec.numel // source.columns - first)
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
        scales = self._scales_at(first if source.by_rows else matrix * source.grid_rows + inner // source.block[0])
        self._made = -1
        made = self._coded(self._values(first, rows), self._wide(scales))
        count = rows * source.columns
        torch.frombuffer(self._codes, dtype=torch.uint8, count=count).copy_(made.view(-1).view(torch.uint8))
        self._made = first

    def _coded(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Returns numbers divided by scales, as codes. Numbers beyond the largest code become that code. Integers have no
        NaN, which a run does not pass on unless it is told to."""
        import torch

        most = LARGEST[self._source.codes]
        made = torch.div(values, scales)
        if self._source.codes is DType.I8:
            return made.round_().clamp_(-128, 127).nan_to_num_(0.0).to(torch.int8)
        infinite = made.isinf() if self._source.codes is DType.F8_E4M3 and bool(values.isinf().any()) else None
        made.clamp_(-most, most)
        if infinite is not None:
            made.masked_fill_(infinite, torch.nan)  # the dtype has no infinity
        return made.to(self._source.codes.torch)

    def _wide(self, scales: torch.Tensor) -> torch.Tensor:
        """Returns rows of scales with one number for each column. One scale for all of a row stays one."""
        source = self._source
        if source.grid_columns == 1:
            return scales
        wide = scales.unsqueeze(-1).expand(*scales.shape, source.block[1])
        return wide.reshape(*scales.shape[:-1], -1)[..., : source.columns]

    def _scales_at(self, row: int) -> torch.Tensor:
        """Returns a row of the grid of scales, or those of the span that begins with this row, in float32."""
        if self._scales is None or self._scaled != row:
            if self._source.by_rows:
                self._scales = self._of_rows(row)
            elif self._source.whole.spec.numel and self._source.grid_rows * self._source.grid_columns == 1:
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

    def _of_rows(self, first: int) -> torch.Tensor:
        """Computes the scales of rows that have their own."""
        import torch

        source = self._source
        values = self._values(*self._span_at(first))
        begin, count = first * source.grid_columns, len(values) * source.grid_columns
        made = self._like.read(begin, begin + count, self._grid[: count * source.like.spec.dtype.element_bytes])
        like = scales_of(made, source.like.spec.dtype).view(len(values), -1)
        largest = self._by_block(values.abs())
        if not bool(largest.isfinite().all()):
            largest = self._by_block(values.nan_to_num(0.0, 0.0, 0.0).abs_())
        return torch.where(self._on_grid(values, like), like, self._by_rule(largest))

    def _by_block(self, largest: torch.Tensor) -> torch.Tensor:
        """Returns the largest of the numbers of each block of columns."""
        import torch

        width, columns = self._source.block[1], self._source.columns
        padded = torch.nn.functional.pad(largest, (0, -columns % width)) if columns % width else largest
        return padded.view(*padded.shape[:-1], -1, width).amax(-1)

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
        stored = scales_of(_octets(_stored(scales, self._source.scales).view(-1)), self._source.scales).view(scales.shape)
        return torch.where(stored > 0, stored, 1.0)

    def _on_grid(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Whether the numbers of each block in a row, or in rows, are exactly codes times these scales."""
        import torch

        wide, width = self._wide(like), self._source.block[1]
        again = torch.empty_like(values)
        widened(_octets(self._coded(values, wide).view(-1)), self._source.codes, again.view(-1), self._scratch)
        same = (again.mul_(factor_of(self._source.codes)).mul_(wide) == values).float()
        if self._source.columns % width:
            same = torch.nn.functional.pad(same, (0, -self._source.columns % width), value=1.0)
        return same.view(*same.shape[:-1], -1, width).amin(-1) > 0


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
