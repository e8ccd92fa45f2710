"""The files of an output that machines send to a store: each whole by one machine, or one file in parts of several."""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from collections.abc import Sequence

from streammerge.formats.base import Literal
from streammerge.planning.plan import Plan
from streammerge.planning.receipt import ITSELF, written_like
from streammerge.planning.tasks import Piece, PieceDone, place_of
from streammerge.planning.units import Unit
from streammerge.running.finished import Part, other_sum, tensor_sums
from streammerge.running.sealing import Sealing
from streammerge.stores.base import Joint, Output

Place = tuple[int, int, int]
"""The number of an output file, the offset and the number of bytes of a tensor there."""


class Sending:
    """The files that one machine is sending. Does nothing where machines write ranges of one file."""

    def __init__(self, plan: Plan, joint: Joint, units: Sequence[Unit]) -> None:
        self._plan, self._joint = plan, joint
        counts = Counter(place_of(plan.tasks, unit.start)[0] for unit in units) if joint.whole_files else {}
        self._shared = {file for file, count in counts.items() if count > 1}
        self._open: dict[int, Output] = {}
        self._sealing: dict[int, _Sealed] = {}

    def open(self, unit: Unit) -> list[Output]:
        """Opens the file of a unit. Gives it what is known from the start, if this machine makes all of it.

        Raises RecipeError for a store that takes a file from its begin on, if that is known last.
        """
        if not self._joint.whole_files:
            return []
        number = place_of(self._plan.tasks, unit.start)[0]
        file = self._plan.layout.files[number]
        if number in self._shared:
            output = self._joint.open_part(file.name, file.size)
        else:
            output = self._joint.open(file.name, file.size)
        self._open[unit.number] = output
        if number not in self._shared:
            self._sealing[unit.number] = _Sealed(self._plan, number, output)
        return [output]

    def made(self, unit: Unit, piece: Piece, done: PieceDone) -> None:
        """Called when a piece was made. Gives headers that are known by now, so that few parts wait for them."""
        if self._sealing and unit.number in self._sealing:
            self._sealing[unit.number].made(piece, done)

    def send(self, unit: Unit, sums: Sequence[int], places: Sequence[Place]) -> str:
        """Sends what is left of a unit. Returns how it is found again, for its receipt. ``sums``: the checksum at each of
        ``places``."""
        if not self._joint.whole_files:
            return ""
        output, number = self._open[unit.number], places[0][0]
        output.halted_by(_never)  # the workers have ended, and this is no work of theirs
        if number in self._shared:
            start = min(offset for _, offset, _ in places)
            stop = max(offset + nbytes for _, offset, nbytes in places)
            return self._joint.sent_part(output, start, stop)
        for literal in around(self._plan, number, sums, places):
            output.write_full(literal.data, literal.offset)
        return self._joint.sent(output)

    def end(self, unit: Unit, counts: bool) -> None:
        """Forgets the file of a unit. ``counts``: whether its receipt is the one that counts."""
        self._sealing.pop(unit.number, None)
        output = self._open.pop(unit.number, None)
        if output is not None:
            output.close() if counts else self._joint.drop(output)

    def drop(self) -> None:
        """Forgets files that are not finished."""
        self._sealing.clear()
        for number in [*self._open]:
            self._joint.drop(self._open.pop(number))


def _never() -> None:
    """Never halts."""


class _Sealed:
    """What is known of a file that this machine makes alone."""

    def __init__(self, plan: Plan, number: int, output: Output) -> None:
        self._names, self._number = [file.name for file in plan.layout.files], number
        self._parts: list[Part] = []
        outputs: list[Output | None] = [None for _ in self._names]
        outputs[number] = output
        self._sealing = Sealing(plan.layout, plan.tasks, outputs, self)

    def made(self, piece: Piece, done: PieceDone) -> None:
        insort(self._parts, (piece.offset, piece.nbytes, done.checksum))
        self._sealing.made(self._number)

    def by_file(self) -> list[tuple[str, list[Part]]]:
        return [(name, self._parts if n == self._number else []) for n, name in enumerate(self._names)]


def around(plan: Plan, number: int, sums: Sequence[int], places: Sequence[Place]) -> list[Literal]:
    """Returns the bytes outside the tensors of an output file that one machine makes. ``sums``: the checksum at each of
    ``places``."""
    layout = plan.layout
    file, kind = layout.files[number], layout.receipt.kind
    parts = sorted((offset, nbytes, value) for (_, offset, nbytes), value in zip(places, sums, strict=True))
    own = tensor_sums(file, parts, kind)
    starts = own if file.seal is not None else {}
    if not file.receipt:
        return file.around(starts, b"")
    every = {ITSELF: array("I", [*own.values(), other_sum(file, own, kind)])}
    return file.around(starts, written_like(layout.receipt.filled(every, {}), file.receipt))
