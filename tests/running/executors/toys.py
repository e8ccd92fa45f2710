"""Works for the tests of executors. This module imports little, because worker processes import it too."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import streammerge as sm
from streammerge.running.executors.base import Host

SLOW_SECONDS = 0.05


class Toy:
    """A worker that calls a function of its work."""

    def __init__(self, run: Callable[[Any], Any], closed: Callable[[], None] = lambda: None) -> None:
        self.run, self.close = run, closed


@dataclass(frozen=True)
class Square:
    modules: ClassVar[tuple[str, ...]] = ()
    nothing: bool = False

    def open(self, host: Host) -> Toy:
        return Toy(lambda number: None if self.nothing else number * number)


@dataclass(frozen=True)
class Zeros:
    """Returns results of the given number of bytes."""

    nbytes: int
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        return Toy(lambda unit: bytes(self.nbytes))


@dataclass(frozen=True)
class Measures:
    """Returns the length of its units."""

    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        return Toy(len)


class Odd(Exception):
    """An error that pickle cannot restore."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Fails:
    """Fails at one unit or when it is opened, with our own error, an error with a cause, or one that cannot be pickled."""

    at: int
    how: str = "ours"
    seconds: float = 0.0
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        if self.how == "open":
            raise sm.TaskError("it cannot be opened")

        def closed() -> None:
            if self.how == "close":
                raise sm.TaskError("it cannot be closed")

        return Toy(self._run, closed)

    def _run(self, number: int) -> int:
        if number == self.at and self.how == "ours":
            raise sm.TaskError("twenty")
        if number == self.at and self.how == "cause":
            raise sm.TaskError("twenty") from OSError(5, "the disk", "a file")
        if number == self.at and self.how == "odd":
            raise Odd("one", "two")
        time.sleep(self.seconds)
        return number


@dataclass(frozen=True)
class Waits:
    """Does unit 0 at once. Each other unit waits until the run is stopping, and then writes a file."""

    folder: str
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        def run(number: int) -> int:
            (Path(self.folder) / f"begun {number}").touch()
            while number and not host.stopping():
                time.sleep(SLOW_SECONDS / 10)
            if number:
                (Path(self.folder) / f"ended {number}").touch()
                host.check()
            return number

        return Toy(run)


class Store:
    """Counts how often it was made and closed, in files."""

    def __init__(self, folder: str, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self._tell("made")

    def _tell(self, what: str) -> None:
        (self.folder / f"{what} {self.key} {os.getpid()} {time.monotonic_ns()}").touch()

    def close(self) -> None:
        self._tell("closed")


@dataclass(frozen=True)
class Keeps:
    """Keeps an object between works with the same key. Returns the process and the object that it ran with."""

    folder: str
    key: str
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        store = host.kept(self.key, lambda: Store(self.folder, self.key))
        return Toy(lambda unit: (os.getpid(), id(store), store.key))


@dataclass(frozen=True)
class Dies:
    """Ends its process at one unit, by a signal or by an exit."""

    at: int
    by: int = signal.SIGKILL
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        def run(number: int) -> int:
            if number == self.at and self.by:
                os.kill(os.getpid(), self.by)
            elif number == self.at:
                os._exit(7)
            return number

        return Toy(run)


@dataclass(frozen=True)
class Tells:
    """Returns facts about a worker process: its id, its parent's id, its signals, threads and imports."""

    modules: tuple[str, ...] = ()

    def open(self, host: Host) -> Toy:
        def run(unit: Any) -> dict[str, Any]:
            import sys

            time.sleep(SLOW_SECONDS / 10)  # so that all workers get units
            torch = sys.modules.get("torch")
            return {
                "pid": os.getpid(),
                "parent": os.getppid(),
                "interrupt": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
                "group": os.getpgrp(),
                "torch": None if torch is None else torch.get_num_threads(),
                "main": getattr(sys.modules["__main__"], "__file__", None),
            }

        return Toy(run)


@dataclass(frozen=True)
class Allocates:
    """Holds the given amount of memory for a moment."""

    nbytes: int
    modules: ClassVar[tuple[str, ...]] = ()

    def open(self, host: Host) -> Toy:
        def run(unit: Any) -> int:
            held = bytearray(b"\1") * self.nbytes
            time.sleep(SLOW_SECONDS)
            return len(held)

        return Toy(run)
