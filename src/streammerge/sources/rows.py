"""Rows of a source along its first axis: a range, or a gather by a list of indices."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from streammerge.errors import RecipeError, printable
from streammerge.sources.base import COPY_BYTES, Needs, Reader, Room, Source, region_bytes
from streammerge.tensors.spec import TensorSpec

_SHORT_BYTES = 4096
_HELD_BYTES = 24
"""Bytes that a reader holds for each run."""


@dataclass(frozen=True)
class Runs:
    """Rows to gather, as runs of neighbours. ``packed``: first row and number of rows of each run, as 64-bit integers.

    A vocabulary in another order has a run for each of its 100,000 tokens or more, so runs are kept as bytes. Several
    tensors share them.
    """

    packed: bytes

    def __len__(self) -> int:
        return len(self.packed) // 16

    def __str__(self) -> str:
        return self.packed.hex()  # a digest of a plan is made from it

    @cached_property
    def numbers(self) -> array[int]:
        """First row and number of rows of each run, alternating."""
        return array("q", self.packed)

    @property
    def rows(self) -> int:
        return sum(self.numbers[1::2])


def runs_of(indices: Iterable[int]) -> Runs:
    """Returns the rows at these indices, in their order. An index may come more than once."""
    packed = array("q")
    begin = end = -1
    for index in indices:
        if index == end:
            end += 1
            continue
        if end > begin:
            packed.extend((begin, end - begin))
        begin, end = index, index + 1
    if end > begin:
        packed.extend((begin, end - begin))
    return Runs(packed.tobytes())


@dataclass(frozen=True, slots=True)
class Rows(Source):
    """The rows of ``source`` in ``runs``, one after the other.

    :func:`rows_of` and :func:`gathered` make it.
    """

    spec: TensorSpec
    source: Source
    runs: Runs

    def needs(self) -> Needs:
        needed = self.source.needs() + Needs(held_bytes=_HELD_BYTES * len(self.runs) if len(self.runs) > 1 else 0)
        if self._short:
            needed += Needs(scratch_bytes=region_bytes(COPY_BYTES), computes=True)
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room, self._short)

    @property
    def row_elems(self) -> int:
        elems = 1
        for size in self.spec.shape[1:]:
            elems *= size
        return elems

    @property
    def _short(self) -> bool:
        """Whether rows are so short that single reads would take most of the time."""
        row_bytes = self.row_elems * self.spec.dtype.element_bytes
        return len(self.runs) > 1 and self.spec.nbytes < len(self.runs) * _SHORT_BYTES and 0 < row_bytes <= _SHORT_BYTES


def rows_of(source: Source, start: int, stop: int) -> Source:
    """Returns rows ``start`` to ``stop`` of a source, as a plain byte range if possible."""
    shape = source.spec.shape
    if not shape or not 0 <= start <= stop <= shape[0]:
        raise RecipeError(f"{printable(source.spec.name)} of shape {list(shape)} has no rows {start} to {stop}")
    if (start, stop) == (0, shape[0]):
        return source
    return source.rows(start, stop) or _made(source, Runs(array("q", (start, stop - start)).tobytes()))


def gathered(source: Source, indices: Iterable[int] | Runs) -> Source:
    """Returns the rows of a source at these indices, in their order. An index may come more than once.

    Neighbouring rows are read together. Raises RecipeError for an index that the source does not have.
    """
    shape = source.spec.shape
    runs = indices if isinstance(indices, Runs) else runs_of(map(int, indices))
    numbers = runs.numbers
    for first, count in zip(numbers[::2], numbers[1::2], strict=True):
        if not shape or first < 0 or first + count > shape[0]:
            wrong = first if first < 0 or not shape else max(first, shape[0])
            raise RecipeError(f"{printable(source.spec.name)} of shape {list(shape)} has no row {wrong}")
    if len(runs) == 1:
        return rows_of(source, numbers[0], numbers[0] + numbers[1])
    return _made(source, runs)


def _made(source: Source, runs: Runs) -> Rows:
    spec = source.spec
    return Rows(TensorSpec(spec.name, spec.dtype, (runs.rows, *spec.shape[1:])), source, runs)


class _Reader(Reader):
    def __init__(self, source: Rows, room: Room, short: bool) -> None:
        self._reader, self._room = source.source.open(room), room
        self._row, self._size = source.row_elems, source.spec.dtype.element_bytes
        self._starts, self._ends = array("q"), array("q")
        end, numbers = 0, source.runs.numbers
        for first, count in zip(numbers[::2], numbers[1::2], strict=True):
            end += count * self._row
            self._starts.append(first * self._row)
            self._ends.append(end)
        self._scratch = room.take(COPY_BYTES) if short else None

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        at, run = start, bisect_right(self._ends, start)
        while at < stop:
            if self._scratch is not None:
                taken = self._together(at, stop, run, out[(at - start) * self._size :], self._scratch)
                if taken > at:
                    at, run = taken, bisect_right(self._ends, taken)
                    continue
            end = min(stop, self._ends[run])
            if end > at:
                self._run(run, at, end, out[(at - start) * self._size : (end - start) * self._size])
            at, run = end, run + 1
        return out

    def _inner(self, run: int, at: int) -> int:
        """Returns the number of the inner source's element that is element ``at`` here."""
        return self._starts[run] + at - (self._ends[run - 1] if run else 0)

    def _run(self, run: int, at: int, end: int, part: memoryview) -> None:
        begin = self._inner(run, at)
        made = self._reader.read(begin, begin + end - at, part)
        if made is not part:
            part[:] = made

    def _together(self, at: int, stop: int, run: int, out: memoryview, scratch: memoryview) -> int:
        """Reads the block of the inner source that holds many short runs, and puts them in order. Returns the element after
        the last one read. This is ``at`` itself when the runs lie too far apart."""
        import torch

        most, row, size = len(scratch) // self._size, self._row, self._size
        if at % row or stop - at < 2 * row:
            return at
        low = high = self._inner(run, at)
        picked: list[int] = []
        end, each = at, run
        while end + row <= stop and each < len(self._ends):
            until = min(stop - (stop - end) % row, self._ends[each])
            begin = self._inner(each, end)
            new_low, new_high = min(low, begin), max(high, begin + until - end)
            if new_high - new_low > most:
                break
            low, high = new_low, new_high
            picked.extend(range(begin // row, (begin + until - end) // row))
            end, each = until, each + 1
        if each - run < 2 or (high - low) * size > max((end - at) * size, (each - run) * _SHORT_BYTES):
            return at
        self._room.halt()
        part = scratch[: (high - low) * size]
        made = self._reader.read(low, high, part)
        table = torch.frombuffer(made, dtype=torch.uint8).view(-1, row * size)
        chosen = torch.tensor(picked) - low // row
        into = torch.frombuffer(out[: (end - at) * size], dtype=torch.uint8).view(-1, row * size)
        torch.index_select(table, 0, chosen, out=into)
        return end
