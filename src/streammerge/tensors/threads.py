"""Torch without helper threads on the caller's thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_thread = threading.local()
_inside = 0
_first = 1
"""Torch's number on the first of the threads that are inside."""


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Lets torch compute on the calling thread only, until the block is left. Imports torch.

    Torch's helper threads would wait, busily, on the CPUs of the workers. They would also outlive the run in the caller's
    process: a child that is forked later has none of them, waits for them, and hangs. Setting the number of threads
    starts none.

    Several threads may be inside. A thread that is new to torch inherits the number that was set last, here 1, so it
    leaves with the number of the first.
    """
    import torch

    global _inside, _first
    if getattr(_thread, "inside", False):
        yield
        return
    with _lock:
        before = torch.get_num_threads()
        if not _inside:
            _first = before
        _inside += 1
        torch.set_num_threads(1)
    _thread.inside = True
    try:
        yield
    finally:
        _thread.inside = False
        with _lock:
            _inside -= 1
            torch.set_num_threads(before if before > 1 else _first)
