"""Which pieces of an output are safely on the disk, so that a run that was killed can be continued.

A piece is written down after the file that holds it was synced, never before. Each line carries its own checksum; what
follows a line that is damaged does not count. The pieces themselves are compared with their checksums before they are
believed.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.stores.local import OutputFile, space_checked

NAME, NEW = "journal", "journal.new"
INTERVAL_SECONDS = 2.0
"""How long pieces are collected between two syncs: what a crash can cost at most, beside the time of one sync."""
_STOP_SECONDS = 1.0
_POLL_SECONDS = 0.2
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Finished:
    """A piece whose bytes are written: its task's number and first element, where it lies, and what was met in it."""

    task: int
    start: int
    file: str
    offset: int
    nbytes: int
    checksum: int
    nonfinite: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        return (self.task, self.start)

    @property
    def place(self) -> tuple[int, int]:
        """(offset, bytes) in its file."""
        return (self.offset, self.nbytes)


def read(path: Path, plan: str) -> list[Finished] | None:
    """The pieces that a journal of that plan vouches for; None where there is no such journal."""
    try:
        lines = [_checked(line) for line in path.read_bytes().split(b"\n")]
    except OSError:
        return None
    if lines[0] != {"plan": plan}:
        return None
    found = []
    for line in lines[1:]:
        if line is None:
            break
        found.append(Finished(**line))
    return found


def _json(done: Finished) -> str:
    """Its fields, put together by hand: json and asdict would take longer than the computation of a small tensor."""
    nonfinite = json.dumps(done.nonfinite, separators=(",", ":")) if done.nonfinite else "{}"
    return (
        f'{{"task":{done.task},"start":{done.start},"file":{json.dumps(done.file)},"offset":{done.offset},'
        f'"nbytes":{done.nbytes},"checksum":{done.checksum},"nonfinite":{nonfinite}}}'
    )


def _line(json_text: str) -> bytes:
    text = json_text.encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _checked(line: bytes) -> dict[str, Any] | None:
    """The data of a line, None unless it is whole."""
    sum_, _, text = line.partition(b" ")
    return json.loads(text) if sum_ == b"%08x" % zlib.crc32(text) else None


class Journal:
    """Syncs and writes down finished pieces, every few seconds, on a thread of its own.

    ``files``: the output's files by name, at this moment. ``keeps``: whether anything is to be written down; if not, it
    syncs at the end only.
    """

    def __init__(self, path: Path, plan: str, files: Callable[[], dict[str, OutputFile]], keeps: bool) -> None:
        self._path, self.plan, self._files, self._keeps = path, plan, files, keeps
        self._waiting: list[Finished] = []
        self._written: list[Finished] = []
        self._broken: set[str] = set()
        self._wake = threading.Condition()
        self._asked = ""
        self._writes, self._synced = keeps, False
        self._thread: threading.Thread | None = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of the pieces that would be kept if the run ended now."""
        return sum(done.nbytes for done in self._written)

    def take_over(self) -> list[Finished] | None:
        """The pieces that an earlier run of the plan has left, which count as kept; None where there was no such run."""
        found = read(self._path, self.plan)
        self._written = list(found or ())
        return found

    def begin(self, kept: Iterable[Finished]) -> None:
        """Starts anew with these pieces, which are on the disk already, and goes on from there."""
        self._written, self._waiting, self._broken, self._asked = list(kept), [], set(), ""
        self._writes, self._synced = self._keeps, False
        partial = self._path.with_name(NEW)
        with space_checked(partial, len(self._written) << 8):
            fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _append(fd, [json.dumps({"plan": self.plan}, separators=(",", ":")), *map(_json, self._written)])
                os.replace(partial, self._path)
            except BaseException:
                os.close(fd)
                raise
        self._thread = threading.Thread(target=self._work, args=(fd,), name="streammerge-journal", daemon=True)
        self._thread.start()

    def add(self, done: Finished) -> None:
        with self._wake:
            self._waiting.append(done)

    def finish(self) -> set[str]:
        """Syncs all files. Returns those that the disk failed to take, none of whose bytes may be trusted."""
        self._end("finish")
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)  # in short waits, so that Ctrl-C is noticed
        if not self._synced:
            raise RuntimeError("the output's files were not synced")
        return self._broken

    def stop(self) -> None:
        """Ends the thread, without waiting longer than a moment for a disk that is slow to sync."""
        self._end("stop")
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _end(self, how: str) -> None:
        with self._wake:
            self._asked = how
            self._wake.notify()

    def _work(self, fd: int) -> None:
        try:
            while not self._asked:
                with self._wake:
                    self._wake.wait_for(lambda: self._asked, INTERVAL_SECONDS)
                    ready, self._waiting = self._waiting, []
                if not self._asked:
                    self._keep(fd, ready)
            if self._asked == "finish":
                for name, file in self._files().items():
                    self._sync(name, file)
                self._synced = True
        finally:
            os.close(fd)

    def _keep(self, fd: int, ready: list[Finished]) -> None:
        if not self._writes:
            return
        files = self._files()
        for name in {done.file for done in ready} - self._broken:
            self._sync(name, files[name])
        whole = [done for done in ready if done.file not in self._broken]
        if whole and not self._asked:
            try:
                _append(fd, map(_json, whole))
                self._written += whole
            except OSError:  # then less is kept: what follows a torn line does not count
                self._writes = False

    def _sync(self, name: str, file: OutputFile) -> None:
        try:
            file.sync()
        except OSError:
            self._broken.add(name)


def _append(fd: int, lines: Iterable[str]) -> None:
    data = memoryview(b"".join(map(_line, lines)))
    while data:
        data = data[os.write(fd, data) :]
    os.fsync(fd)
