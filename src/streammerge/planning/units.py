"""Cuts the work of a plan into units, and shares units out among machines. Both are functions of the plan alone."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streammerge.planning.tasks import MergeTask, Piece, Tasks, pieces, place_of, where
from streammerge.sources.deflated import records
from streammerge.sources.stored import Stored

MOST_TENSORS = 120
"""The most tensors of a unit. Its receipt holds a checksum of each, and is smaller than 1 kB."""
_UNITS = 512
_LEAST_COST, _MOST_COST = 4 << 20, 1 << 30
"""A unit that is lost with its machine costs this much at most, and a unit is no smaller without need."""
_LEAST_PASSED = 256 << 20
"""The least cost of a part of a tensor whose passes several machines share. They exchange files in each pass."""
_LEAST_SENT = 256 << 20
"""The least cost of a part of a file that several machines send. Where two of them meet, a piece of 8 MiB is sent twice."""
_MATRIX = 10
"""What a decomposition costs in bytes: its matrix is read once more for each so many rows or columns, the fewer of both."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Tasks ``start`` to ``stop`` of a plan or, of one long task, elements ``first`` to ``last``.

    ``last``: 0 for whole tasks. ``cost``: about as long as it takes to read so many bytes. ``alone``: whether it is made by
    itself, because all workers of a machine share the passes of a tensor, or because one needs temporary files.
    ``exchanges``: whether the machines that make the other parts of its tensor share the passes too.
    """

    number: int
    start: int
    stop: int
    cost: int
    alone: bool = False
    first: int = 0
    last: int = 0

    @property
    def name(self) -> str:
        return str(self.number)

    @property
    def exchanges(self) -> bool:
        return self.alone and self.last > 0

    def pieces(self, tasks: Sequence[MergeTask]) -> Iterator[Piece]:
        """Yields the pieces of the unit in their order."""
        for number in range(self.start, self.stop):
            yield from self.pieces_of(tasks[number], number)

    def pieces_of(self, task: MergeTask, number: int) -> Iterator[Piece]:
        """Yields the pieces of one of its tasks."""
        return filter(self.holds, pieces(task, number))

    def holds(self, piece: Piece) -> bool:
        """Whether a piece of one of its tasks is in the unit."""
        return not self.last or self.first <= piece.start < self.last

    def row(self) -> list[int]:
        """Returns the unit as plain data, without its number."""
        return [self.start, self.stop, self.cost, int(self.alone), self.first, self.last]

    @classmethod
    def of_row(cls, number: int, row: Sequence[int]) -> Unit:
        start, stop, cost, alone, first, last = row
        return cls(number, start, stop, cost, bool(alone), first, last)


def cut(tasks: Sequence[MergeTask], whole_files: bool = False, shares_files: bool = True) -> list[Unit]:
    """Returns the units of all tasks. Each holds neighbours, and one unit at least a piece.

    ``whole_files``: makes a unit of each output file instead, of tasks in the order of the output, and several units of a
    large one if it ``shares_files``.
    """
    costs = _of_each(tasks)
    if whole_files:
        return _files(tasks, costs, shares_files)
    alone = {*where(tasks, _is_alone)}
    long = {*where(tasks, lambda task: task.elems > task.piece_elems)} - alone
    passed = {*where(tasks, _passes_are_shared)} if alone else set()
    most = min(max(sum(costs) // _UNITS, _LEAST_COST), _MOST_COST)
    made: list[Unit] = []
    start, cost = 0, 0

    def end(stop: int) -> None:
        if stop > start:
            made.append(Unit(len(made), start, stop, cost, not alone.isdisjoint(range(start, stop))))

    for number in range(len(tasks)):
        least = max(most, _LEAST_PASSED if number in passed else 0)
        if costs[number] > least and (number in long or (number in passed and costs[number] >= 2 * least)):
            end(number)
            made += _parts(tasks[number], number, costs[number], least, len(made), number in passed)
            start, cost = number + 1, 0
            continue
        if cost + costs[number] > most or number - start >= MOST_TENSORS:
            end(number)
            start, cost = number, 0
        cost += costs[number]
    end(len(tasks))
    return made


def _files(tasks: Sequence[MergeTask], costs: Sequence[int], shared: bool) -> list[Unit]:
    """Returns the units of files that are sent. Several machines can send one file if no byte lies between its tensors."""
    files = [place_of(tasks, number)[0] for number in range(len(tasks))]
    starts = [number for number, file in enumerate(files) if not number or file != files[number - 1]]
    most = max(min(sum(costs) // _UNITS, _MOST_COST), _LEAST_SENT)
    long = {*where(tasks, lambda task: not _is_alone(task) or _passes_are_shared(task))}
    made: list[Unit] = []
    for start, stop in zip(starts, [*starts[1:], len(files)], strict=True):
        if not shared or sum(costs[start:stop]) < 2 * most or not _touch(tasks, start, stop):
            made.append(Unit(len(made), start, stop, sum(costs[start:stop]), alone=True))
            continue
        cost = 0
        for number in range(start, stop):
            task = tasks[number]
            parts = number in long and task.elems > task.piece_elems and costs[number] >= 2 * most
            if start < number and (parts or cost + costs[number] > most):
                made.append(Unit(len(made), start, number, cost, alone=True))
                start, cost = number, 0
            cost += costs[number]
            if parts:
                made += _parts(task, number, costs[number], most, len(made), alone=True)
                start, cost = number + 1, 0
        if start < stop:
            made.append(Unit(len(made), start, stop, cost, alone=True))
    return made


def _touch(tasks: Sequence[MergeTask], start: int, stop: int) -> bool:
    """Whether the tensors of a file lie one behind the other without a gap."""
    end = None
    for number in range(start, stop):
        _, offset, nbytes = place_of(tasks, number)
        if nbytes and end not in (None, offset):
            return False
        end = offset + nbytes if nbytes else end
    return True


def _parts(task: MergeTask, number: int, cost: int, most: int, units: int, alone: bool) -> Iterator[Unit]:
    """Yields units that are parts of one long tensor. Each is some pieces."""
    each = task.piece_elems
    several = max(most * each // max(cost * each // task.elems, 1) // each, 1) * each
    if alone:  # of equal size, because machines wait for the last one in each pass
        count = -(-task.elems // several)
        several = -(-task.elems // (count * each)) * each
    for turn, first in enumerate(range(0, task.elems, several)):
        last = min(first + several, task.elems)
        yield Unit(units + turn, number, number + 1, cost * (last - first) // task.elems, alone, first, last)


def _passes_are_shared(task: MergeTask) -> bool:
    """Whether machines can share the passes of a tensor: it needs no temporary files, and reads no other merge."""
    return task.spread and not task.to_turn and not task.nested and not any(any(records(s)) for s in task.sources)


def _is_alone(task: MergeTask) -> bool:
    return (
        task.spread
        or task.of_one
        or task.to_turn
        or any(s.__class__ is not Stored and any(records(s)) for s in task.sources)
    )


def _cost(task: MergeTask) -> int:
    read = task.read_bytes
    if task.method.whole or task.to_turn:
        read += read * min(task.shape, default=1) // _MATRIX
    elif task.method.passes:
        read *= 2
    return read + task.out.nbytes


def _of_each(tasks: Sequence[MergeTask]) -> array[int]:
    """Returns the cost of each task."""
    if not isinstance(tasks, Tasks):
        return array("Q", map(_cost, tasks))
    known: dict[int, int] = {}
    costs = array("Q")
    for number, made in enumerate(tasks.made):
        if id(made) not in known:
            known[id(made)] = _cost(tasks[number])
        costs.append(known[id(made)])
    return costs


def share(units: Sequence[Unit], number: int, shares: int) -> list[Unit]:
    """Returns the units of one of ``shares`` shares, which have nearly equal costs.

    Units that cost more than a quarter of a share go to the share that has the least. The others are cut into runs of
    neighbours.
    """
    total = sum(unit.cost for unit in units)
    large = {unit.number for unit in units if unit.cost * shares * 4 > total}
    loads = [(0, each) for each in range(shares)]
    mine: list[Unit] = []
    for unit in sorted((unit for unit in units if unit.number in large), key=lambda unit: (-unit.cost, unit.number)):
        load, least = heapq.heappop(loads)
        heapq.heappush(loads, (load + unit.cost, least))
        if least == number:
            mine.append(unit)
    filled = [load for load, _ in sorted(loads, key=lambda each: each[1])]
    rest = [unit for unit in units if unit.number not in large]
    level = _level(filled, sum(unit.cost for unit in rest))
    ends, reached = [], 0.0
    for load in filled:
        reached += max(level - load, 0)
        ends.append(reached)
    begun, turn = 0, 0
    for unit in rest:
        while turn < shares - 1 and begun + unit.cost / 2 > ends[turn]:
            turn += 1
        if turn == number:
            mine.append(unit)
        begun += unit.cost
    return sorted(mine, key=lambda unit: unit.number)


def _level(loads: Sequence[int], rest: int) -> float:
    """Returns the load up to which shares are filled so that the rest is used up."""
    ordered = sorted(loads)
    for count in range(1, len(ordered) + 1):
        level = (sum(ordered[:count]) + rest) / count
        if count == len(ordered) or level <= ordered[count]:
            return level
    return 0.0


def sums_of(unit: Unit, tasks: Sequence[MergeTask]) -> Iterator[tuple[int, int, int]]:
    """Yields the output file, the offset and the number of bytes of each tensor of a unit, or of its part of one. Empty
    tensors have no checksum, and are left out."""
    for number in range(unit.start, unit.stop):
        file, offset, nbytes = place_of(tasks, number)
        if unit.last:
            size = tasks[number].out.dtype.component.element_bytes
            offset, nbytes = offset + unit.first * size, (unit.last - unit.first) * size
        if nbytes:
            yield file, offset, nbytes
