"""Lets the system read the beginnings of local inputs while a merge is still being planned.

Headers are read and compared, the output is laid out and libraries are loaded before a worker begins, and a disk would have
no work meanwhile. The system may drop what it has read, and need not do what it is asked: no byte of the output depends on
it.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping

from streammerge.errors import StreammergeError
from streammerge.running import process
from streammerge.running.prefetching import in_files
from streammerge.sources.base import Blob, Source
from streammerge.stores.inputs import InputFiles

LEAST_PREFETCHED_BYTES = 256 << 20
"""A run that reads less from local files is over before it matters that they are asked for ahead."""
MOST_BYTES = 1 << 30
"""The most that is asked for. A disk of 1 GB/s reads it while 25 checkpoints are planned, or torch is loaded."""
_SHARE_OF_MEMORY = 8
"""No more than one part in so many of the memory is asked for, so that the system drops nothing before it is used."""
_PART_BYTES = 4 << 20
"""Bytes of one checkpoint that are asked for before those of the next one. Workers read all of them side by side."""


class HeadStart:
    """Asks for the beginnings of checkpoints as they are opened, part by part in turn. ``most_bytes``: of all together,
    None for as much as pays.

    Its thread begins with the first checkpoint for which it pays, and ends by itself.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most, self._left = most_bytes, 0
        self._turns: deque[Iterator[list[Blob]]] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def opened(self, entries: Mapping[str, Source], count: int) -> None:
        """Says that a checkpoint is open, one of ``count`` of a merge, and which tensors it has, in their order."""
        if self._closed or self._most == 0 or not _are_as_long_as(entries, LEAST_PREFETCHED_BYTES // count):
            return
        if self._most is None:
            self._most = min(MOST_BYTES, process.memory_bytes() // _SHARE_OF_MEMORY)
        with self._changed:
            self._turns.append(_parts(entries, self._most // count))
            self._changed.notify()
        if self._thread is None:
            self._left = self._most
            self._thread = threading.Thread(target=self._work, name="streammerge-head-start", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Asks for nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        # A file that is gone, or cannot be read, is an error where it is merged.
        with contextlib.suppress(OSError, StreammergeError), contextlib.closing(InputFiles({})) as files:
            while (turn := self._next()) is not None:
                part = next(turn, None)
                if part is None or not self._ask(files, part):
                    continue
                with self._changed:
                    self._turns.append(turn)

    def _next(self) -> Iterator[list[Blob]] | None:
        """Returns the parts of the checkpoint whose turn it is. Waits for one to be opened. None at the end."""
        with self._changed:
            while not self._closed and self._left > 0 and not self._turns:
                self._changed.wait()
            return None if self._closed or self._left <= 0 else self._turns.popleft()

    def _ask(self, files: InputFiles, part: list[Blob]) -> bool:
        """Asks for a part. Returns False if its checkpoint lies elsewhere, or in the system's cache already."""
        for (path, offset, nbytes), _ in in_files(part):
            if path.store.reads_ahead:
                return False
            file = files.get(path)
            if file.is_cached(offset):
                return False
            file.will_need(offset, nbytes)
            self._left -= nbytes
        return bool(part)


def _are_as_long_as(entries: Mapping[str, Source], nbytes: int) -> bool:
    for source in entries.values():
        nbytes -= source.spec.nbytes
        if nbytes <= 0:
            return True
    return False


def _parts(entries: Mapping[str, Source], most: int) -> Iterator[list[Blob]]:
    """Yields the ranges that the first tensors are read from, part by part, as far as they are known."""
    part, held = list[Blob](), 0
    for source in entries.values():
        spec = source.spec
        step = _PART_BYTES // spec.dtype.element_bytes
        for start in range(0, spec.numel if source.ranged else 0, step):
            part += source.blobs_of(start, min(start + step, spec.numel))
            held += min(step, spec.numel - start) * spec.dtype.element_bytes
            if held >= min(_PART_BYTES, most):
                yield part
                most -= held
                part, held = [], 0
                if most <= 0:
                    return
    yield part
