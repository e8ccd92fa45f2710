"""What a run tells while it goes. A listener is any callable of one event; nothing here prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RunStarted:
    """The plan stands and reading begins: bytes to read and write in all, the budget."""

    read_bytes: int
    write_bytes: int
    memory_bytes: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """So many bytes of the output are there already, from a run that did not come to its end; so many need not be read."""

    kept_bytes: int
    read_bytes: int


@dataclass(frozen=True, slots=True)
class Hashed:
    """An input was read for its hash."""

    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Spooled:
    """A compressed record, in which that tensor lies, was inflated into a temporary file."""

    tensor: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A tensor, or a range of one, is written."""

    tensor: str
    read_bytes: int
    written_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Syncing:
    """All bytes are written and are being made durable."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """The run ends early; so many bytes of so many stay, and the same run goes on from there."""

    kept_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class Published:
    """The output is there under its name."""


@dataclass(frozen=True, slots=True)
class RunFinished:
    """All is done."""

    seconds: float


Event = RunStarted | Resumed | Hashed | Spooled | TaskDone | Syncing | Suspended | Published | RunFinished


class Listener(Protocol):
    def __call__(self, event: Event, /) -> None: ...


def quiet(event: Event) -> None:
    """The listener of those who do not listen."""
