"""Measures on a sample how far results lie from their inputs, while both are at hand.

The sample of a piece of n elements is the whole piece up to 256 elements, else about 2 * sqrt(n) of them, from 256 to
4,096: windows of 16 elements, evenly over the piece, or over four spans of 65,536 elements if the piece is longer than
these. Each window lies at another place of its share. So the sample is a function of the piece's length, does not depend on
chunks, workers or the memory, and prefers no row or column of a matrix.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from streammerge.planning.tasks import Piece, PieceDone
from streammerge.running.workspace import Inputs
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

WINDOW = 16
"""Elements that are taken together."""
_LEAST, _PER_ROOT, _MOST = 256, 2, 1 << 12
_PARTS = 4
"""Parts of a long piece that are looked at. So most chunks are not, since what is rarely run is slow."""
_MOST_HELD = 1 << 15
"""Numbers of a sample that are held of each source before they are summed."""
_GOLDEN = 2654435769
"""2^32 divided by the golden ratio: its multiples modulo 2^32 lie evenly."""
_BITS: dict[int, type[Any]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
_SMALL, _LARGE = 1e-25, 1e35
"""Sums of squares in float32 that are sure to be right."""


def sample_size(elems: int) -> int:
    """Returns how many elements of a piece are in its sample."""
    windows = -(-min(max(_PER_ROOT * math.isqrt(elems), _LEAST), _MOST) // WINDOW)
    return elems if elems <= windows * WINDOW else windows * WINDOW


@lru_cache(maxsize=256)
def places(elems: int) -> np.ndarray[Any, Any]:
    """Returns the elements of a piece that are in its sample, in order: int64."""
    size = sample_size(elems)
    if size == elems:
        return np.arange(elems)
    count = size // WINDOW
    if elems <= _PARTS * GRAIN:
        begins = _spread(elems, count, WINDOW)
    else:
        begins = (_spread(elems, _PARTS, GRAIN)[:, None] + _spread(GRAIN, count // _PARTS, WINDOW)).ravel()
    found: np.ndarray[Any, Any] = (begins[:, None] + np.arange(WINDOW)).ravel()
    return found


def _spread(elems: int, count: int, length: int) -> np.ndarray[Any, Any]:
    """Returns where ``count`` spans of ``length`` begin, one in each of as many equal shares of ``elems``."""
    numbers = np.arange(count + 1)
    edges = numbers * elems // count
    turns = numbers[:-1] * _GOLDEN % (1 << 32)
    found: np.ndarray[Any, Any] = edges[:-1] + (turns * (np.diff(edges) - length + 1) >> 32)
    return found


_NOTHING: np.ndarray[Any, Any] = np.empty(0, np.int64)


class _Sample(NamedTuple):
    """Elements of a sample in a chunk, counted from its begin. ``rows`` have any, and theirs begin at ``begins``."""

    places: np.ndarray[Any, Any]
    rows: np.ndarray[Any, Any]
    begins: np.ndarray[Any, Any]


@lru_cache(maxsize=256)
def _of_one(elems: int, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Returns the elements ``start`` to ``stop`` of a piece that are in its sample, counted from ``start``."""
    own = places(elems)
    first, last = np.searchsorted(own, (start, stop))
    found: np.ndarray[Any, Any] = own[first:last] - start
    return found


class Measuring:
    """The sums of squares over the samples of pieces. A worker has one, whose memory it uses again for each unit."""

    def __init__(self) -> None:
        self._sums = np.zeros((0, 0))
        self._inputs: list[int] = []
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._count = 0
        self._rows: list[np.ndarray[Any, Any]] = []
        self._begins: list[np.ndarray[Any, Any]] = []
        self._viewed: Inputs | None = None
        self._views: list[np.ndarray[Any, Any] | None] = []

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
        in float64 if any are wider than that."""
        import torch

        self._dtypes = dtypes
        wide = np.float64 if torch.float64 in dtypes else np.float32
        self._numbers = np.zeros((len(dtypes), _MOST_HELD), wide)
        self._apart = np.empty((len(dtypes) - 1, _MOST_HELD), wide)
        self._squared = np.empty_like(self._apart)
        # bfloat16 is the first half of float32, and the other half stays zero
        halves = self._numbers.view(np.uint16).reshape(*self._numbers.shape, -1)[..., sys.byteorder == "little" and -1]
        self._into = [halves[n] if each == torch.bfloat16 and wide is np.float32 else None for n, each in enumerate(dtypes)]

    def _views_of(self, source: Inputs) -> list[np.ndarray[Any, Any] | None]:
        """Returns the bits of each source that is mapped."""
        if self._viewed is not source:
            self._viewed, self._views = source, []
            for number in range(len(source)):
                octets = source.octets(number)
                bits = _BITS[source.dtype(number).element_bytes]
                self._views.append(None if octets is None else np.frombuffer(octets, bits))
        return self._views

    def drop(self, row: int, count: int) -> None:
        """Drops what was measured of so many pieces."""
        self._settle()
        self._sums[row : row + count] = 0.0

    def hold(self, row: int, sample: _Sample, bits: Sequence[np.ndarray[Any, Any]]) -> None:
        """Takes the bits of a sample: of the result, and of each source. ``row``: of the first piece of the sample."""
        done, size = 0, len(sample.places)
        while done < size:
            taken = min(size - done, _MOST_HELD - self._count)
            whole = taken == size
            first, last = (0, None) if whole else _overlapping(sample.begins, done, done + taken)
            self._rows.append(sample.rows[first:last] + row)
            self._begins.append(np.maximum(sample.begins[first:last] - done, 0) + self._count)
            place = slice(self._count, self._count + taken)
            for number, own in enumerate(bits):
                part, into = own if whole else own[done : done + taken], self._into[number]
                if into is None:
                    self._numbers[number, place] = _widened(part, self._dtypes[number])
                else:
                    into[place] = part
            self._count += taken
            done += taken
            if self._count == _MOST_HELD:
                self._settle()

    def put_into(self, made: Sequence[PieceDone]) -> list[PieceDone]:
        """Returns the results of the pieces with what was measured."""
        self._settle()
        norms = np.sqrt(self._sums).astype("<f4").tobytes()
        width = 4 * self._sums.shape[1]
        return [
            each._replace(measured=norms[row * width : row * width + 8 * n]) if (n := self._inputs[row]) else each
            for row, each in enumerate(made)
        ]

    def _settle(self) -> None:
        """Adds the sums of what is held."""
        count, self._count = self._count, 0
        if not count:
            return
        rows, starts = np.concatenate(self._rows), np.concatenate(self._begins)
        self._rows.clear()
        self._begins.clear()
        if len(rows) > 1:  # a row may have lain in several chunks
            new = np.diff(rows, prepend=-1) != 0
            rows, starts = rows[new], starts[new]
        numbers, squared = self._numbers[:, :count], self._squared[:, :count]
        with np.errstate(all="ignore"):
            apart = np.subtract(numbers[0], numbers[1:], out=self._apart[:, :count])
            away, norm = squares(apart, numbers[1:], starts if len(starts) > 1 else None, squared)
        most = 2 * len(numbers) - 2
        self._sums[rows, :most:2] += away
        self._sums[rows, 1:most:2] += norm


def _overlapping(begins: np.ndarray[Any, Any], start: int, stop: int) -> tuple[int, int]:
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
        views: list[np.ndarray[Any, Any] | None],
    ) -> None:
        self._measuring, self._row, self._source = measuring, row, source
        self._first = parts[0].start if len(parts) == 1 else 0
        self._sizes = [part.stop - part.start for part in parts]
        self._begins = [0, *accumulate(self._sizes)]
        self._span = (-1, -1)
        self._of_row, self._sample = row, _Sample(_NOTHING, _NOTHING, _NOTHING)
        self._taken: dict[int, np.ndarray[Any, Any]] = {}
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
        self._taken.clear()
        if len(self._sizes) == 1:
            found = _of_one(self._sizes[0], start - self._first, stop - self._first)
            self._sample = _Sample(found, _FIRST, _FIRST)
        else:
            start, stop = start - self._first, stop - self._first
            first = bisect_right(self._begins, start) - 1
            last = bisect_left(self._begins, stop)
            self._of_row = self._row + first
            self._sample = _of_many(tuple(self._sizes[first:last]), start - self._begins[first], stop - start)

    def made(self, out: memoryview) -> None:
        """Takes the sample of the chunk's result, and of all sources that were not read."""
        places = self._sample.places
        if not len(places):
            return
        start, stop = self._span
        bits = [np.frombuffer(out, self._out_bits).take(places)]
        first = self._source.first + start
        for number, mapped in enumerate(self._mapped):
            if mapped is not None:
                bits.append(mapped[first : first + stop - start].take(places))
                continue
            if number not in self._taken:
                self._take(number, self._source.read(number, start, stop))
            bits.append(self._taken[number])
        self._measuring.hold(self._of_row, self._sample, bits)


_FIRST: np.ndarray[Any, Any] = np.zeros(1, np.int64)


@lru_cache(maxsize=8)
def _of_many(sizes: tuple[int, ...], skipped: int, length: int) -> _Sample:
    """Returns the sample in ``length`` elements of neighbouring pieces, counted from their begin. ``skipped``: elements of
    the first piece before these."""
    found, counts, begin = list[np.ndarray[Any, Any]](), list[int](), -skipped
    for size in sizes:
        own = _of_one(size, max(-begin, 0), min(length - begin, size))
        found.append(own + max(begin, 0))
        counts.append(len(own))
        begin += size
    rows = np.flatnonzero(counts)
    return _Sample(np.concatenate(found), rows, (np.cumsum(counts) - counts)[rows])


def _widened(bits: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Returns numbers in float32, or in float64 if they are wider than that."""
    import torch

    if dtype in (torch.float32, torch.float64):
        same: np.ndarray[Any, Any] = bits.view(np.float32 if dtype == torch.float32 else np.float64)
        return same
    return torch.from_numpy(bits).view(dtype).float().numpy()


def squares(
    apart: np.ndarray[Any, Any],
    own: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any] | None,
    room: np.ndarray[Any, Any] | None = None,
) -> list[np.ndarray[Any, Any]]:
    """Returns the sums of squares of rows of numbers, for each stretch that begins at ``starts``, None for one stretch:
    stretches x rows. Leaves out where ``apart`` is NaN or infinite, since those are counted elsewhere. ``room``: memory for
    squares."""
    made = [_squares(rows, starts, room) for rows in (apart, own)]
    least, most = (0.0, math.inf) if apart.itemsize == 8 else (_SMALL, _LARGE)
    if all(sums.min() >= least and sums.max() < most for sums in made):
        return made
    there = np.isfinite(apart)
    return [_squares(np.where(there, rows, 0).astype(np.float64), starts, None) for rows in (apart, own)]


def _squares(
    rows: np.ndarray[Any, Any], starts: np.ndarray[Any, Any] | None, room: np.ndarray[Any, Any] | None
) -> np.ndarray[Any, Any]:
    if starts is None:
        whole: np.ndarray[Any, Any] = np.einsum("ij,ij->i", rows, rows)[None]
        return whole
    parts: np.ndarray[Any, Any] = np.add.reduceat(np.multiply(rows, rows, out=room), starts, axis=1).T
    return parts
