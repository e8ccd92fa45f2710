"""The record of the pieces of an output that are on the disk. A killed run can be continued from it.

A piece is written down only after its file was synced. Each line has its own checksum, and the lines after a damaged line
do not count. Before a piece is taken over, it is compared with its checksum.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import threading
import time
import zlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

from streammerge.errors import SpaceError
from streammerge.stores.base import JournalFile, Output

INTERVAL_SECONDS = 2.0
"""The time between two syncs. A crash costs at most the pieces of this time and of one sync."""
_STOP_SECONDS = 1.3
"""The longest wait after an interruption, for what is finished to be synced and written down."""
_FIRST_RATE = 250e6
"""Bytes per second that a disk is thought to sync before the first sync has shown it."""
_LEAST_SECONDS = 1e-4
_POLL_SECONDS = 0.2
Key = tuple[int, int]
_NOTHING: Mapping[str, int] = {}


class Finished(NamedTuple):
    """A piece whose bytes are written: its task's number and first element, where it lies, the NaN and infinities in it,
    and what was measured of it, as hexadecimal text that only the run understands."""

    task: int
    start: int
    file: str
    offset: int
    nbytes: int
    checksum: int
    nonfinite: Mapping[str, int] = _NOTHING
    measured: str = ""

    @property
    def key(self) -> Key:
        return (self.task, self.start)

    @property
    def place(self) -> tuple[int, int]:
        """(offset, bytes) in its file."""
        return (self.offset, self.nbytes)


_MEASURED = "measured"
_FIELDS = {*Finished._fields} - {_MEASURED}
"""The fields of every line."""
_NUMBERS = {"task": 32, "start": 64, "offset": 64, "nbytes": 64, "checksum": 32}
"""The numbers of a piece, and their bits."""


class FinishedTable(Sequence[Finished]):
    """Pieces as columns, which take 44 bytes each. A piece is made when it is asked for."""

    def __init__(self, pieces: Iterable[Finished] = ()) -> None:
        self._columns = [array("I" if bits == 32 else "Q") for bits in _NUMBERS.values()]
        self._files, self._file_of = dict[str, int](), array("I")
        self._nonfinite: dict[int, Mapping[str, int]] = {}
        self._measured: dict[int, str] = {}
        for piece in pieces:
            self.add(piece)

    def add(self, piece: Finished) -> None:
        if piece.nonfinite:
            self._nonfinite[len(self)] = piece.nonfinite
        if piece.measured:
            self._measured[len(self)] = piece.measured
        for column, name in zip(self._columns, _NUMBERS, strict=True):
            column.append(getattr(piece, name))
        self._file_of.append(self._files.setdefault(piece.file, len(self._files)))

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces."""
        return sum(self._columns[3])

    def __len__(self) -> int:
        return len(self._file_of)

    def __iter__(self) -> Iterator[Finished]:
        files = list(self._files)
        for row, (task, start, offset, nbytes, checksum, file) in enumerate(
            zip(*self._columns, self._file_of, strict=True)
        ):
            found = self._nonfinite.get(row, _NOTHING), self._measured.get(row, "")
            yield Finished(task, start, files[file], offset, nbytes, checksum, *found)

    @overload
    def __getitem__(self, row: int) -> Finished: ...
    @overload
    def __getitem__(self, row: slice) -> list[Finished]: ...
    def __getitem__(self, row: int | slice) -> Finished | list[Finished]:
        if isinstance(row, slice):
            return [self[each] for each in range(len(self))[row]]
        row = range(len(self))[row]
        task, start, offset, nbytes, checksum = (column[row] for column in self._columns)
        file = list(self._files)[self._file_of[row]]
        found = self._nonfinite.get(row, {}), self._measured.get(row, "")
        return Finished(task, start, file, offset, nbytes, checksum, *found)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Earlier:
    """The pieces that an earlier run has finished.

    ``plan``: the plan of that run, None if its line is damaged, {} if another version wrote it. ``pieces``: the pieces that
    this version can read. ``count``: the number of undamaged lines after the plan, whichever version wrote them.
    """

    plan: dict[str, Any] | None
    pieces: FinishedTable
    count: int

    @property
    def nbytes(self) -> int:
        return self.pieces.nbytes


def read(file: JournalFile) -> Earlier | None:
    """Returns the content of a journal, None only if there is no journal. Raises OSError if it cannot be read.

    Another version may have written it, so any undamaged line may hold anything.
    """
    data = file.read()
    if data is None:
        return None
    lines = map(_checked, _split(data))
    first = next(lines)
    said = first.get("plan") if isinstance(first, dict) else None
    plan = None if first is None else said if isinstance(said, dict) else {}
    pieces, count, known = FinishedTable(), 0, True
    for line in lines:
        if line is None:
            break
        count += 1
        known = known and _is_piece(line)
        if known:
            pieces.add(Finished(**line))
    return Earlier(plan, pieces, count)


def _split(data: bytes) -> Iterator[bytes]:
    """Yields the lines one by one, because a journal may have hundreds of thousands."""
    start = 0
    while (stop := data.find(b"\n", start)) >= 0:
        yield data[start:stop]
        start = stop + 1
    yield data[start:]


def _is_piece(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and line.keys() - {_MEASURED} == _FIELDS
        and all(line[name].__class__ is int and 0 <= line[name] < 1 << bits for name, bits in _NUMBERS.items())
        and isinstance(line["file"], str)
        and isinstance(line["nonfinite"], dict)
        and _is_hex(line.get(_MEASURED, ""))
    )


def _is_hex(text: Any) -> bool:
    return isinstance(text, str) and len(text) % 2 == 0 and not text.strip("0123456789abcdef")


def _json(done: Finished) -> str:
    """Returns the fields as JSON. Written by hand, because json and asdict take longer than a small merge."""
    nonfinite = json.dumps(done.nonfinite, separators=(",", ":")) if done.nonfinite else "{}"
    measured = f',"{_MEASURED}":"{done.measured}"' if done.measured else ""
    return (
        f'{{"task":{done.task},"start":{done.start},"file":{json.dumps(done.file)},"offset":{done.offset},'
        f'"nbytes":{done.nbytes},"checksum":{done.checksum},"nonfinite":{nonfinite}{measured}}}'
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

    ``plan``: identifies the run, as plain data with texts as keys. A later run with an equal plan can continue from its
    pieces. ``files``: the output's files by name, at this moment. ``keeps``: whether pieces are written down. If not,
    files are synced at the end only.
    """

    def __init__(
        self, file: JournalFile, plan: Mapping[str, Any], files: Callable[[], dict[str, Output]], keeps: bool
    ) -> None:
        self._file, self.plan, self._files, self._keeps = file, dict(plan), files, keeps
        self._waiting: list[Finished] = []
        self.kept_bytes = 0
        self._broken: set[str] = set()
        self._wake, self._writing = threading.Condition(), threading.Lock()
        self._asked = ""
        self._writes, self._synced, self._stopped = keeps, False, False
        self._rate, self._deadline = _FIRST_RATE, math.inf
        self._thread: threading.Thread | None = None

    def earlier(self) -> Earlier | None:
        """Returns the content of an earlier run's journal, of any plan. None if there is no journal."""
        return read(self._file)

    def take_over(self, pieces: FinishedTable) -> None:
        """Counts the pieces of an earlier run as kept."""
        self.kept_bytes = pieces.nbytes

    def begin(self, kept: Iterable[Finished]) -> None:
        """Begins a new journal with these pieces, which are on the disk already."""
        text, self.kept_bytes = self._text(kept)
        self._file.begin(text)
        self._waiting, self._broken, self._asked = [], set(), ""
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

    def stop(self, last: bool = False) -> None:
        """Ends the thread. ``last``: first syncs and writes down what is finished, as far as there is time.

        Waits :data:`_STOP_SECONDS` at most. Nothing is written down any more when it returns.
        """
        self._deadline = time.monotonic() + _STOP_SECONDS
        self._end("last" if last else "stop")
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)
        with self._writing:
            self._stopped = True
        if last and self._synced and self._waiting:  # the thread had ended, with all files on the disk
            self._rewrite()

    def _end(self, how: str) -> None:
        with self._wake:
            self._asked = how
            self._wake.notify()

    def _work(self) -> None:
        try:
            while True:
                with self._wake:
                    if self._wake.wait_for(lambda: self._asked, INTERVAL_SECONDS):
                        break
                    ready, self._waiting = self._waiting, []
                self._keep(ready)
            if self._asked == "finish":
                for name, file in self._files().items():
                    if self._asked == "finish":
                        self._sync(name, file)
                self._synced = self._asked == "finish"
            if self._asked == "last" and not self._synced:
                ready, self._waiting = self._waiting, []
                self._keep(ready, self._deadline)
        finally:
            self._file.end()

    def _keep(self, ready: list[Finished], deadline: float = math.inf) -> None:
        """Syncs the files of these pieces, and writes the pieces down. Leaves out files whose sync would take too long."""
        if not self._writes:
            return
        files, synced = self._files(), set[str]()
        waiting: dict[str, int] = defaultdict(int)
        for done in ready:
            waiting[done.file] += done.nbytes
        for name in waiting.keys() - self._broken:
            began = time.monotonic()
            if began + waiting[name] / self._rate < deadline:
                self._sync(name, files[name])
                self._rate = waiting[name] / max(time.monotonic() - began, _LEAST_SECONDS)
                synced.add(name)
        whole = [done for done in ready if done.file in synced - self._broken]
        if any(files[name].in_parts for name in synced):
            held = [files[done.file].holds(*done.place) for done in whole]
            with self._wake:
                self._waiting[:0] = [done for done, is_held in zip(whole, held, strict=True) if not is_held]
            whole = [done for done, is_held in zip(whole, held, strict=True) if is_held]
        self._append(whole)

    def write_down(self, pieces: Iterable[Finished]) -> None:
        """Writes a journal of these pieces, all of which are kept, before the output is published."""
        if self._writes:
            text, self.kept_bytes = self._text(pieces)
            self._file.begin(text)
            self._waiting = []

    def _append(self, whole: list[Finished]) -> None:
        with self._writing:
            if whole and not self._stopped:
                try:
                    self._file.append(_lines(map(_json, whole)))
                    self.kept_bytes += sum(done.nbytes for done in whole)
                except OSError:  # fewer pieces are kept, because lines after a torn line do not count
                    self._writes = False

    def _rewrite(self) -> None:
        """Writes a journal of all pieces. Keeps the old one if that fails."""
        if self._writes:
            with contextlib.suppress(OSError, SpaceError):
                earlier = read(self._file)
                written = earlier.pieces if earlier else FinishedTable()
                every = itertools.chain(written, self._waiting)
                files = self._files()
                kept = (
                    done
                    for done in every
                    if done.file not in self._broken and (done.file not in files or files[done.file].holds(*done.place))
                )
                text, kept_bytes = self._text(kept)
                self._file.begin(text)
                self.kept_bytes, self._waiting = kept_bytes, []
                self._file.end()

    def _sync(self, name: str, file: Output) -> None:
        try:
            file.sync()
        except OSError:
            self._broken.add(name)

    def _text(self, kept: Iterable[Finished]) -> tuple[bytes, int]:
        """Returns the text of a journal of these pieces, and their bytes."""
        text, nbytes = io.BytesIO(), 0
        text.write(_line(json.dumps({"plan": self.plan}, separators=(",", ":"))))
        for done in kept:
            text.write(_line(_json(done)))
            nbytes += done.nbytes
        return text.getvalue(), nbytes


def _lines(texts: Iterable[str]) -> bytes:
    return b"".join(map(_line, texts))
