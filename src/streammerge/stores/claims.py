"""Which machine makes which unit of an output. Works on any store with exclusive creation of small files.

A machine claims a unit by creating the file ``claims/UNIT.0``. It shows that it lives by writing its own file in
``machines`` again and again. Whoever sees that file unchanged for the time of a lease may claim the unit by creating
``claims/UNIT.1``, and so on: the last claim counts, and nothing is ever removed or replaced. No clock of one machine is
compared with that of another, and a process id counts on its own machine only.

The owner itself stops to write when it could not show for two thirds of the lease that it lives (:class:`Fence`). So a
machine that was stopped, and goes on after others have finished the output, writes nothing more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import os
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from streammerge.errors import LockedError, StreammergeError
from streammerge.stores import lock
from streammerge.stores.base import Joint, Location

UNITS, CLAIMS, MACHINES, SUMS, ANSWERS = "units", "claims", "machines", "sums", "answers"
_BEATS = 6
"""How often in the time of a lease a machine shows that it lives."""
_TIME = struct.Struct("<d")
_ENDED = b"ended"


class LeaseLost(LockedError):
    """This machine could not show in time that it lives, so another one may be making its units."""


def _clock() -> float:
    """Returns seconds that pass also while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Fence:
    """The time until which this machine may write. Worker processes read it from a file of this machine.

    ``shared``: whether there is such a file.
    """

    def __init__(self, shared: bool) -> None:
        self._until = 0.0
        self._path = ""
        self._map: mmap.mmap | None = None
        if shared:
            fd, self._path = tempfile.mkstemp(prefix="streammerge-")
            os.ftruncate(fd, _TIME.size)
            self._map = mmap.mmap(fd, _TIME.size)
            os.close(fd)

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self._until, self._path = 0.0, ""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, _TIME.size, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    @property
    def valid(self) -> bool:
        until = self._until if self._map is None else _TIME.unpack(self._map)[0]
        return _clock() < until

    def check(self) -> None:
        """Raises LeaseLost if this machine may not write any more."""
        if not self.valid:
            raise LeaseLost("this machine was stopped for longer than its lease")

    def move(self, until: float) -> None:
        self._until = until
        if self._map is not None:
            self._map[:] = _TIME.pack(until)

    def close(self) -> None:
        self.move(0.0)
        if self._path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            self._path = ""


@dataclass(slots=True)
class _Seen:
    """What another machine's file held, and since when it holds the same."""

    data: bytes
    since: float


class Claims:
    """The claims of all machines on the units of one output. ``shared``: see :class:`Fence`.

    Use it as a context: inside, this machine shows that it lives.
    """

    def __init__(self, joint: Joint, lease_seconds: float, shared: bool = False) -> None:
        self._home, self._lease = joint.home, lease_seconds
        self.fence = Fence(shared)
        self._seen: dict[str, _Seen] = {}
        self._beat = itertools.count(1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.name = ""
        self._joint = joint

    def __enter__(self) -> Claims:
        self._joint.begin((UNITS, CLAIMS, MACHINES, SUMS, ANSWERS))
        self.name = uuid.uuid4().hex[:16]
        began = _clock()
        self._show()
        self.fence.move(began + self._lease * 2 / 3)
        self._thread = threading.Thread(target=self._live, name="streammerge-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.fence.close()
        end(self._home, self.name)

    @property
    def _own(self) -> Location:
        return self._home / MACHINES / self.name

    def _show(self) -> None:
        said = {"beat": next(self._beat), **lock.this_run()._asdict()}
        self._own.replace_small(json.dumps(said).encode())

    def _live(self) -> None:
        while not self._stop.wait(self._lease / _BEATS):
            began = _clock()
            if not self.fence.valid:
                return
            with contextlib.suppress(OSError):
                self._show()
                if not self.fence.valid:  # this machine was stopped meanwhile
                    return
                self.fence.move(began + self._lease * 2 / 3)

    # ------------------------------------------------------------------------------------------------------------- claims

    def take(self, unit: str, before: Sequence[str] = ()) -> bool:
        """Claims a unit for this machine. ``before``: the claims that others had, of whom the last one is dead."""
        claim = self._home / CLAIMS / f"{unit}.{len(before)}"
        return claim.create_small(self.name.encode(), durable=False)

    def take_free(self, unit: str) -> bool:
        """Claims a unit unless a living machine has it. Looks at the claims on this unit only."""
        before: list[str] = []
        owner = b""
        while said := read_small(self._home / CLAIMS / f"{unit}.{len(before)}"):
            before.append(f"{unit}.{len(before)}")
            owner = said
        if before and owner == self.name.encode():
            return True
        return (not before or self.dead(before[-1])) and self.take(unit, before)

    @property
    def answers(self) -> Location:
        """The folder of what machines have found out about a tensor that several of them make."""
        return self._home / ANSWERS

    def is_finished(self, unit: str) -> bool:
        """Whether a unit has a receipt. A listing may be older than this answer."""
        return bool(read_small(self._home / UNITS / unit))

    def owners(self) -> dict[str, list[str]]:
        """Returns the machines that have claimed each unit, the last one last."""
        found: dict[str, dict[int, str]] = {}
        for each in names_in(self._home / CLAIMS):
            unit, _, turn = each.rpartition(".")
            if turn.isdigit():
                found.setdefault(unit, {})[int(turn)] = each
        made = {}
        for unit, claims in found.items():
            if [*sorted(claims)] != [*range(len(claims))]:
                continue  # a listing that is older than the last claim
            made[unit] = [""] * (len(claims) - 1) + [claims[len(claims) - 1]]
        return made

    def dead(self, claim: str) -> bool:
        """Whether the machine of a claim has ended, or has shown nothing for the time of a lease."""
        machine = read_small(self._home / CLAIMS / claim).decode("ascii", "replace")
        return machine != self.name and self._is_dead(machine)

    def wait_until_dead(self, claim: str) -> bool:
        """Waits until it is known whether the machine of a claim is dead, for the time of a lease at most."""
        machine = read_small(self._home / CLAIMS / claim).decode("ascii", "replace")
        first = read_small(self._home / MACHINES / machine)
        while not self.dead(claim):
            if read_small(self._home / MACHINES / machine) not in (first, _ENDED):
                return False
            time.sleep(min(self._lease / 20, 1.0))
        return True

    def describe(self, claim: str) -> str:
        """Returns who has made a claim."""
        machine = read_small(self._home / CLAIMS / claim).decode("ascii", "replace")
        owner = _owner(read_small(self._home / MACHINES / machine))
        return str(owner or lock.UNKNOWN)

    def _is_dead(self, machine: str) -> bool:
        data = read_small(self._home / MACHINES / machine) if machine.isalnum() else b""
        if data == _ENDED:
            return True
        owner = _owner(data)
        if owner is not None and lock.has_ended(owner):
            return True
        seen = self._seen.get(machine)
        if seen is None or seen.data != data:
            self._seen[machine] = _Seen(data, _clock())
            return False
        return _clock() - seen.since > self._lease


def end(home: Location, machine: str) -> None:
    """Says that a machine has ended, so that others may take over its units at once."""
    with contextlib.suppress(OSError):
        (home / MACHINES / machine).replace_small(_ENDED)


def living_in(home: Location, machine: str) -> lock.Owner | None:
    """Returns the process of a machine, None if it is known to have ended."""
    data = read_small(home / MACHINES / machine)
    owner = _owner(data)
    return None if data == _ENDED or (owner is not None and lock.has_ended(owner)) else owner or lock.UNKNOWN


def finished(home: Location) -> Iterator[tuple[str, bytes]]:
    """Yields the name and the receipt of each finished unit."""
    for unit in names_in(home / UNITS):
        yield unit, read_small(home / UNITS / unit)


def finish(home: Location, unit: str, receipt: bytes, replaces: bool = True) -> bool:
    """Writes the receipt of a unit whose bytes are durable. Returns whether it counts: another machine may have made the
    same unit. Then it ``replaces`` that receipt, which may be damaged, or is left out."""
    place = home / UNITS / unit
    made = place.create_small(receipt)
    if not made and replaces:
        place.replace_small(receipt)
    return made or replaces


def keep_sums(home: Location, unit: str, sums: bytes) -> None:
    """Keeps the checksums of a unit that has too many tensors for its receipt."""
    (home / SUMS / unit).replace_small(sums)


def kept_sums(home: Location, unit: str) -> bytes:
    return read_small(home / SUMS / unit)


def names_in(folder: Location) -> list[str]:
    """Returns the names in a folder of small files, sorted; none if it is absent."""
    try:
        return sorted(name for name in folder.store.list_names(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []


def read_small(place: Location) -> bytes:
    """Returns the content of a small file, b"" if it is absent."""
    try:
        with place.stream() as stream:
            return stream.read()
    except (OSError, StreammergeError):
        return b""


def _owner(data: bytes) -> lock.Owner | None:
    try:
        said = json.loads(data)
        said.pop("beat")
        return lock.Owner(**said)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
