"""The product of two matrices, times a number: the update that the factors of an adapter make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.wide import Wide, put, wide_needs
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, TensorSpec, ranges

if TYPE_CHECKING:
    import torch

BLOCK_ELEMS = 2 * GRAIN
"""Elements of a block of the product. Blocks are fixed by the shapes, so no sum depends on the order of reading."""
_STRETCH_ELEMS = GRAIN
"""Elements of the right factor that are read at once."""


@dataclass(frozen=True, slots=True)
class Product(Source):
    """``scale * left @ right`` in the shape of ``spec``, computed in float64 and rounded once. :func:`product` makes it.

    ``left``: [n, r], ``right``: [r, m]; or [batch, n, r] and [batch, r, m]. One right matrix is held, rows of the left one
    are read with the rows of the result.
    """

    spec: TensorSpec
    left: Source
    right: Source
    scale: float = 1.0

    def needs(self) -> Needs:
        rank, columns = self.right.spec.shape[-2:]
        scratch = region_bytes(8 * rank * columns) + region_bytes(8 * min(self.block_columns, columns) * self.block_rows)
        needed = Needs(scratch_bytes=scratch, computes=True)
        needed += wide_needs(self.left, self.block_rows * rank)
        return needed + wide_needs(self.right, min(_STRETCH_ELEMS, rank * columns))

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def block_rows(self) -> int:
        """Rows of a block."""
        (rows, rank), columns = self.left.spec.shape[-2:], self.right.spec.shape[-1]
        return max(min(BLOCK_ELEMS // max(columns, 1), BLOCK_ELEMS // max(rank, 1), rows), 1)

    @property
    def block_columns(self) -> int:
        """Columns of a block."""
        return BLOCK_ELEMS


def product(
    name: str,
    left: Source,
    right: Source,
    scale: float = 1.0,
    shape: tuple[int, ...] | None = None,
    dtype: DType = DType.F64,
) -> Product:
    """Returns the product of two matrices, or of two stacks of matrices, as a tensor of ``shape``. Raises RecipeError."""
    a, b = left.spec.shape, right.spec.shape
    if len(a) != len(b) or len(a) not in (2, 3) or a[-1] != b[-2] or a[:-2] != b[:-2]:
        raise RecipeError(f"{printable(name)}: {list(a)} and {list(b)} are no factors of a product")
    made = (*a[:-1], b[-1])
    spec = TensorSpec(name, dtype, shape or made)
    if spec.numel != TensorSpec(name, dtype, made).numel:
        raise RecipeError(f"{printable(name)}: a product of shape {list(made)} is no tensor of shape {list(spec.shape)}")
    return Product(spec, left, right, scale)


class _Reader(Reader):
    """Computes blocks, and keeps the last one for reading in parts."""

    def __init__(self, source: Product, room: Room) -> None:
        (self._rows, self._rank), self._columns = source.left.spec.shape[-2:], source.right.spec.shape[-1]
        self._source, self._room, self._dtype = source, room, source.spec.dtype
        self._at_once, self._wide = source.block_rows, min(source.block_columns, self._columns)
        self._held = room.take(8 * self._rank * self._columns)
        self._made = room.take(8 * self._wide * self._at_once)
        self._left = Wide(source.left, room, self._at_once * self._rank)
        self._stretch = min(_STRETCH_ELEMS, self._rank * self._columns)
        self._right = Wide(source.right, room, self._stretch)
        self._batch = -1
        self._block: tuple[int, int, int] | None = None
        self._values: torch.Tensor | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        size, at = self._dtype.element_bytes, start
        if not self._rank:
            torch.frombuffer(out, dtype=torch.uint8).zero_()
            return out
        while at < stop:
            row, column = divmod(at, self._columns)
            batch, row = divmod(row, self._rows)
            top, left = row // self._at_once * self._at_once, column // self._wide * self._wide
            values = self._computed(batch, top, left)
            right = min(left + self._wide, self._columns)
            if right - left == self._columns:
                first = (batch * self._rows + top) * self._columns
            else:
                first = (batch * self._rows + row) * self._columns + left
            end = min(stop, first + values.numel())
            put(values[at - first : end - first], out[(at - start) * size : (end - start) * size], self._dtype)
            at = end
        return out

    def _computed(self, batch: int, top: int, left: int) -> torch.Tensor:
        """Returns the numbers of a block, in C order. A block of some columns has one row."""
        import torch

        if self._values is not None and self._block == (batch, top, left):
            return self._values
        self._room.halt()
        self._values = None
        if self._batch != batch:
            self._load(batch)
        bottom, right = min(top + self._at_once, self._rows), min(left + self._wide, self._columns)
        begin = (batch * self._rows + top) * self._rank
        rows = self._left.read(begin, begin + (bottom - top) * self._rank).view(-1, self._rank)
        factor = torch.frombuffer(self._held, dtype=torch.float64).view(self._rank, self._columns)[:, left:right]
        count = (bottom - top) * (right - left)
        made = torch.frombuffer(self._made, dtype=torch.float64, count=count).view(bottom - top, right - left)
        torch.mm(rows, factor, out=made)
        self._values, self._block = made.mul_(self._source.scale).view(-1), (batch, top, left)
        return self._values

    def _load(self, batch: int) -> None:
        """Reads the right matrix of a batch."""
        import torch

        self._batch = -1
        whole, count = torch.frombuffer(self._held, dtype=torch.float64), self._rank * self._columns
        for begin, end in ranges(count, self._stretch):
            whole[begin:end].copy_(self._right.read(batch * count + begin, batch * count + end))
        self._batch = batch
