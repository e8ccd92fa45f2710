"""A grid of scales in the order of cuBLAS: tiles of 128 rows and 4 columns, padded at the edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import MismatchError, printable
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    import torch

_ROWS, _COLUMNS = 128, 4


@dataclass(frozen=True, slots=True)
class Swizzled(Source):
    """The grid of ``spec`` in rows, from its tiles. :func:`unswizzled` makes it."""

    spec: TensorSpec
    tiles: Source

    def needs(self) -> Needs:
        needed = Needs(scratch_bytes=region_bytes(self.strip_bytes), held_bytes=2 * self.strip_bytes, computes=True)
        return needed + self.tiles.needs()

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def padded_columns(self) -> int:
        return -(-self.spec.shape[1] // _COLUMNS) * _COLUMNS

    @property
    def strip_bytes(self) -> int:
        """Bytes of the tiles that lie side by side."""
        return _ROWS * self.padded_columns


def unswizzled(tiles: Source, shape: tuple[int, int]) -> Swizzled:
    """Returns a grid of 8-bit scales of this shape. Raises MismatchError for tiles that cannot hold it."""
    made = Swizzled(TensorSpec(tiles.spec.name, tiles.spec.dtype, shape), tiles)
    if tiles.spec.dtype.element_bytes != 1 or tiles.nbytes != -(-shape[0] // _ROWS) * made.strip_bytes:
        raise MismatchError(
            f"{printable(tiles.spec.name)}: {tiles.spec.dtype} {list(tiles.spec.shape)} are no tiles of a grid of "
            f"{shape[0]} x {shape[1]} scales"
        )
    return made


class _Reader(Reader):
    def __init__(self, source: Swizzled, room: Room) -> None:
        self._source, self._tiles, self._raw = source, source.tiles.open(room), room.take(source.strip_bytes)
        self._strip = -1
        self._rows: torch.Tensor | None = None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        import torch

        columns, at = self._source.spec.shape[1], start
        while at < stop:
            strip = at // columns // _ROWS
            base = strip * _ROWS * columns
            end = min(stop, base + _ROWS * columns)
            into = torch.frombuffer(out[at - start : end - start], dtype=torch.uint8)
            into.copy_(self._rows_of(strip)[at - base : end - base])
            at = end
        return out

    def _rows_of(self, strip: int) -> torch.Tensor:
        """Returns the rows of the tiles that lie side by side, one after the other."""
        import torch

        if self._rows is None or self._strip != strip:
            nbytes = self._source.strip_bytes
            raw = self._tiles.read(strip * nbytes, (strip + 1) * nbytes, self._raw)
            tiles = torch.frombuffer(raw, dtype=torch.uint8).view(-1, _ROWS // 4, 4, _COLUMNS)
            rows = tiles.permute(2, 1, 0, 3).reshape(_ROWS, -1)
            self._rows, self._strip = rows[:, : self._source.spec.shape[1]].reshape(-1), strip
        return self._rows
