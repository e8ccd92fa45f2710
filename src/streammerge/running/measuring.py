"""Measures on a sample how far results lie from their inputs, while both are at hand.

The sample of a piece of n elements is the whole piece up to 256 elements, else about 2 * sqrt(n) of them, from 256 to
4,096: windows of 16 elements, evenly over the piece, or over four spans of 65,536 elements if the piece is longer than
these. Each window lies at another place of its share. So the sample is a function of the piece's length, does not depend on
chunks, workers or the memory, and prefers no row or column of a matrix.
"""

from __future__ import annotations

import math
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
_Sample = tuple["np.ndarray[Any, Any]", Sequence[int], Sequence[int]]
"""Elements of a sample in a chunk, counted from its begin; how many belong to each row, and the rows."""


@lru_cache(maxsize=256)
def _of_one(elems: int, start: int, stop: int) -> np.ndarray[Any, Any]:
    """Returns the elements ``start`` to ``stop`` of a piece that are in its sample, counted from ``start``."""
    own = places(elems)
    first, last = np.searchsorted(own, (start, stop))
    found: np.ndarray[Any, Any] = own[first:last] - start
    return found


class _Held(NamedTuple):
    """Numbers of a sample: those of the result, then those of each source, in their own dtypes. ``counts``: how many
    belong to each row."""

    rows: Sequence[int]
    counts: Sequence[int]
    numbers: list[np.ndarray[Any, Any]]


class Measuring:
    """The sums of squares over the samples of one unit's pieces. ``rows``: the number of pieces."""

    def __init__(self, rows: int, inputs: int) -> None:
        self._sums = np.zeros((rows, 2 * inputs))
        self._inputs = [0] * rows
        self._held: list[_Held] = []
        self._dtypes: tuple[torch.dtype, ...] = ()
        self._count = 0
        self._viewed: Inputs | None = None
        self._views: list[np.ndarray[Any, Any] | None] = []

    def begin(self, row: int, parts: Sequence[Piece], source: Inputs) -> Taking:
        """Begins with neighbouring pieces, which are made as one. ``row``: the number of the first."""
        dtypes = parts[0].task.out.dtype.component.torch, *(source.dtype(n).torch for n in range(len(source)))
        if dtypes != self._dtypes:
            self._settle()
            self._dtypes = dtypes
        for number in range(row, row + len(parts)):
            self._inputs[number] = len(source)
        return Taking(self, row, parts, source, self._views_of(source))

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

    def hold(self, held: _Held) -> None:
        self._held.append(held)
        self._count += len(held.numbers[0])
        if self._count >= _MOST_HELD:
            self._settle()

    def put_into(self, made: Sequence[PieceDone]) -> list[PieceDone]:
        """Returns the results of the pieces with what was measured."""
        self._settle()
        norms = np.sqrt(self._sums).astype("<f4")
        return [
            PieceDone(
                each.number, each.start, each.stop, each.checksum, each.nonfinite, each.found, norms[row, : 2 * n].tobytes()
            )
            if (n := self._inputs[row])
            else each
            for row, each in enumerate(made)
        ]

    def _settle(self) -> None:
        """Adds the sums of what is held."""
        held, self._held, self._count = self._held, [], 0
        if not held:
            return
        counted = [(row, count) for each in held for row, count in zip(each.rows, each.counts, strict=True) if count]
        rows, numbers = [row for row, _ in counted], self._widened(held)
        if rows[0] == rows[-1]:
            starts, own_rows = None, rows[:1]
        else:
            begins = [0, *accumulate(count for _, count in counted)]
            firsts = [n for n, row in enumerate(rows) if not n or row != rows[n - 1]]
            starts, own_rows = np.array([begins[n] for n in firsts]), [rows[n] for n in firsts]
        with np.errstate(all="ignore"):
            apart, norm = squares(numbers[0] - numbers[1:], numbers[1:], starts)
        most = 2 * len(numbers) - 2
        self._sums[own_rows, :most:2] += apart
        self._sums[own_rows, 1:most:2] += norm

    def _widened(self, held: Sequence[_Held]) -> np.ndarray[Any, Any]:
        """Returns what is held as rows of numbers in float32, or in float64 if any are wider than that."""
        columns = [list(own) for own in zip(*(each.numbers for each in held), strict=True)]
        dtypes = self._dtypes
        if len(set(dtypes)) == 1:  # all in one, since each call costs more than its numbers
            columns, dtypes = [[part for own in columns for part in own]], dtypes[:1]
        made = [_widened(np.concatenate(own), dtype) for own, dtype in zip(columns, dtypes, strict=True)]
        return (made[0] if len(made) == 1 else np.stack(made)).reshape(len(self._dtypes), -1)


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
        self._places = _NOTHING
        self._counts: Sequence[int] = []
        self._rows: Sequence[int] = [row]
        self._taken: dict[int, np.ndarray[Any, Any]] = {}
        self._mapped = views
        bits = parts[0].task.out.dtype.component.element_bytes
        self._out_bits = _BITS[bits]
        self.read = self._read if any(view is None for view in views) else source.read
        """Reads a source as :meth:`Inputs.read` does."""

    def _read(self, number: int, start: int, stop: int) -> torch.Tensor:
        """Reads a source, and takes its sample if it is the whole chunk. So nothing is read twice."""
        found = self._source.read(number, start, stop)
        if self._mapped[number] is None and number not in self._taken and self._span == (start, stop) and len(self._places):
            self._take(number, found)
        return found

    def _take(self, number: int, found: torch.Tensor) -> None:
        import torch

        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.dtype.itemsize]
        self._taken[number] = found.view(bits).numpy().take(self._places)

    def move_to(self, start: int, stop: int) -> None:
        """Begins a chunk."""
        self._span = start, stop
        self._taken.clear()
        if len(self._sizes) == 1:
            self._places = _of_one(self._sizes[0], start - self._first, stop - self._first)
            self._counts = [len(self._places)]
        else:
            self._places, self._counts, self._rows = self._sample(start - self._first, stop - self._first)

    def made(self, out: memoryview) -> None:
        """Takes the sample of the chunk's result, and of all sources that were not read."""
        if not len(self._places):
            return
        start, stop = self._span
        numbers = [np.frombuffer(out, self._out_bits).take(self._places)]
        for number, mapped in enumerate(self._mapped):
            if mapped is not None:
                first = self._source.first + start
                numbers.append(mapped[first : first + stop - start].take(self._places))
                continue
            if number not in self._taken:
                self._take(number, self._source.read(number, start, stop))
            numbers.append(self._taken[number])
        self._measuring.hold(_Held(self._rows, self._counts, numbers))

    def _sample(self, start: int, stop: int) -> _Sample:
        """Returns the sample in a chunk of all pieces together."""
        first = bisect_right(self._begins, start) - 1
        last = bisect_left(self._begins, stop)
        sizes = tuple(self._sizes[first:last])
        found, counts = _of_many(sizes, start - self._begins[first], stop - start)
        return found, counts, range(self._row + first, self._row + last)


@lru_cache(maxsize=8)
def _of_many(sizes: tuple[int, ...], skipped: int, length: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Returns the sample in ``length`` elements of neighbouring pieces, counted from their begin, and how many belong to
    each piece. ``skipped``: elements of the first piece before these."""
    found, counts, begin = list[np.ndarray[Any, Any]](), list[int](), -skipped
    for size in sizes:
        own = _of_one(size, max(-begin, 0), min(length - begin, size))
        found.append(own + max(begin, 0))
        counts.append(len(own))
        begin += size
    return np.concatenate(found), counts


def _widened(bits: np.ndarray[Any, Any], dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Returns numbers in float32, or in float64 if they are wider than that."""
    import torch

    if dtype == torch.bfloat16:  # numpy takes less time to begin
        found: np.ndarray[Any, Any] = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return found
    if dtype in (torch.float32, torch.float64):
        same: np.ndarray[Any, Any] = bits.view(np.float32 if dtype == torch.float32 else np.float64)
        return same
    return torch.from_numpy(bits).view(dtype).float().numpy()


def squares(
    apart: np.ndarray[Any, Any], own: np.ndarray[Any, Any], starts: np.ndarray[Any, Any] | None
) -> list[np.ndarray[Any, Any]]:
    """Returns the sums of squares of rows of numbers, for each stretch that begins at ``starts``, None for one stretch:
    stretches x rows. Leaves out where ``apart`` is NaN or infinite, since those are counted elsewhere."""
    made = [_squares(rows, starts) for rows in (apart, own)]
    least, most = (0.0, math.inf) if apart.itemsize == 8 else (_SMALL, _LARGE)
    if all(sums.min() >= least and sums.max() < most for sums in made):
        return made
    there = np.isfinite(apart)
    return [_squares(np.where(there, rows, 0).astype(np.float64), starts) for rows in (apart, own)]


def _squares(rows: np.ndarray[Any, Any], starts: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    if starts is None:
        whole: np.ndarray[Any, Any] = np.einsum("ij,ij->i", rows, rows)[None]
        return whole
    parts: np.ndarray[Any, Any] = np.add.reduceat(rows * rows, starts, axis=1).T
    return parts


def distances(measured: Sequence[bytes]) -> list[float | None]:
    """Returns the distance of a tensor to each input, relative to the input's norm; None if it is not known. ``measured``:
    see :attr:`PieceDone.measured`, of each piece."""
    squared = [[norm * norm for norm in memoryview(each).cast("f")] for each in measured]
    sums = [sum(each) for each in zip(*squared, strict=True)]
    pairs = zip(sums[::2], sums[1::2], strict=True)
    return [math.sqrt(apart / own) if own else (None if apart else 0.0) for apart, own in pairs]
