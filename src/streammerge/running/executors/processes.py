"""Workers that are processes, forked from a clean process. They do not wait for each other's Python lock."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from streammerge.errors import TaskError
from streammerge.running.executors.base import Executor, Result, Unit, Work
from streammerge.running.executors.importing import importable_path
from streammerge.running.executors.messages import (
    CLOSED,
    END,
    ERROR,
    GONE,
    QUIT,
    STOP,
    UNIT,
    WORK,
    Line,
    Message,
    Received,
    framed,
    pickled,
    unpickled_error,
)
from streammerge.running.executors.registry import executor
from streammerge.running.executors.server import CODE, ENVIRONMENT, numbered

_UNITS_AHEAD = 2
"""Units that a worker has at once: one in work and one waiting, so that the worker never waits."""
_STOP_SECONDS = 30.0
"""Time for a worker to notice that the run is stopping. Then it is killed."""
_END_SECONDS = 5.0
_RECEIVED_BYTES = 1 << 20
_NOTHING = object()


@executor("processes")
class ProcessExecutor(Executor):
    """``workers`` processes, started when the first work comes and kept until :meth:`close`."""

    elsewhere = True

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self._team: _Team | None = None
        self._startup_bytes = self._peak_bytes = 0

    @property
    def startup_bytes(self) -> int:
        return self._startup_bytes

    @property
    def peak_bytes(self) -> int:
        return self._peak_bytes

    def run(self, work: Work[Unit, Result], units: Iterable[Unit], backlog: int = 64) -> Generator[Result, None, None]:
        data = pickled(work)
        if self._team is not None and not self._team.modules >= {*work.modules}:
            self.close()
        if self._team is None:
            self._team = _Team(self.workers, work.modules)
        try:
            yield from self._team.run(data, units, backlog)
        finally:
            if self._team.broken:
                self.close()

    def close(self) -> None:
        team, self._team = self._team, None
        if team is not None:
            self._peak_bytes = max(self._peak_bytes, team.close())
            self._startup_bytes = max(self._startup_bytes, team.startup_bytes)


class _Link:
    """The connection to one worker process."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.socket.setblocking(False)
        self.pid = 0
        self.units = 0
        self.open = True
        self.watched = 0
        self._received = Received()
        self._outgoing: deque[memoryview] = deque()

    @property
    def events(self) -> int:
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)

    def put(self, kind: int, data: bytes = b"") -> None:
        """Sends as much of a message as the other side accepts now. :meth:`flush` sends the rest."""
        self._outgoing.append(memoryview(framed(kind, data)))
        self.flush()

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):  # a read reports the worker's end
            while self._outgoing:
                sent = self.socket.send(self._outgoing[0])
                self._outgoing[0] = self._outgoing[0][sent:]
                if not self._outgoing[0]:
                    self._outgoing.popleft()

    def take(self) -> list[Message] | None:
        """Returns the messages that have arrived, None when the process is gone."""
        try:
            data = self.socket.recv(_RECEIVED_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        return self._received.take(data) if data else None


class _Team:
    """The server and the workers that it has forked. ``broken``: they cannot take work any more."""

    def __init__(self, workers: int, modules: tuple[str, ...]) -> None:
        self.modules = {*modules}
        self.broken = False
        self._number = 0
        control, theirs = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(workers)]
        descriptors = [theirs.fileno(), *(end.fileno() for _, end in pairs)]
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-c", CODE, ",".join(map(str, descriptors)), *importable_path()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # keeps a method's prints out of the caller's standard output
                env=os.environ | ENVIRONMENT,
                pass_fds=descriptors,
                start_new_session=True,  # so that Ctrl-C reaches the caller alone
            )
        finally:
            for end in (theirs, *(end for _, end in pairs)):
                end.close()
        self._control, self._line = control, Line(control)
        self._links = [_Link(end) for end, _ in pairs]
        self._selector = selectors.DefaultSelector()
        try:
            self._line.send(WORK, pickled(modules))
            pids, self.startup_bytes = _answer(*self._line.receive())
        except BaseException as error:
            self.close(kill=True)
            if isinstance(error, OSError | EOFError):
                raise self._server_ended() from error
            raise
        for link, pid in zip(self._links, pids, strict=True):
            link.pid, link.watched = pid, link.events
            self._selector.register(link.socket, link.events, link)

    def run(self, work: bytes, units: Iterable[Any], backlog: int) -> Iterator[Any]:
        """See :meth:`Executor.run`."""
        self._number += 1
        source, more, most = iter(units), True, max(backlog, len(self._links))
        try:
            for link in self._links:
                link.put(WORK, numbered(self._number, work))
            while True:
                while more and (idle := self._idlest(most)) is not None:
                    unit = next(source, _NOTHING)
                    if unit is _NOTHING:
                        more = False
                    else:
                        idle.units += 1
                        idle.put(UNIT, pickled(unit))
                if not more and not any(link.units for link in self._links):
                    break
                for link, kind, data in self._received():
                    answer = _answer(kind, data)
                    link.units -= 1
                    yield answer
            self._settle(wanted=True)
        except BaseException:
            if not self.broken:
                self._stop()
                self._settle(wanted=False)
            raise

    def _stop(self) -> None:
        with contextlib.suppress(OSError):  # the server is gone, and its workers with it
            self._line.send(STOP, numbered(self._number))

    def _idlest(self, most: int) -> _Link | None:
        """Returns the worker with the fewest units, None if all have enough."""
        link = min(self._links, key=lambda each: each.units)
        full = sum(each.units for each in self._links) >= most
        return None if full or link.units >= _UNITS_AHEAD else link

    def _received(self, seconds: float | None = None) -> Iterator[tuple[_Link, int, bytes]]:
        """Yields the next messages from any of the workers. Raises TaskError when a worker is gone."""
        for link in self._links:
            if link.open and link.watched != link.events:
                link.watched = link.events
                self._selector.modify(link.socket, link.events, link)
        for key, events in self._selector.select(seconds):
            link = key.data
            if events & selectors.EVENT_WRITE:
                link.flush()
            if events & selectors.EVENT_READ:
                messages = link.take()
                if messages is None:
                    self._lose(link)
                    raise self._worker_ended(link)
                for kind, data in messages:
                    yield link, kind, data

    def _settle(self, wanted: bool) -> None:
        """Makes each worker close its work, and waits for that. ``wanted``: raises an error of the closing.

        Kills all workers if one of them does not notice that the run is stopping.
        """
        self.broken = True
        deadline = None if wanted else time.monotonic() + _STOP_SECONDS
        left = {*self._links}
        failed = list[BaseException]()
        for link in self._links:
            link.units = 0
            link.put(END)
        while left:
            seconds = None if deadline is None else deadline - time.monotonic()
            if seconds is not None and seconds <= 0:
                return
            try:
                for link, kind, data in self._received(seconds):
                    if kind == CLOSED:
                        left.discard(link)
                    elif kind == ERROR:
                        failed = failed or [unpickled_error(data)]
            except TaskError:
                if wanted:
                    raise
                return
        self.broken = False
        if wanted and failed:
            raise failed.pop()  # no frame may keep an error that keeps the frame

    def _lose(self, link: _Link) -> None:
        self.broken = True
        link.open = False
        self._selector.unregister(link.socket)

    def _worker_ended(self, link: _Link) -> TaskError:
        """Returns the error for a worker that is gone, from the server's report."""
        self._control.settimeout(_END_SECONDS)
        try:
            while True:
                number, code = pickle.loads(self._line.receive()[1])
                if self._links[number] is link:
                    break
        except TimeoutError:
            return _ended(f"worker process {link.pid}", None)
        except (OSError, EOFError):
            return self._server_ended()
        return _ended(f"worker process {link.pid}", code)

    def _server_ended(self) -> TaskError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.wait(_END_SECONDS)
        return _ended(f"process {self._server.pid}, which starts the workers,", self._server.returncode)

    def close(self, kill: bool = False) -> int:
        """Ends all processes and waits for their end. Returns the most bytes by which they had grown together."""
        grown = 0
        try:
            if not kill and not self.broken:
                grown = self._quit()
        finally:
            self._selector.close()
            for link in self._links:
                link.socket.close()
            self._control.close()  # the server kills what is left
            try:
                self._server.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        return grown

    def _quit(self) -> int:
        self._stop()
        left, grown, deadline = {*self._links}, 0, time.monotonic() + _END_SECONDS
        for link in self._links:
            link.put(QUIT)
        with contextlib.suppress(TaskError):
            while left and (seconds := deadline - time.monotonic()) > 0:
                for link, kind, data in self._received(seconds):
                    if kind == GONE:
                        grown += pickle.loads(data)
                        left.discard(link)
                        self._lose(link)
        return grown


def _answer(kind: int, data: bytes) -> Any:
    """Returns the content of a message. Raises it if it is an error."""
    if kind == ERROR:
        raise unpickled_error(data)
    return pickle.loads(data)


def _ended(who: str, code: int | None) -> TaskError:
    """The error for a process that ended by itself. Its cause is an OSError: the machine failed, not the merge."""
    if code is not None and code < 0:
        how = f"was killed by signal {-code}" + (", perhaps because memory ran out" if code == -9 else "")
    else:
        how = "ended unexpectedly" + ("" if code is None else f" with exit code {code}")
    error = TaskError(f"{who} {how}; run the same again, with less memory or fewer workers if it happens twice")
    error.__cause__ = ChildProcessError(how)
    return error
