"""Lets the system read local inputs into its cache ahead of the workers.

A worker reads a part of each input and then computes, so a disk would have no work while it computes, and one read at a
time while it reads. Which bytes come next is known from the units. So a thread asks for them in the order in which the
workers come to them, and the disk always has several reads to do. The system may drop what it has read, and need not do
what it is asked: no byte of the output depends on it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from streammerge.errors import StreammergeError
from streammerge.planning.tasks import MergeTask, Piece, PieceDone
from streammerge.sources.base import Blob, BlobPath
from streammerge.stores.inputs import InputFiles

MOST_BYTES = 256 << 20
"""The most that is in the system's cache ahead of the workers. Less keeps a disk of 1 GB/s as busy as long as no other
program takes the processor; 512 MiB are no better."""
_WINDOW_BYTES = 2 << 20
"""Bytes of one input that are asked for before those of the next one. Workers read all inputs side by side."""
_GAP_BYTES = 64 << 10
"""Ranges with less between them are asked for as one."""

_MOST_UNITS = 32
"""No more of them wait, since not of all units it is known what they read."""
_SAMPLED_TASKS, _SAMPLED_PLACES = 16, 4


def pays(inputs: InputFiles, tasks: Sequence[MergeTask]) -> bool:
    """Whether to ask for the inputs of these tasks ahead. It does not pay if they are in the system's cache already, as a
    sample of places tells, or if files are closed for others between asking and reading."""
    if not inputs.stay_open:
        return False
    for number in range(0, len(tasks), len(tasks) // _SAMPLED_TASKS + 1):
        task = tasks[number]
        for place in range(0, task.elems, task.elems // _SAMPLED_PLACES + 1):
            blobs = (blob for source in task.sources for blob in source.blobs_of(place, place + 1))
            if not all(inputs.get(blob.path).is_cached(blob.offset) for blob in blobs):
                return True
    return False


class Prefetching:
    """Asks for the inputs of units that workers take, up to ``most_bytes`` ahead. Safe for threads.

    ``inputs``: their open files. ``workers``: the number of units that are made side by side.
    """

    def __init__(self, inputs: InputFiles, workers: int, most_bytes: int = MOST_BYTES) -> None:
        self._inputs, self._workers, self._most = inputs, workers, most_bytes
        self._few = most_bytes * 3 // 4
        """When no more than this is ahead, more is asked for, many ranges at once: to wake a thread for each costs more."""
        self._full = False
        self._waiting: deque[tuple[list[Piece], int]] = deque()
        """Units that no worker has taken yet, and the bytes of their inputs."""
        self._next: deque[list[Piece]] = deque()
        """Units whose inputs are asked for next."""
        self._bytes: dict[tuple[int, int], int] = {}
        """The bytes of the inputs of units that are made now, by the key of their last piece."""
        self._asked = self._passed = self._taken = self._made = 0
        """Bytes: asked for; that workers have come to; of units that workers took; of units that are made."""
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="streammerge-prefetch", daemon=True)
        inputs.passed = self.passed
        self._thread.start()

    def units(self, units: Iterable[list[Piece]]) -> Iterator[list[Piece]]:
        """Yields the units. Looks at some more of them, so that their inputs can be asked for."""
        held = 0
        for unit in units:
            nbytes = sum(known_bytes(piece) for piece in unit)
            self._waiting.append((unit, nbytes))
            held += nbytes
            with self._changed:
                if nbytes and not self._closed:
                    self._next.append(unit)
                    self._changed.notify()
            while held - self._waiting[0][1] >= self._most or len(self._waiting) > _MOST_UNITS:
                held -= self._waiting[0][1]
                yield self._take()
        while self._waiting:
            yield self._take()

    def _take(self) -> list[Piece]:
        unit, nbytes = self._waiting.popleft()
        with self._changed:
            self._taken += nbytes
            self._bytes[unit[-1].key] = nbytes
            self._changed.notify()
        return unit

    def passed(self, nbytes: int) -> None:
        """Says that a worker comes to so many more bytes of the inputs."""
        with self._changed:
            self._passed += nbytes
            if self._full and self._ahead() <= self._few:
                self._changed.notify()

    def made(self, done: PieceDone) -> None:
        """Says that a piece is made. With its last piece a unit is."""
        with self._changed:
            self._made += self._bytes.pop((done.number, done.start), 0)
            self._changed.notify()

    def close(self) -> None:
        """Asks for nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._inputs.passed = None
        self._thread.join()

    def _work(self) -> None:
        # A file that is gone, or cannot be read, is an error where a worker reads it.
        with contextlib.suppress(OSError, StreammergeError):
            for path, offset, nbytes in self._in_order():
                self._inputs.get(path).will_need(offset, nbytes)
        with self._changed:
            self._closed = True
            self._next.clear()

    def _in_order(self) -> Iterator[Blob]:
        """Yields what to ask for, window by window, of as many units side by side as there are workers. Waits for workers
        and for units. Ends when it is closed."""
        active: deque[Iterator[Window]] = deque()
        while self._wait(active):
            while len(active) < self._workers and self._next:
                active.append(windows(self._next.popleft()))
            window = next(active[0], None)
            if window is None:
                active.popleft()
                continue
            active.rotate(-1)
            for blob, nbytes in window:
                if not self._wait(window):
                    return
                self._asked += nbytes
                yield blob

    def _wait(self, more: Sequence[object]) -> bool:
        """Waits until there is room and ``more``, or a unit. Returns False if it is closed."""
        with self._changed:
            self._full = self._full or self._ahead() >= self._most
            while not self._closed and ((self._full and self._ahead() > self._few) or not (more or self._next)):
                self._changed.wait()
            self._full = False
            return not self._closed

    def _ahead(self) -> int:
        """Returns how many bytes were asked for to which no worker has come."""
        # Passes come to the same bytes again. What is copied is not said to be passed.
        return self._asked - max(min(self._passed, self._taken), self._made)


Window = list[tuple[Blob, int]]
"""Ranges, and how many bytes of each are needed."""


def known_bytes(piece: Piece) -> int:
    """Returns the bytes that a piece is made from, as far as it is known where they are."""
    each = [source.spec.dtype.component.element_bytes for source in piece.task.sources if source.ranged]
    return (piece.stop - piece.start) * sum(each)


def windows(unit: Iterable[Piece]) -> Iterator[Window]:
    """Yields the ranges that the pieces of a unit are made from, as far as they are known: those of a part of every input,
    then those of the next part."""
    window: list[tuple[Piece, int, int]] = []
    held = 0
    for piece in unit:
        size = max([source.spec.dtype.component.element_bytes for source in piece.task.sources], default=1)
        start = piece.start
        while start < piece.stop:
            stop = min(start + max((_WINDOW_BYTES - held) // size, 1), piece.stop)
            window.append((piece, start, stop))
            held += (stop - start) * size
            start = stop
            if held + size > _WINDOW_BYTES:
                yield in_files(_blobs(window))
                window, held = [], 0
    if window:
        yield in_files(_blobs(window))


def _blobs(window: Iterable[tuple[Piece, int, int]]) -> Iterator[Blob]:
    for piece, start, stop in window:
        for source in piece.task.sources:
            parts = 2 if source.spec.dtype.kind == "complex" else 1
            yield from source.blobs_of(start // parts, -(-stop // parts))


def in_files(blobs: Iterable[Blob]) -> Window:
    """Returns the ranges file by file. Joins those with little between them."""
    found: dict[BlobPath, Window] = {}
    for blob in blobs:
        ranges = found.setdefault(blob.path, [])
        if ranges:
            (path, offset, nbytes), needed = ranges[-1]
            if offset + nbytes <= blob.offset <= offset + nbytes + _GAP_BYTES:
                both = Blob(path, offset, blob.offset + blob.nbytes - offset)
                ranges[-1] = both, needed + blob.nbytes
                continue
        ranges.append((blob, blob.nbytes))
    return [each for ranges in found.values() for each in ranges]
