"""Handles mapped files that shrink. An access to a page that is gone raises SIGBUS, which would end the process without a
message.

While :func:`survived` lasts, a handler puts zeros in place of the lost pages and marks the file. The run then ends with
an error, and its output never appears. This works on Linux on 64-bit x86 and ARM. Elsewhere SIGBUS still ends the
process; ``io="pread"`` avoids it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SUPPORTED = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") and sys.maxsize > 1 << 32
_SA_SIGINFO = 4
_MAP_FIXED = 0x10


class _SigInfo(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("errno", ctypes.c_int), ("code", ctypes.c_int), ("address", ctypes.c_void_p)]


class _SigAction(ctypes.Structure):
    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


class _PyBuffer(ctypes.Structure):
    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_byte * 64),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_maps: dict[int, tuple[int, int, Callable[[], object]]] = {}
_lock = threading.Lock()
_users = 0
_before = _SigAction()


def _on_fault(number: int, info: Any, context: Any) -> None:
    """Runs on the thread that accessed the page, between two of its instructions. The thread then repeats the access."""
    address = info.contents.address or 0
    page = address - address % mmap.PAGESIZE
    for start, stop, mark in tuple(_maps.values()):
        if start <= page < stop:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
            if _libc.mmap(page, stop - page, mmap.PROT_READ, flags, -1, 0) == page:
                mark()
                return
    _libc.sigaction(number, ctypes.byref(_before), None)  # not ours: as it would have been


if _SUPPORTED:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_SigInfo), ctypes.c_void_p)(_on_fault)


@contextmanager
def survived() -> Iterator[None]:
    """While the block runs, SIGBUS in a :func:`watched` map marks its file. Several runs of one process may overlap."""
    global _users
    if not _SUPPORTED:
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            action = _SigAction(ctypes.cast(_handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
            _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(_before))
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_before), None)


def watch(mapped: mmap.mmap, mark: Callable[[], object]) -> None:
    """Calls ``mark`` when pages of the map turn out to be gone, as long as the map exists."""
    if _SUPPORTED:
        start = _address(mapped)
        _maps[id(mapped)] = (start, start + -(-len(mapped) // mmap.PAGESIZE) * mmap.PAGESIZE, mark)
        weakref.finalize(mapped, _maps.pop, id(mapped), None)


def _address(mapped: mmap.mmap) -> int:
    view = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(view), 0)
    address = int(view.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address
