"""Reads ranges of local files into the system's cache, on threads of its own.

Each range is one call of the system. Between two calls a thread needs Python's lock, for which it waits five milliseconds
while another thread computes in Python; so ranges are long.
"""

from __future__ import annotations

import contextlib
import os
import threading
from queue import SimpleQueue

from streammerge.errors import StreammergeError
from streammerge.stores.base import Input

_STREAMS = 4
_MOST_BYTES = 8 << 20
"""The longest range of one call. Who closes waits for the calls of this moment."""


class CacheReader:
    """Reads what it is given, the first range first. ``streams``: how many calls are under way at once, or fewer where no
    more threads are allowed."""

    def __init__(self, streams: int = _STREAMS) -> None:
        self._ranges: SimpleQueue[tuple[Input, int, int] | None] = SimpleQueue()
        self._closed = False
        self._sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._threads: list[threading.Thread] = []
        with contextlib.suppress(RuntimeError):  # what is not read here is read where it is merged
            for _ in range(streams):
                thread = threading.Thread(target=self._work, name="streammerge-cache-reader", daemon=True)
                thread.start()
                self._threads.append(thread)

    def read(self, file: Input, offset: int, nbytes: int) -> None:
        """Lets a range be read, and does not wait for it."""
        for start in range(offset, offset + nbytes, _MOST_BYTES):
            self._ranges.put((file, start, min(_MOST_BYTES, offset + nbytes - start)))

    def close(self) -> None:
        """Reads nothing more."""
        self._closed = True
        for _ in self._threads:
            self._ranges.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._sink)

    def _work(self) -> None:
        while (each := self._ranges.get()) is not None and not self._closed:
            file, offset, nbytes = each
            # A file that is gone, or cannot be read, is an error where its bytes are needed.
            with contextlib.suppress(OSError, StreammergeError):
                file.read_into_cache(offset, nbytes, self._sink)
