"""Pieces of one tensor, joined along an axis: a tensor cut over several files, or built of several tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import COPY_BYTES, NO_NEEDS, Blob, BlobPath, Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.spec import TensorSpec

_LONG_BYTES = 16 << 10
"""Ranges of this length are read one by one; shorter ones come in blocks of several rows."""


@dataclass(frozen=True, slots=True)
class Joined(Source):
    """``pieces`` one behind the other along ``axis``. :func:`joined` makes it."""

    spec: TensorSpec
    pieces: tuple[Source, ...]
    axis: int

    def needs(self) -> Needs:
        needed = Needs(scratch_bytes=region_bytes(COPY_BYTES), computes=True) if self.interleaved else NO_NEEDS
        for piece in self.pieces:
            needed += piece.needs()
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def parts(self) -> tuple[Source, ...]:
        return self.pieces

    @property
    def ranged(self) -> bool:
        return all(piece.ranged for piece in self.pieces)

    def blobs_of(self, start: int, stop: int) -> Iterator[Blob]:
        widths = self.widths
        row = sum(widths)
        while start < stop:
            first, begin = divmod(start, row)
            count = max((stop - start) // row, 1) if not begin else 1  # whole rows at once, a part of a row alone
            end = min(begin + stop - start, row)
            low = 0
            for piece, width in zip(self.pieces, widths, strict=True):
                a, b = max(begin - low, 0), min(end - low, width)
                if a < b:
                    yield from piece.blobs_of(first * width + a, (first + count - 1) * width + b)
                low += width
            start = (first + count - 1) * row + end

    @property
    def widths(self) -> list[int]:
        """Elements of each piece in one row. A row spans ``axis`` and all later axes."""
        return [math.prod(piece.spec.shape[self.axis :]) for piece in self.pieces]

    @property
    def interleaved(self) -> bool:
        """Whether the pieces alternate in short ranges."""
        if math.prod(self.spec.shape[: self.axis]) <= 1:
            return False
        return min(self.widths) * self.spec.dtype.element_bytes < _LONG_BYTES


def joined(name: str, pieces: Sequence[Source], axis: int = 0) -> Source:
    """Returns the tensor that joins the pieces along ``axis`` (negative: counted from the last axis).

    Leaves out pieces without elements. Raises RecipeError when dtypes or the other sizes differ.
    """
    first = pieces[0].spec
    place = axis + len(first.shape) if axis < 0 else axis
    if not 0 <= place < len(first.shape):
        raise RecipeError(f"{printable(name)}: its pieces have no axis {axis}")
    around = (*first.shape[:place], *first.shape[place + 1 :])
    for piece in pieces:
        shape = piece.spec.shape
        same = len(shape) == len(first.shape) and (*shape[:place], *shape[place + 1 :]) == around
        if not same or piece.spec.dtype != first.dtype:
            raise RecipeError(
                f"{printable(name)}: its pieces do not fit along axis {axis}: {first.dtype} {list(first.shape)} "
                f"and {piece.spec.dtype} {list(shape)}"
            )
    length = sum(piece.spec.shape[place] for piece in pieces)
    spec = TensorSpec(name, first.dtype, (*first.shape[:place], length, *first.shape[place + 1 :]))
    kept = tuple(piece for piece in pieces if piece.spec.numel) or (pieces[0],)
    return kept[0].named(name) if len(kept) == 1 and kept[0].spec.shape == spec.shape else Joined(spec, kept, place)


class _Reader(Reader):
    """Reads the tensor as rows. In each row every piece has a range of columns."""

    def __init__(self, source: Joined, room: Room) -> None:
        self._readers = [piece.open(room) for piece in source.pieces]
        self._widths, self._size = source.widths, source.spec.dtype.element_bytes
        self._ends = list(accumulate(self._widths))
        self._row = self._ends[-1]
        self._room = room
        self._scratch = room.take(COPY_BYTES) if source.interleaved else None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        at, size = start, self._size
        while at < stop:
            row, column = divmod(at, self._row)
            whole = (stop - at) // self._row
            if self._scratch is not None and not column and whole > 1:
                end = at + whole * self._row
                self._rows(row, whole, out[(at - start) * size : (end - start) * size], self._scratch)
            else:
                end = min(stop, (row + 1) * self._row)
                self._columns(row, column, column + end - at, out[(at - start) * size : (end - start) * size])
            at = end
        return out

    def place(self, start: int, stop: int) -> tuple[BlobPath, int] | None:
        row, begin = divmod(start, self._row)
        number = bisect_right(self._ends, begin)
        width = self._widths[number]
        low = self._ends[number] - width
        if begin + stop - start > self._ends[number]:
            return None
        begin += row * width - low
        return self._readers[number].place(begin, begin + stop - start)

    def _columns(self, row: int, begin: int, end: int, out: memoryview) -> None:
        """Reads a range within one row, from each piece its part."""
        number = bisect_right(self._ends, begin)
        while begin < end:
            high, width = self._ends[number], self._widths[number]
            low, stop = high - width, min(end, high)
            part = out[: (stop - begin) * self._size]
            made = self._readers[number].read(row * width + begin - low, row * width + stop - low, part)
            if made is not part:
                part[:] = made
            out, begin, number = out[(stop - begin) * self._size :], stop, number + 1

    def _rows(self, row: int, count: int, out: memoryview, scratch: memoryview) -> None:
        """Reads whole rows. Reads each piece in blocks of rows, and puts these into its columns."""
        import torch

        octets = torch.frombuffer(out, dtype=torch.uint8).view(count, self._row * self._size)
        low = 0
        for reader, width, high in zip(self._readers, self._widths, self._ends, strict=True):
            row_bytes = width * self._size
            at_once = len(scratch) // row_bytes
            for begin in range(0, count, max(at_once, 1)):
                self._room.halt()
                end = min(begin + max(at_once, 1), count)
                if not at_once:  # a row of this piece is long
                    part = out[(begin * self._row + low) * self._size :][:row_bytes]
                    made = reader.read((row + begin) * width, (row + end) * width, part)
                    if made is not part:
                        part[:] = made
                    continue
                made = reader.read((row + begin) * width, (row + end) * width, scratch[: (end - begin) * row_bytes])
                block = torch.frombuffer(made, dtype=torch.uint8).view(end - begin, row_bytes)
                octets[begin:end, low * self._size : high * self._size].copy_(block)
            low = high
