"""Quantised weights with a scale for each block of a matrix: ``(code - zero) * scale``, in float32.

One kind of source for many schemes. A block may be 128 x 128 numbers (DeepSeek), a row (a channel), some columns of a row
(a group), or the whole tensor. Codes are 8-bit floats or integers, or another source that unpacks narrower ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import MismatchError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.narrow import CODES, SCALES, factor_of, fits, scales_of, scratch_bytes, widened
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec

if TYPE_CHECKING:
    import torch


_SPAN_ELEMS = 4 * GRAIN
"""Elements that are computed at once. Fewer would take longer to prepare than to compute."""
_GRID_ELEMS = 1 << 12
"""Scales that are prepared at once, where blocks have several rows. A row of them takes as long as a span of numbers."""


@dataclass(frozen=True, slots=True)
class Scaled(Source):
    """``(codes - zeros) * scales`` in float32. :func:`scaled` makes it.

    ``block``: rows and columns that share a scale. ``height``: the rows of one matrix; the grid of blocks begins anew with
    each matrix of a stack. Blocks at the right and lower edge may be cut. ``zeros``: a grid like that of the scales.
    ``whole``: one number that all scales are multiplied by, or divided by if ``divides``. ``groups``: for each column the
    number of its scale in a row of the grid, where columns are not in the order of their groups.
    """

    spec: TensorSpec
    codes: Source
    scales: Source
    block: tuple[int, int]
    height: int
    zeros: Source | None = None
    whole: Source | None = None
    divides: bool = False
    groups: Source | None = None

    def needs(self) -> Needs:
        span, size = self.span, self.codes.spec.dtype.element_bytes
        scratch = region_bytes(span * size) + region_bytes(scratch_bytes(self.codes.spec.dtype, span))
        scratch += sum(map(region_bytes, self.grid_bytes))
        held = 4 * (3 * self.grid_elems + 4 * self.columns) * (2 if self.zeros is not None else 1)
        needed = Needs(scratch_bytes=scratch, held_bytes=held, computes=True)
        for part in self.parts:
            needed += part.needs()
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def parts(self) -> tuple[Source, ...]:
        own = (self.codes, self.scales, self.zeros, self.whole, self.groups)  # many models have tens of thousands of these
        return tuple([each for each in own if each is not None])

    @property
    def dequantises(self) -> bool:
        return True

    @property
    def columns(self) -> int:
        return self.spec.shape[-1] if self.spec.shape else 1

    @property
    def grid_columns(self) -> int:
        """Scales in a row of the grid."""
        return -(-self.columns // self.block[1])

    @property
    def span(self) -> int:
        """Elements that are computed at once."""
        return min(max(_SPAN_ELEMS, self.columns), self.spec.numel)

    @property
    def grid_elems(self) -> int:
        """Scales that are prepared at once: those of a span at least."""
        if self.block[0] > 1:
            return self.table_rows * self.grid_columns
        return (self.span // max(self.columns, 1) + 1) * self.grid_columns

    @property
    def grid_rows(self) -> int:
        """Rows of scales, of all matrices together."""
        return self.spec.numel // max(self.columns * self.height, 1) * -(-self.height // self.block[0])

    @property
    def table_rows(self) -> int:
        """Rows of scales that are prepared at once, where blocks have several rows."""
        return 1 if self.block[0] == 1 else max(min(_GRID_ELEMS // max(self.grid_columns, 1), self.grid_rows), 1)

    @property
    def grid_bytes(self) -> list[int]:
        sizes = [self.grid_elems * self.scales.spec.dtype.element_bytes]
        sizes += [self.grid_elems * self.zeros.spec.dtype.element_bytes] if self.zeros is not None else []
        sizes += [8 * self.columns] if self.groups is not None else []
        return sizes


def scaled(
    name: str,
    codes: Source,
    scales: Source,
    block: tuple[int, int],
    *,
    zeros: Source | None = None,
    whole: Source | None = None,
    divides: bool = False,
    groups: Source | None = None,
) -> Scaled:
    """Returns quantised weights as float32. A single scale is that of the whole tensor. Raises MismatchError for helper
    tensors that do not fit the weights."""
    shape = codes.spec.shape
    columns, rows = (shape[-1] if shape else 1), (shape[-2] if len(shape) > 1 else 1)
    spec = TensorSpec(name, DType.F32, shape)
    if scales.spec.numel == 1:
        rows = max(math.prod(shape[:-1]), 1)
        block = (rows, max(columns, 1))
    inner = min(block[0], max(rows, 1)), min(block[1], max(columns, 1))
    made = Scaled(spec, codes, scales, inner, rows, zeros, whole, divides, groups)
    wanted = math.prod(shape[:-2]) * -(-rows // made.block[0]) * made.grid_columns if spec.numel else scales.spec.numel
    if codes.spec.dtype not in CODES or scales.spec.dtype not in SCALES or scales.spec.numel != wanted:
        raise MismatchError(
            f"{printable(name)}: {scales.spec.dtype} {list(scales.spec.shape)} of {printable(scales.spec.name)} are no "
            f"scales of {codes.spec.dtype} {list(shape)} in blocks of {block[0]} x {block[1]}"
        )
    if zeros is not None and (zeros.spec.numel != wanted or zeros.spec.dtype not in (DType.I8, *SCALES[:3])):
        raise MismatchError(
            f"{printable(name)}: {zeros.spec.dtype} {list(zeros.spec.shape)} of {printable(zeros.spec.name)} are no zero "
            f"points beside scales of shape {list(scales.spec.shape)}"
        )
    if whole is not None and (whole.spec.numel != 1 or whole.spec.dtype not in SCALES[:3]):
        raise MismatchError(
            f"{printable(name)}: {whole.spec.dtype} {list(whole.spec.shape)} of {printable(whole.spec.name)} is no scale "
            "of a whole tensor"
        )
    if groups is not None and (groups.spec.numel != columns or groups.spec.dtype is not DType.I32):
        raise MismatchError(
            f"{printable(name)}: {groups.spec.dtype} {list(groups.spec.shape)} of {printable(groups.spec.name)} does not "
            f"give the groups of {columns} columns"
        )
    return made


@dataclass(frozen=True, slots=True)
class _Grid:
    """Scales and zero points of some blocks. ``factor``: what the codes are multiplied by before anything else."""

    scales: torch.Tensor
    zeros: torch.Tensor | None
    factor: float

    def with_each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Grid:
        return _Grid(change(self.scales), None if self.zeros is None else change(self.zeros), self.factor)


def _apply(values: torch.Tensor, grid: _Grid) -> None:
    """Makes numbers of codes, in place."""
    if grid.factor != 1.0:
        values.mul_(grid.factor)
    if grid.zeros is not None:
        values.sub_(grid.zeros)
    values.mul_(grid.scales)


class _Reader(Reader):
    """Computes ranges of whole rows below one row of scales; and parts of rows, at the borders of what is asked for."""

    def __init__(self, source: Scaled, room: Room) -> None:
        self._source, self._room = source, room
        self._columns, self._span = max(source.columns, 1), source.span
        self._dtype = source.codes.spec.dtype
        self._codes, self._scales = source.codes.open(room), source.scales.open(room)
        self._zeros = source.zeros.open(room) if source.zeros is not None else None
        self._whole = source.whole.open(room) if source.whole is not None else None
        self._groups = source.groups.open(room) if source.groups is not None else None
        self._raw = room.take(self._span * self._dtype.element_bytes)
        self._halves = room.take(scratch_bytes(self._dtype, self._span))
        self._regions = [room.take(size) for size in source.grid_bytes]
        self._row = self._first = -1
        self._known: _Grid | None = None
        self._table: _Grid | None = None
        self._factor: float | None = None
        self._places: torch.Tensor | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        columns, at = self._columns, start
        values = torch.frombuffer(out, dtype=torch.float32)
        while at < stop:
            self._room.halt()
            row, column = divmod(at, columns)
            rows = 0 if column else min((stop - at) // columns, max(self._span // columns, 1), self._rows_left(row))
            end = at + rows * columns if rows else min(stop, at - column + columns, at + self._span)
            part = values[at - start : end - start]
            raw = self._raw[: (end - at) * self._dtype.element_bytes]
            widened(self._codes.read(at, end, raw), self._dtype, part, self._halves)
            if rows:
                self._scale_rows(part.view(rows, columns), row)
            else:
                self._scale_part(part, row, column)
            at = end
        return out

    def _rows_left(self, row: int) -> int:
        """Returns how many rows from this one on can be scaled together."""
        source = self._source
        if source.block[0] == 1:
            return source.spec.numel // self._columns - row
        inner = row % source.height
        return min(inner // source.block[0] * source.block[0] + source.block[0], source.height) - inner

    def _scale_rows(self, values: torch.Tensor, row: int) -> None:
        """Scales whole rows in place. They have one row of scales together, or each its own."""
        count, (block_rows, width) = values.shape[0], self._source.block
        if block_rows > 1:
            if self._source.groups is not None or (self._columns % width and self._source.grid_columns > 1):
                _apply(values, self._row_of_grid(row))
            elif self._source.grid_columns == 1:
                _apply(values, self._row_of_table(row))
            else:
                grid = self._row_of_table(row)
                _apply(values.view(count, -1, width), grid.with_each(lambda numbers: numbers.unsqueeze(-1)))
            return
        grid = self._grid(row, count)
        if self._source.groups is not None:
            _apply(values, grid.with_each(lambda numbers: numbers[:, self._column_groups()]))
        elif self._source.grid_columns == 1:
            _apply(values, grid)
        elif self._columns % width == 0:
            _apply(values.view(count, -1, width), grid.with_each(lambda numbers: numbers.unsqueeze(-1)))
        else:
            _apply(values, grid.with_each(self._wide))

    def _scale_part(self, values: torch.Tensor, row: int, column: int) -> None:
        """Scales a part of one row in place."""
        end = column + values.numel()
        _apply(values, self._row_of_grid(row).with_each(lambda numbers: numbers[column:end]))

    def _row_of_grid(self, row: int) -> _Grid:
        """Returns the scale of each column of a row, and its zero point."""
        source, at = self._source, self._place(row)
        if self._known is None or self._row != at:
            grid = self._row_of_table(row).with_each(lambda numbers: numbers.unsqueeze(0))
            if source.groups is not None:
                self._known = grid.with_each(lambda numbers: numbers[0, self._column_groups()])
            else:
                self._known = grid.with_each(lambda numbers: self._wide(numbers)[0])
            self._row = at
        return self._known

    def _place(self, row: int) -> int:
        """Returns the row of the grid that a row of numbers has."""
        matrix, inner = divmod(row, self._source.height)
        return matrix * -(-self._source.height // self._source.block[0]) + inner // self._source.block[0]

    def _row_of_table(self, row: int) -> _Grid:
        """Returns the scales of the blocks in a row, and their zero points. Prepares those of the next rows too."""
        at, count = self._place(row), self._source.table_rows
        first = at // count * count
        if self._table is None or self._first != first:
            made = self._grid(first, min(count, max(self._source.grid_rows - first, 1)))
            self._table = made.with_each(lambda numbers: numbers.clone())  # the region holds other scales later
            self._first = first
        return self._table.with_each(lambda numbers: numbers[at - first])

    def _wide(self, grid: torch.Tensor) -> torch.Tensor:
        """Returns rows of the grid with one number for each column."""
        count, width = grid.shape[0], self._source.block[1]
        return grid.unsqueeze(-1).expand(count, grid.shape[1], width).reshape(count, -1)[:, : self._columns]

    def _grid(self, row: int, count: int) -> _Grid:
        """Returns rows of the grid of scales, and of zero points."""
        source, factor, apart = self._source, factor_of(self._dtype), 1.0
        begin, end = row * source.grid_columns, (row + count) * source.grid_columns
        scales = self._numbers(self._scales, source.scales, self._regions[0], begin, end).view(count, -1)
        if source.whole is not None:
            whole = self._of_whole(source.whole)
            scales = scales / whole if source.divides else scales * whole
        zeros = None
        if self._zeros is not None and source.zeros is not None:
            zeros = self._numbers(self._zeros, source.zeros, self._regions[1], begin, end).view(count, -1)
        if factor != 1.0 and zeros is None and fits(scales):
            scales = scales * factor
        else:
            apart = factor
        return _Grid(scales, zeros, apart)

    def _numbers(self, reader: Reader, source: Source, region: memoryview, begin: int, end: int) -> torch.Tensor:
        import torch

        dtype = source.spec.dtype
        made = reader.read(begin, end, region[: (end - begin) * dtype.element_bytes])
        return torch.frombuffer(made, dtype=torch.int8).float() if dtype is DType.I8 else scales_of(made, dtype)

    def _of_whole(self, source: Source) -> float:
        """Returns the number that all scales are multiplied or divided by."""
        if self._factor is None and self._whole is not None:
            made = self._whole.read(0, 1, memoryview(bytearray(source.nbytes)))
            self._factor = float(scales_of(made, source.spec.dtype)[0])
        return self._factor or 0.0

    def _column_groups(self) -> torch.Tensor:
        """Returns for each column the number of its scale. Raises MismatchError if there is no such scale."""
        import torch

        if self._places is None and self._groups is not None:
            made = self._groups.read(0, self._columns, self._regions[-1][: 4 * self._columns])
            places = torch.frombuffer(made, dtype=torch.int32).long()
            if self._columns and not 0 <= int(places.min()) <= int(places.max()) < self._source.grid_columns:
                raise MismatchError(
                    f"{printable(self._source.spec.name)}: its columns have groups beyond the "
                    f"{self._source.grid_columns} scales of a row"
                )
            self._places = places
        return self._places  # type: ignore[return-value]
