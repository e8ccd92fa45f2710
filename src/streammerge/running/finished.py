"""The finished pieces of a run. Most are whole tensors, which take a few bytes each and no object."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from streammerge.planning.tasks import MergeTask, place_of
from streammerge.stores.journal import Finished, Key

Part = tuple[int, int, int]
"""Offset in its file, number of bytes, and checksum of a piece."""


class FinishedPieces:
    """Pieces by task and first element. ``files``: the names of the output's files."""

    def __init__(self, tasks: Sequence[MergeTask], files: Sequence[str]) -> None:
        self._tasks, self._files = tasks, files
        self._whole = bytearray(len(tasks))
        self._sums = array("I", bytes(4 * len(tasks)))
        self._others: dict[Key, Finished] = {}

    def add(self, piece: Finished) -> None:
        number = piece.task
        place = place_of(self._tasks, number)
        if piece.nonfinite or piece.place != place[1:] or piece.file != self._files[place[0]]:
            self._others[piece.key] = piece
        else:
            self._whole[number], self._sums[number] = 1, piece.checksum

    def forget(self, files: set[str]) -> None:
        """Forgets the pieces in these files."""
        self._others = {key: piece for key, piece in self._others.items() if piece.file not in files}
        for number, whole in enumerate(self._whole):
            if whole and self._files[place_of(self._tasks, number)[0]] in files:
                self._whole[number] = 0

    def __contains__(self, key: Key) -> bool:
        number, start = key
        return (start == 0 and self._whole[number] == 1) or key in self._others

    def __iter__(self) -> Iterator[Finished]:
        for number, whole in enumerate(self._whole):
            if whole:
                file, offset, nbytes = place_of(self._tasks, number)
                yield Finished(number, 0, self._files[file], offset, nbytes, self._sums[number])
        yield from self._others.values()

    def nonfinite(self) -> Iterator[tuple[int, dict[str, int]]]:
        """Yields the task and the non-finite numbers of each piece that has any."""
        return ((key[0], piece.nonfinite) for key, piece in self._others.items() if piece.nonfinite)

    @property
    def nbytes(self) -> int:
        whole = sum(place_of(self._tasks, number)[2] for number, whole in enumerate(self._whole) if whole)
        return whole + sum(piece.nbytes for piece in self._others.values())

    def by_file(self) -> Iterator[tuple[str, list[Part]]]:
        """Yields the name of each file of the output, and its pieces in the order of their offsets."""
        numbers = {name: array("I") for name in self._files}
        for number, whole in enumerate(self._whole):
            if whole:
                numbers[self._files[place_of(self._tasks, number)[0]]].append(number)
        others: dict[str, list[Part]] = {}
        for piece in self._others.values():
            others.setdefault(piece.file, []).append((*piece.place, piece.checksum))
        for name, own in numbers.items():
            parts = [(*place_of(self._tasks, number)[1:], self._sums[number]) for number in own]
            yield name, sorted([*parts, *others.get(name, ())])
