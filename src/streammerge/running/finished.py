"""The finished pieces of a run as columns: five bytes for each piece of the plan, and two numbers for each input of a piece
if it was measured."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isfinite
from typing import NamedTuple

from streammerge.formats.base import LayoutFile
from streammerge.planning.tasks import MergeTask, Piece, alike, measured_bytes, place_of, where
from streammerge.stores.checksums import Checksum
from streammerge.stores.journal import Finished, Key
from streammerge.tensors.spec import ranges

Part = tuple[int, int, int]
"""Offset in its file, number of bytes, and checksum of a piece."""


class _Long(NamedTuple):
    """A tensor of several pieces. ``first``: the row of its first piece."""

    first: int
    elems: int
    piece_elems: int
    element_bytes: int


class FinishedPieces:
    """Pieces by task and first element. ``files``: the names of the output's files.

    A tensor of one piece has the row of its number. The pieces of longer tensors have the rows after those.
    """

    def __init__(self, tasks: Sequence[MergeTask], files: Sequence[str]) -> None:
        self._tasks, self._files = tasks, files
        self._long: dict[int, _Long] = {}
        rows = len(tasks)
        for number in where(tasks, lambda task: task.elems > task.piece_elems):
            task = tasks[number]
            self._long[number] = _Long(rows, task.elems, task.piece_elems, task.out.dtype.component.element_bytes)
            rows += -(-task.elems // task.piece_elems)
        self._there, self._sums = bytearray(rows), array("I", [0]) * rows
        self._nonfinite: dict[Key, Mapping[str, int]] = {}
        self._measured: _Measured | None = None

    def fits(self, piece: Finished) -> bool:
        """Whether it is a piece of these tasks, at its place in the output."""
        number = piece.task
        if number >= len(self._tasks) or self._row(*piece.key) is None:
            return False
        file, offset, nbytes = self._place(*piece.key)
        if piece.place != (offset, nbytes) or piece.file != self._files[file]:
            return False
        if not piece.measured:
            return True
        count, rest = divmod(len(piece.measured) // 2, measured_bytes(len(self._tasks[number].sources)))
        return not rest and (count == 1 or number + count <= len(self._tasks))

    def add(self, piece: Finished) -> None:
        """Adds a piece of these tasks."""
        row = self._row(*piece.key)
        if row is None:
            raise ValueError(f"task {piece.task} has no piece that begins at element {piece.start}")
        self._there[row], self._sums[row] = 1, piece.checksum
        if piece.nonfinite:
            self._nonfinite[piece.key] = piece.nonfinite
        if piece.measured:
            if self._measured is None:
                most = max(len(task.sources) for task, _ in alike(self._tasks))
                self._measured = _Measured(len(self._there), measured_bytes(most))
            each = measured_bytes(len(self._tasks[piece.task].sources))
            self._measured.put(row, bytes.fromhex(piece.measured), each)

    def forget(self, files: set[str]) -> None:
        """Forgets the pieces in these files."""
        for number, start, row in self._rows():
            if self._files[place_of(self._tasks, number)[0]] in files:
                self._there[row] = 0
                self._nonfinite.pop((number, start), None)
                if self._measured is not None:
                    self._measured.sizes[row] = 0

    def get(self, key: Key) -> Finished:
        """Returns one piece. Raises KeyError if it was not added."""
        row = self._row(*key)
        if row is None or not self._there[row]:
            raise KeyError(key)
        file, offset, nbytes = self._place(*key)
        measured = "" if self._measured is None else self._measured.get(row).hex()
        return Finished(*key, self._files[file], offset, nbytes, self._sums[row], self._nonfinite.get(key, {}), measured)

    def piece(self, key: Key) -> Piece:
        """Returns what is to be made there."""
        number, start = key
        long = self._long.get(number)
        stop = self._tasks[number].elems if long is None else min(start + long.piece_elems, long.elems)
        return Piece(self._tasks[number], number, start, stop)

    def places(self) -> Iterator[tuple[Key, int, tuple[int, int]]]:
        """Yields the key of each piece, the number of its output file, and the offset and number of its bytes there."""
        for number, start, _ in self._rows():
            file, *place = self._place(number, start)
            yield (number, start), file, (place[0], place[1])

    def __len__(self) -> int:
        return sum(self._there)

    def __contains__(self, key: Key) -> bool:
        row = self._row(*key)
        return row is not None and self._there[row] == 1

    def __iter__(self) -> Iterator[Finished]:
        """Yields the pieces in the order of the tasks."""
        return (self.get((number, start)) for number, start, _ in self._rows())

    def nonfinite(self) -> Iterator[tuple[int, Mapping[str, int]]]:
        """Yields the task and the non-finite numbers of each piece that has any."""
        return ((number, found) for (number, _), found in self._nonfinite.items())

    @property
    def tasks(self) -> int:
        """The number of tasks."""
        return len(self._tasks)

    @property
    def measured(self) -> MeasuredTasks:
        """What was measured of each task, its pieces together."""
        count, own = len(self._tasks), self._measured
        if own is None:
            return MeasuredTasks(count, b"", 0, b"")
        longs = [(number, long.first, -(-long.elems // long.piece_elems)) for number, long in self._long.items()]
        return MeasuredTasks(count, own.norms, own.width, own.sizes, longs)

    @property
    def nbytes(self) -> int:
        return sum(self._place(number, start)[2] for number, start, _ in self._rows())

    def by_file(self) -> Iterator[tuple[str, list[Part]]]:
        """Yields the name of each file of the output, and its pieces in the order of their offsets."""
        numbers = [array("I") for _ in self._files]
        for number in range(len(self._tasks)):
            numbers[place_of(self._tasks, number)[0]].append(number)
        for name, own in zip(self._files, numbers, strict=True):
            rows = (each for number in own for each in self._rows_of(number))
            yield name, sorted((*self._place(number, start)[1:], self._sums[row]) for number, start, row in rows)

    def _row(self, number: int, start: int) -> int | None:
        long = self._long.get(number)
        if long is None:
            return None if start else number
        turn, rest = divmod(start, long.piece_elems)
        return None if rest or start >= long.elems else long.first + turn

    def _place(self, number: int, start: int) -> tuple[int, int, int]:
        """Returns the number of a piece's output file, and the offset and number of its bytes there."""
        file, offset, nbytes = place_of(self._tasks, number)
        long = self._long.get(number)
        if long is None:
            return file, offset, nbytes
        elems = min(long.piece_elems, long.elems - start)
        return file, offset + start * long.element_bytes, elems * long.element_bytes

    def _rows(self) -> Iterator[tuple[int, int, int]]:
        """Yields the task, the first element and the row of each piece that was added."""
        for number in range(len(self._tasks)):
            yield from self._rows_of(number)

    def _rows_of(self, number: int) -> Iterator[tuple[int, int, int]]:
        long = self._long.get(number)
        if long is None:
            if self._there[number]:
                yield number, 0, number
            return
        for turn, (start, _) in enumerate(ranges(long.elems, long.piece_elems)):
            if self._there[long.first + turn]:
                yield number, start, long.first + turn


class _Measured:
    """What was measured of each row, up to ``width`` bytes."""

    def __init__(self, rows: int, width: int) -> None:
        self.width, self.sizes, self.norms = width, array("I", [0]) * rows, bytearray(rows * width)

    def put(self, row: int, measured: bytes, each: int) -> None:
        """Puts what was measured of a row, and of those after it. ``each``: bytes of one."""
        rows = len(measured) // each
        self.sizes[row : row + rows] = array("I", [each]) * rows
        if each == self.width:
            self.norms[row * each : row * each + len(measured)] = measured
            return
        for turn in range(rows):
            own = measured[turn * each : (turn + 1) * each].ljust(self.width, b"\0")
            self.norms[(row + turn) * self.width : (row + turn + 1) * self.width] = own

    def get(self, row: int) -> bytes:
        return bytes(self.norms[row * self.width : row * self.width + self.sizes[row]])


class MeasuredTasks:
    """What was measured of each of ``count`` tasks.

    ``norms``: rows of ``width`` bytes with the norms of pieces (:attr:`PieceDone.measured`), of which ``sizes`` are there.
    The row of a task of one piece has its number. ``longs``: number, first row and number of rows of each other task.
    """

    def __init__(
        self,
        count: int,
        norms: bytes | bytearray,
        width: int,
        sizes: Sequence[int] | bytes,
        longs: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        self._count, self._norms, self._width, self._sizes, self._longs = count, norms, width, sizes, longs

    def distances(self) -> list[list[float | None]]:
        """Returns the distances of each task to its sources, relative to the norms of these; None for what is not known. A
        task of which nothing was measured has none."""
        if not self._width:
            return [[]] * self._count
        import numpy as np  # here, because most runs measure nothing

        squares = np.frombuffer(self._norms, "<f4").reshape(-1, self._width // 4).astype(np.float64) ** 2
        all_sizes = np.frombuffer(self._sizes, np.uint32)  # type: ignore[arg-type]
        squares[all_sizes == 0] = 0.0  # pieces that were forgotten
        sums, sizes = squares[: self._count], all_sizes[: self._count].copy()
        for number, first, rows in self._longs:
            sums[number] = squares[first : first + rows].sum(0)
            sizes[number] = max(self._sizes[first : first + rows])
        apart, own = sums[:, ::2], sums[:, 1::2]
        with np.errstate(all="ignore"):
            found = np.where(own > 0, np.sqrt(apart / own), np.where(apart > 0, np.nan, 0.0))
        known = (sizes // 8).tolist()
        if np.isfinite(found).all():
            return [each[:n] for each, n in zip(found.tolist(), known, strict=True)]
        return [[d if isfinite(d) else None for d in each[:n]] for each, n in zip(found.tolist(), known, strict=True)]


def tensor_sums(file: LayoutFile, parts: list[Part], kind: Checksum) -> dict[int, int]:
    """Returns the offset of each tensor of an output file that is not empty -> its checksum, in file order. ``parts``: in
    the order of their offsets."""
    starts = sorted(set(file.offsets.values()))
    found = groupby(parts, lambda part: starts[bisect_right(starts, part[0]) - 1])
    return {start: kind.join(list(own)) for start, own in found}


def other_sum(file: LayoutFile, sums: dict[int, int], kind: Checksum) -> int:
    """Returns the checksum of the bytes outside the tensors of an output file, with a blank receipt."""
    value = 0
    for part in file.around(sums, file.receipt):
        value = kind.update(part.data, value)
    return value
