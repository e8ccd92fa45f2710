"""The clean process from which workers are forked.

It inherits no threads, locks or signal handlers from the caller's process. It does not run the caller's script, so the
script needs no ``if __name__ == "__main__"``. It imports the modules of the work once and forks the workers, which share
their memory. It reports how each worker ended. When the caller is gone, it kills the remaining workers, and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
from importlib import import_module
from typing import Any, NoReturn

from streammerge.errors import TaskError, printable
from streammerge.running.executors.base import Host
from streammerge.running.executors.messages import (
    CLOSED,
    END,
    ERROR,
    GONE,
    QUIT,
    RESULT,
    UNIT,
    WORK,
    Line,
    pickled,
    pickled_error,
)
from streammerge.running.process import Growth, resident_bytes
from streammerge.tensors.instructions import choose_instructions

CODE = """
import sys
fds, sys.path[:] = sys.argv[1], sys.argv[2:]
from streammerge.running.executors.server import serve
serve([*map(int, fds.split(","))])
"""
"""Run by ``python -c``, with descriptors and the caller's ``sys.path`` as arguments."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Keeps libraries from starting threads in this process, because a fork would lose them."""
_NUMBER = struct.Struct("<Q")
_PR_SET_PDEATHSIG = 1


def numbered(number: int, work: bytes = b"") -> bytes:
    """Returns the bytes of a work after its number, which counts from 1. Without a work, only the number, for STOP."""
    return _NUMBER.pack(number) + work


def serve(descriptors: list[int]) -> NoReturn:
    """Forks a worker for each link. ``descriptors``: the caller's line, then the links."""
    control, *links = descriptors
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides what Ctrl-C means
    line = Line(socket.socket(fileno=control))
    stopped = mmap.mmap(-1, _NUMBER.size)  # shared with the workers
    choose_instructions()
    try:
        for module in pickle.loads(line.receive()[1]):
            import_module(module)
    except EOFError:
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
        line.send(ERROR, pickled_error(error))
        os._exit(1)
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    gc.collect()
    gc.freeze()  # a search for cycles would write to the memory that workers share
    server, workers = os.getpid(), dict[int, int]()
    for number, link in enumerate(links):
        pid = os.fork()
        if not pid:
            for fd in (control, woken.fileno(), wake.fileno(), *(other for other in links if other != link)):
                os.close(fd)
            _work(socket.socket(fileno=link), stopped, server)
        workers[pid] = number
    for link in links:
        os.close(link)
    with contextlib.suppress(OSError):
        line.send(RESULT, pickled(([*workers], resident_bytes())))
        _watch(control, woken, line, workers, stopped)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    for pid in workers:
        os.waitpid(pid, 0)
    os._exit(0)


def _watch(control: int, woken: socket.socket, line: Line, workers: dict[int, int], stopped: mmap.mmap) -> None:
    """Tells the caller about each worker that ends, and tells the workers which work stops, until the caller is gone."""
    while True:
        ready, _, _ = select.select([control, woken.fileno()], [], [])
        if woken.fileno() in ready:
            woken.recv(4096)
            while workers:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                line.send(GONE, pickled((workers.pop(pid), os.waitstatus_to_exitcode(status))))
        if control in ready:
            try:
                stopped[:] = line.receive()[1]
            except EOFError:
                return


def _work(link: socket.socket, stopped: mmap.mmap, server: int) -> NoReturn:
    """The life of a worker process."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == server:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)
            _serve_units(Line(link), stopped)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the caller is gone
    except BaseException:  # noqa: BLE001 - the caller cannot receive it
        import traceback

        traceback.print_exc()
        os._exit(1)
    finally:
        os._exit(0)


def _loaded(data: bytes | memoryview) -> Any:
    """Returns what was sent. Raises TaskError when this process cannot import a part of it."""
    try:
        return pickle.loads(data)
    except Exception as error:
        raise TaskError(
            f"a worker process cannot load what it was sent ({type(error).__name__}: {printable(error)}); put the code "
            'into a module that can be imported, or use `executor="threads"`'
        ) from error


def _serve_units(line: Line, stopped: mmap.mmap) -> None:
    growth, number = Growth(), 0
    host = Host(lambda: _NUMBER.unpack(stopped)[0] >= number)
    worker: Any = None
    while True:
        kind, data = line.receive()
        answer: tuple[int, bytes] | None = None
        try:
            if kind == WORK:
                (number,) = _NUMBER.unpack_from(data)
                worker = _loaded(memoryview(data)[_NUMBER.size :]).open(host)
            elif kind == UNIT and worker is not None and not host.stopping():
                answer = RESULT, pickled(worker.run(_loaded(data)))
            elif kind == END:
                left, worker = worker, None
                if left is not None:
                    left.close()
        except BaseException as error:  # noqa: BLE001 - carried to the caller, whatever it is
            answer = ERROR, pickled_error(error)
        if answer:
            line.send(*answer)
        if kind == END:
            line.send(CLOSED)
        elif kind == QUIT:
            host.close()
            line.send(GONE, pickled(growth.most()))
            return
