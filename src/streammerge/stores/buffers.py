"""Buffers for blocks of remote files. Each is used again when nobody reads it any more.

Fresh memory costs as much as the reading itself: the kernel clears each page, and all threads wait for the same lock.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque


class Buffers:
    """Buffers of one size. Safe for threads. ``nbytes``: the size of each."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._free: deque[mmap.mmap] = deque()

    def take(self, nbytes: int) -> memoryview:
        """Returns a buffer of so many bytes. It is free again when no view of it, and nothing made of one, is left."""
        if nbytes > self._nbytes:
            return memoryview(bytearray(nbytes))
        try:
            memory = self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, self._nbytes)
        held = (ctypes.c_ubyte * nbytes).from_buffer(memory)
        weakref.finalize(held, self._free.append, memory).atexit = False  # append takes no lock: it may run anywhere
        return memoryview(held).cast("B")
