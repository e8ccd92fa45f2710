"""The record of the pieces of an output that are on the disk. A killed run can be continued from it.

A piece is written down only after its file was synced. Each line has its own checksum, and the lines after a damaged line
do not count. Before a piece is taken over, it is compared with its checksum.
"""

from __future__ import annotations

import itertools
import json
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from streammerge.stores.base import JournalFile, Output

INTERVAL_SECONDS = 2.0
"""The time between two syncs. A crash costs at most the pieces of this time and of one sync."""
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


_FIELDS = {each.name for each in fields(Finished)}


@dataclass(frozen=True, slots=True)
class Earlier:
    """The pieces that an earlier run has finished.

    ``plan``: the plan of that run, None if its line is damaged, {} if another version wrote it. ``pieces``: the pieces that
    this version can read. ``count``: the number of undamaged lines after the plan, whichever version wrote them.
    """

    plan: dict[str, Any] | None
    pieces: list[Finished]
    count: int

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


def read(file: JournalFile) -> Earlier | None:
    """Returns the content of a journal, None only if there is no journal. Raises OSError if it cannot be read.

    Another version may have written it, so any undamaged line may hold anything.
    """
    data = file.read()
    if data is None:
        return None
    first, *rest = map(_checked, data.split(b"\n"))
    said = first.get("plan") if isinstance(first, dict) else None
    plan = None if first is None else said if isinstance(said, dict) else {}
    whole = list(itertools.takewhile(lambda line: line is not None, rest))
    return Earlier(plan, [Finished(**line) for line in itertools.takewhile(_is_piece, whole)], len(whole))


def _is_piece(line: Any) -> bool:
    return isinstance(line, dict) and line.keys() == _FIELDS


def _json(done: Finished) -> str:
    """Returns the fields as JSON. Written by hand, because json and asdict take longer than a small merge."""
    nonfinite = json.dumps(done.nonfinite, separators=(",", ":")) if done.nonfinite else "{}"
    return (
        f'{{"task":{done.task},"start":{done.start},"file":{json.dumps(done.file)},"offset":{done.offset},'
        f'"nbytes":{done.nbytes},"checksum":{done.checksum},"nonfinite":{nonfinite}}}'
    )


def _line(json_text: str) -> bytes:
    text = json_text.encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _checked(line: bytes) -> Any:
    """Returns the data of a line, None if the line is damaged."""
    sum_, _, text = line.partition(b" ")
    return json.loads(text) if sum_ == b"%08x" % zlib.crc32(text) else None


class Journal:
    """Syncs and writes down finished pieces, every few seconds, on a thread of its own.

    ``plan``: what the run is a run of, as plain data with texts as keys; a run of an equal plan can go on from its pieces.
    ``files``: the output's files by name, at this moment. ``keeps``: whether anything is to be written down; if not, it
    syncs at the end only.
    """

    def __init__(
        self, file: JournalFile, plan: Mapping[str, Any], files: Callable[[], dict[str, Output]], keeps: bool
    ) -> None:
        self._file, self.plan, self._files, self._keeps = file, dict(plan), files, keeps
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

    def earlier(self) -> Earlier | None:
        """Returns the content of an earlier run's journal, of any plan. None if there is no journal."""
        return read(self._file)

    def take_over(self, pieces: list[Finished]) -> None:
        """Counts the pieces of an earlier run as kept."""
        self._written = list(pieces)

    def begin(self, kept: Iterable[Finished]) -> None:
        """Starts anew with these pieces, which are on the disk already, and goes on from there."""
        kept = list(kept)
        self._file.begin(_lines([json.dumps({"plan": self.plan}, separators=(",", ":")), *map(_json, kept)]))
        self._written, self._waiting, self._broken, self._asked = kept, [], set(), ""
        self._writes, self._synced = self._keeps, False
        self._thread = threading.Thread(target=self._work, name="streammerge-journal", daemon=True)
        self._thread.start()

    def add(self, done: Finished) -> None:
        with self._wake:
            self._waiting.append(done)

    def finish(self) -> set[str]:
        """Syncs all files. Returns the names of those whose sync failed. No byte of those can be trusted."""
        self._end("finish")
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)  # in short waits, so that Ctrl-C is noticed
        if not self._synced:
            raise RuntimeError("the output's files were not synced")
        return self._broken

    def stop(self) -> None:
        """Ends the thread. Waits at most a second for a slow disk."""
        self._end("stop")
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _end(self, how: str) -> None:
        with self._wake:
            self._asked = how
            self._wake.notify()

    def _work(self) -> None:
        try:
            while not self._asked:
                with self._wake:
                    self._wake.wait_for(lambda: self._asked, INTERVAL_SECONDS)
                    ready, self._waiting = self._waiting, []
                if not self._asked:
                    self._keep(ready)
            if self._asked == "finish":
                for name, file in self._files().items():
                    self._sync(name, file)
                self._synced = True
        finally:
            self._file.end()

    def _keep(self, ready: list[Finished]) -> None:
        if not self._writes:
            return
        files = self._files()
        for name in {done.file for done in ready} - self._broken:
            self._sync(name, files[name])
        whole = [done for done in ready if done.file not in self._broken]
        if whole and not self._asked:
            try:
                self._file.append(_lines(map(_json, whole)))
                self._written += whole
            except OSError:  # fewer pieces are kept, because lines after a torn line do not count
                self._writes = False

    def _sync(self, name: str, file: Output) -> None:
        try:
            file.sync()
        except OSError:
            self._broken.add(name)


def _lines(texts: Iterable[str]) -> bytes:
    return b"".join(map(_line, texts))
