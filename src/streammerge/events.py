"""Events that a run reports. A listener is a callable that takes one event; nothing in this module prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Preparing:
    """Something that takes its time is loaded before the run starts. ``what``: its name."""

    what: str


@dataclass(frozen=True, slots=True)
class Told:
    """Something that the user should know before the first tensor is merged. ``kind``: "note" or "warning".

    The result of the run repeats it.
    """

    kind: Literal["note", "warning"]
    text: str


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The plan is made and reading begins. Holds the total bytes to read and to write, and the budget in bytes.

    A verification reports it twice: for the checksums, and for the values that are computed again.
    """

    read_bytes: int
    write_bytes: int
    memory_bytes: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """An interrupted run continues: ``kept_bytes`` of the output exist, so ``read_bytes`` need not be read again."""

    kept_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """An input was read to compute its hash."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Spooled:
    """A packed record was unpacked into a temporary file, or a tensor was made there with its first axis last.

    ``tensor``: one that lies in it. ``nbytes``: the bytes that were read.
    """

    tensor: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A tensor, or a range of one, was written. ``read_bytes``: its inputs, each byte once, so that events add up to what
    the plan says. What a run has really read, in all passes, is in its result."""

    tensor: str
    read_bytes: int
    written_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Checked:
    """Bytes were read and compared, while an output is verified. ``name``: of a file, or of a tensor that is computed
    again."""

    name: str
    read_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Syncing:
    """All bytes are written and are now being synced to the disk."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """The run ends early: ``kept_bytes`` of ``write_bytes`` are kept, and the same run continues from there."""

    kept_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """The output exists under its final name."""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run is complete."""

    seconds: float


Event = (
    Preparing
    | Told
    | RunStarted
    | Resumed
    | Hashed
    | Spooled
    | TaskDone
    | Checked
    | Syncing
    | Suspended
    | Published
    | RunFinished
)


class Listener(Protocol):
    def __call__(self, event: Event, /) -> None: ...


def quiet(event: Event) -> None:
    """Ignores every event."""
