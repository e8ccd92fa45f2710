"""Receipts of the units that machines make: what is known of a unit, in less than 1 kB."""

from __future__ import annotations

import base64
import json
import zlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from streammerge.planning.plan import Plan
from streammerge.planning.tasks import MergeTask, Piece, PieceDone
from streammerge.planning.units import MOST_TENSORS, Unit, sums_of

_MOST_BYTES = 1000


@dataclass(slots=True)
class UnitReceipt:
    """What is known of a finished unit: the checksum of each tensor or part, and NaN and infinities by task and input.

    ``more``: how many of these are not listed, because there are too many. ``sent``: see :meth:`Joint.sent`. ``nbytes``:
    the bytes of the unit.
    """

    sums: array[int]
    nonfinite: dict[int, dict[str, int]] = field(default_factory=dict)
    more: int = 0
    sent: str = ""
    nbytes: int = 0

    @property
    def is_long(self) -> bool:
        """Whether the checksums stand in a file of their own, because a unit has many tensors."""
        return len(self.sums) > MOST_TENSORS

    def data(self) -> bytes:
        """Returns less than 1 kB."""
        listed_ = dict(self.nonfinite)
        more = self.more
        sums = self.sums.tobytes()
        told = f"{zlib.crc32(sums):08x}" if self.is_long else base64.b85encode(sums).decode()
        while True:
            said = {"sums": told, "sent": self.sent, "bytes": self.nbytes, "nonfinite": [*listed_.items()], "more": more}
            text = json.dumps(said, separators=(",", ":")).encode()
            if len(text) < _MOST_BYTES - 10 or not listed_:
                return b"%08x %s\n" % (zlib.crc32(text), text)
            more += sum(listed_.popitem()[1].values())

    @classmethod
    def read(cls, data: bytes, count: int, long: Callable[[], bytes] = bytes) -> UnitReceipt | None:
        """Returns what a receipt of ``count`` checksums says, None if it is damaged. ``long`` reads many checksums."""
        sum_, _, text = data.rstrip(b"\n").partition(b" ")
        if sum_ != b"%08x" % zlib.crc32(text):
            return None
        said = json.loads(text)
        if count > MOST_TENSORS:
            octets = long()
            if said["sums"] != f"{zlib.crc32(octets):08x}":
                return None
        else:
            octets = base64.b85decode(said["sums"])
        nonfinite = {int(task): dict(found) for task, found in said["nonfinite"]}
        made = cls(array("I", octets), nonfinite, said["more"], said["sent"], said["bytes"])
        return made if len(made.sums) == count else None


class UnitInMaking:
    """A unit that is being made: what is known of its pieces so far."""

    def __init__(self, unit: Unit, tasks: Sequence[MergeTask]) -> None:
        self.unit = unit
        self.places = list(sums_of(unit, tasks))
        self._parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {(f, o): [] for f, o, _ in self.places}
        self._starts: dict[int, tuple[int, int]] = {}
        self.left = 0
        self._nonfinite: dict[int, dict[str, int]] = {}
        where = iter(self.places)
        for number in range(unit.start, unit.stop):
            task = tasks[number]
            if task.elems:
                file, offset, _ = next(where)
                self._starts[number] = (file, offset)
                self.left += sum(1 for _ in unit.pieces_of(task, number))

    def add(self, piece: Piece, done: PieceDone) -> bool:
        """Adds a finished piece. Returns whether the unit is finished."""
        self._parts[self._starts[piece.number]].append((piece.offset, piece.nbytes, done.checksum))
        for name, count in done.nonfinite.items():
            found = self._nonfinite.setdefault(piece.number, {})
            found[name] = found.get(name, 0) + count
        self.left -= 1
        return not self.left

    def receipt(self, plan: Plan) -> UnitReceipt:
        """Returns the receipt of the finished unit. Raises ValueError if it has other pieces than it was cut for."""
        kind = plan.layout.receipt.kind
        if any(sum(part[1] for part in self._parts[file, offset]) != nbytes for file, offset, nbytes in self.places):
            raise ValueError(f"the pieces of unit {self.unit.name} are not those that it was cut for")
        sums = array("I", [kind.join(self._parts[file, offset]) for file, offset, _ in self.places])
        return UnitReceipt(sums, self._nonfinite, nbytes=sum(nbytes for _, _, nbytes in self.places))
