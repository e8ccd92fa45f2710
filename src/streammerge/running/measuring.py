"""Measures on a sample how far results lie from their inputs, while both are at hand.

A worker lets :class:`Taking` look at each chunk, which copies the elements of the sample (:mod:`.sampling`) to
:class:`Measuring`. There those of many chunks are held, and their squares are summed at once.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.planning.tasks import Piece, PieceDone
from streammerge.running.sampling import EMPTY, FIRST, PARTS, SPAN, WINDOW, Array, Sample, of_many, of_one, spans
from streammerge.running.workspace import Inputs
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

_MOST_HELD = 1 << 15
"""Numbers of a sample that are held of each source before they are summed."""
_BITS: dict[int, type[Any]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_WINDOWS = {size: np.dtype((np.void, size * WINDOW)) for size in _BITS}
_SMALL, _LARGE = 1e-25, 1e35
"""Sums of squares in float32 that are sure to be right."""


class Measuring:
    """The sums of squares over the samples of pieces. A worker has one, whose memory it uses again for each unit.

    What is taken of chunks is only copied. It is computed when the memory is full, or at the end of a unit: calls of numpy
    are slow between chunks, which leave nothing of them in the CPU's cache.
    """

    def __init__(self) -> None:
        self._sums = np.zeros((0, 0))
        self._inputs: list[int] = []
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._count = 0
        self._rows: list[Array] = []
        self._begins: list[Array] = []
        self._viewed: Inputs | None = None
        self._views: list[Array | None] = []

    def begin_unit(self, rows: int, inputs: int) -> None:
        """Forgets the unit before. ``rows``: the number of pieces. ``inputs``: the most sources of one."""
        self._sums = np.zeros((rows, 2 * inputs))
        self._inputs = [0] * rows
        self._count = 0
        self._rows.clear()
        self._begins.clear()

    def begin(self, row: int, parts: Sequence[Piece], source: Inputs) -> Taking:
        """Begins with neighbouring pieces, which are made as one. ``row``: the number of the first."""
        dtypes = parts[0].task.out.dtype.component.torch, *(source.dtype(n).torch for n in range(len(source)))
        if dtypes != self._dtypes:
            self._settle()
            self._make_room(dtypes)
        for number in range(row, row + len(parts)):
            self._inputs[number] = len(source)
        return Taking(self, row, parts, source, self._views_of(source))

    def _make_room(self, dtypes: tuple[torch.dtype, ...]) -> None:
        """Takes memory for the numbers of a result and its sources, for their differences, and for squares: in float32, or
        in float64 if any are wider than that. Bits that have this form already are copied to their place, and all others
        into memory of their own."""
        import torch

        self._dtypes = dtypes
        wide, widest = (np.float64, torch.float64) if torch.float64 in dtypes else (np.float32, torch.float32)
        self._numbers = np.zeros((2 * len(dtypes) - 1, _MOST_HELD), wide)
        self._squared = np.empty_like(self._numbers[1:])
        self._bits, self._halves = list[Array](), list["Array | None"]()
        for row, dtype in zip(self._numbers, dtypes, strict=False):
            bits = _BITS[dtype.itemsize]
            self._bits.append(row.view(bits) if dtype == widest else np.empty(_MOST_HELD, bits))
            # bfloat16 is the first half of float32, and the other half stays zero
            half = row.view(np.int16)[sys.byteorder == "little" :: 2]
            self._halves.append(half if dtype == torch.bfloat16 and wide is np.float32 else None)

    def _views_of(self, source: Inputs) -> list[Array | None]:
        """Returns the bits of each source that is mapped."""
        if self._viewed is not source:
            self._viewed, self._views = source, []
            for number in range(len(source)):
                octets = source.octets(number)
                bits = _BITS[source.dtype(number).element_bytes]
                self._views.append(None if octets is None else np.frombuffer(octets, bits))
        return self._views

    def hold(self, row: int, sample: Sample, numbers: Sequence[Array], whole: bool) -> None:
        """Takes a sample of the bits of the result, and of each source. ``row``: of the first piece of the sample.
        ``whole``: whether all are the bits of the whole chunk. Else those that are as many as the sample are the sample."""
        size = len(sample.places)
        if size <= _MOST_HELD:  # nearly always
            if self._count + size > _MOST_HELD:
                self._settle()
            if whole and sample.windows is not None:
                self._take_windows(numbers, sample.windows)
            else:
                self._take(numbers, sample.places, 0, size)
            self._rows.append(sample.rows + row)
            self._begins.append(sample.begins + self._count)
            self._count += size
            return
        for start, stop in ranges(size, _MOST_HELD):
            self._settle()
            self._take(numbers, sample.places, start, stop)
            first, last = _overlapping(sample.begins, start, stop)
            self._rows.append(sample.rows[first:last] + row)
            self._begins.append(np.maximum(sample.begins[first:last] - start, 0))
            self._count = stop - start

    def _take(self, numbers: Sequence[Array], places: Array, start: int, stop: int) -> None:
        count = self._count + stop - start
        for bits, into in zip(numbers, self._bits, strict=True):
            if len(bits) == len(places):
                into[self._count : count] = bits[start:stop]
            else:
                bits.take(places[start:stop], out=into[self._count : count], mode="clip")  # clip: without a copy of them

    def _take_windows(self, numbers: Sequence[Array], windows: Array) -> None:
        count = self._count + len(windows) * WINDOW
        for bits, into in zip(numbers, self._bits, strict=True):
            form = _WINDOWS[bits.itemsize]
            every = bits[: len(bits) // WINDOW * WINDOW].view(form)
            every.take(windows, out=into[self._count : count].view(form), mode="clip")

    def _settle(self) -> None:
        """Adds the sums of what is held."""
        count, self._count = self._count, 0
        if not count:
            return
        first, last = int(self._rows[0][0]), int(self._rows[-1][-1])
        rows, starts = FIRST, FIRST
        if first != last:
            rows, starts = np.concatenate(self._rows), np.concatenate(self._begins)
            new = rows[1:] != rows[:-1]  # a row may have lain in several chunks
            if not new.all():
                new = np.concatenate([FIRST == 0, new])
                rows, starts = rows[new], starts[new]
        self._rows.clear()
        self._begins.clear()
        numbers, inputs = self._numbers[:, :count], len(self._dtypes) - 1
        for number, (bits, half) in enumerate(zip(self._bits, self._halves, strict=True)):
            if half is not None:
                half[:count] = bits[:count]
            elif bits.base is None:  # in memory of its own
                numbers[number] = _widened(bits[:count], self._dtypes[number])
        with np.errstate(all="ignore"):
            np.subtract(numbers[0], numbers[1 : inputs + 1], out=numbers[inputs + 1 :])
            sums = squares(numbers[1:], starts, self._squared[:, :count])
        if first == last:
            into = self._sums[first]
            into[: 2 * inputs : 2] += sums[0, inputs:]
            into[1 : 2 * inputs : 2] += sums[0, :inputs]
        else:
            self._sums[rows, : 2 * inputs : 2] += sums[:, inputs:]
            self._sums[rows, 1 : 2 * inputs : 2] += sums[:, :inputs]

    def drop(self, row: int, count: int) -> None:
        """Drops what was measured of so many pieces."""
        self._settle()
        self._sums[row : row + count] = 0.0

    def put_into(self, made: Sequence[PieceDone]) -> list[PieceDone]:
        """Returns the results of the pieces with what was measured: the first of pieces that follow each other, over as
        many sources, has it for all of them."""
        self._settle()
        norms = np.sqrt(self._sums).astype("<f4")
        found, first = list(made), 0
        for row, inputs in enumerate(self._inputs):
            follows = row + 1 < len(made) and self._inputs[row + 1] == inputs
            if not follows or made[row + 1].number != made[row].number + 1:
                if inputs:
                    measured = norms[first : row + 1, : 2 * inputs].tobytes()
                    found[first] = made[first]._replace(measured=measured)
                first = row + 1
        return found


def _overlapping(begins: Array, start: int, stop: int) -> tuple[int, int]:
    """Returns the first and the last but one of the stretches that begin at ``begins``, of which a part lies there."""
    return int(np.searchsorted(begins, start, "right")) - 1, int(np.searchsorted(begins, stop))


class Taking:
    """Takes the sample of pieces that are made as one, chunk by chunk."""

    def __init__(
        self,
        measuring: Measuring,
        row: int,
        parts: Sequence[Piece],
        source: Inputs,
        views: list[Array | None],
    ) -> None:
        self._measuring, self._row, self._source = measuring, row, source
        self._first = parts[0].start if len(parts) == 1 else 0
        self._sizes = [part.stop - part.start for part in parts]
        self._begins = [0, *accumulate(self._sizes)]
        self._span = (-1, -1)
        self._waits = [*spans(self._sizes[0]), self._sizes[0]] if len(parts) == 1 and self._sizes[0] > PARTS * SPAN else []
        """Where parts of the only piece begin that are not made yet, and its end."""
        self._of_row, self._sample = row, EMPTY
        self._taken: dict[int, Array] = {}
        self._mapped = views
        bits = parts[0].task.out.dtype.component.element_bytes
        self._out_bits = _BITS[bits]
        self.read = self._read if any(view is None for view in views) else source.read
        """Reads a source as :meth:`Inputs.read` does."""

    def _read(self, number: int, start: int, stop: int) -> torch.Tensor:
        """Reads a source, and takes its sample if it is the whole chunk. So nothing is read twice."""
        found = self._source.read(number, start, stop)
        if (
            self._mapped[number] is None
            and number not in self._taken
            and self._span == (start, stop)
            and len(self._sample.places)
        ):
            self._take(number, found)
        return found

    def _take(self, number: int, found: torch.Tensor) -> None:
        import torch

        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
        self._taken[number] = found.view(bits).numpy().take(self._sample.places)

    def move_to(self, start: int, stop: int) -> None:
        """Begins a chunk."""
        self._span = start, stop
        if self._taken:
            self._taken.clear()
        if self._waits and stop - self._first <= self._waits[0]:
            self._sample = EMPTY
        elif len(self._sizes) == 1:
            while self._waits and self._waits[0] + SPAN <= stop - self._first:
                self._waits.pop(0)
            self._sample = of_one(self._sizes[0], start - self._first, stop - self._first)
        else:
            start, stop = start - self._first, stop - self._first
            first = bisect_right(self._begins, start) - 1
            last = bisect_left(self._begins, stop)
            self._of_row = self._row + first
            self._sample = of_many(tuple(self._sizes[first:last]), start - self._begins[first], stop - start)

    def made(self, out: memoryview) -> None:
        """Takes the sample of the chunk's result, and of all sources that were not read."""
        places = self._sample.places
        if not len(places):
            return
        start, stop = self._span
        numbers, whole = [np.frombuffer(out, self._out_bits)], True
        first = self._source.first + start
        for number, mapped in enumerate(self._mapped):
            if mapped is not None:
                numbers.append(mapped[first : first + stop - start])
                continue
            if number not in self._taken:
                self._take(number, self._source.read(number, start, stop))
            numbers.append(self._taken[number])
            whole = False
        self._measuring.hold(self._of_row, self._sample, numbers, whole)


def _widened(bits: Array, dtype: torch.dtype) -> Array:
    """Returns numbers in float32, or in float64 if they are wider than that."""
    import torch

    if dtype in (torch.float32, torch.float64):
        same: Array = bits.view(np.float32 if dtype == torch.float32 else np.float64)
        return same
    return torch.from_numpy(bits).view(dtype).float().numpy()


def squares(numbers: Array, starts: Array, room: Array | None = None) -> Array:
    """Returns the sums of squares of rows of numbers, for each stretch that begins at ``starts``: stretches x rows. The
    second half of the rows are differences of the first. Leaves out where one is NaN or infinite, since those are counted
    elsewhere. ``room``: memory for squares."""
    made: Array = np.add.reduceat(np.multiply(numbers, numbers, out=room), starts, axis=1, dtype=np.float64).T
    least, most = (0.0, math.inf) if numbers.itemsize == 8 else (_SMALL, _LARGE)
    if len(made) == 1:  # the most frequent case, for which methods of numpy are slow
        own = made[0].tolist()
        low, high = min(own), max(own)
    else:
        low, high = made.min(), made.max()
    if low >= least and high < most:
        return made
    half = len(numbers) // 2
    there = np.tile(np.isfinite(numbers[half:]), (2, 1))
    known = np.where(there, numbers, 0).astype(np.float64)
    found: Array = np.add.reduceat(np.multiply(known, known, out=known), starts, axis=1).T
    return found
