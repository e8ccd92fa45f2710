"""Outputs that are sent in parts: a part stays in memory until all its bytes are there, and is then sent.

Workers write in the order of the output, nearly, so few parts are incomplete at one time. A :class:`Sender` sends several
parts at once, on threads of its own. A worker that completes a part while all of them are busy waits. So does one that
begins a part while many wait for their headers. So memory is bounded.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from streammerge.errors import RecipeError, StoreError, printable
from streammerge.stores.base import Location, Output

PART_BYTES = 8 << 20
"""The size of a part, unless the file would have too many of them."""
MOST_PARTS = 10_000
SENDERS = 4
"""Parts that are sent at once."""
_MOST_WAITING = 4
"""Parts that may be incomplete while all threads that send are busy. Each worker may begin one more."""
_ROUND_BYTES = 1 << 20
_POLL_SECONDS = 0.2


class Part(NamedTuple):
    """A part that the store has. ``tag``: names its content. ``checksum``: one more, "" if there is none."""

    size: int
    tag: str
    checksum: str = ""


class Upload(ABC):
    """The upload of one file. Parts may be sent by several threads at once, in any order.

    ``in_order``: whether a part waits in memory until those before it were sent.
    """

    in_order: ClassVar[bool] = False

    @abstractmethod
    def send(self, number: int, data: memoryview) -> Part:
        """Sends a part; the first has the number 0. Raises StoreError if that fails for good."""

    @abstractmethod
    def complete(self, parts: Sequence[Part], replaces: bool) -> None:
        """Makes the file visible. ``replaces``: whether a file of that name may be there."""

    @abstractmethod
    def abort(self) -> None:
        """Removes all parts."""


def part_bytes(size: int) -> int:
    """Returns the size of the parts of a file."""
    return max(PART_BYTES, -(-size // MOST_PARTS // _ROUND_BYTES) * _ROUND_BYTES if size > PART_BYTES * MOST_PARTS else 0)


def buffer_bytes(largest: int) -> tuple[int, int]:
    """Returns the memory of outputs in the making: for the run, and for each worker. ``largest``: bytes of a file.

    A worker's batch begins and ends within a part.
    """
    each = part_bytes(largest)
    return (SENDERS + 2) * each, 2 * each


class _Buffer:
    """The bytes of a part that is not complete. ``spans``: what was written, as (begin, end) in order, apart."""

    __slots__ = ("data", "spans", "whole")

    def __init__(self, whole: memoryview, size: int) -> None:
        self.whole, self.data = whole, whole[:size]
        self.spans: list[tuple[int, int]] = []

    def fill(self) -> None:
        """Puts zeros where nothing was written."""
        at = 0
        for begin, end in (*self.spans, (len(self.data), len(self.data))):
            self.data[at:begin] = bytes(max(begin - at, 0))
            at = end

    def put(self, data: Any, begin: int) -> None:
        end = begin + len(data)
        self.data[begin:end] = data

    def covered(self, begin: int, end: int) -> bool:
        """Adds a span that was written. Returns whether all bytes are there."""
        add_span(self.spans, begin, end)
        return self.spans == [(0, len(self.data))]


def add_span(spans: list[tuple[int, int]], begin: int, end: int) -> None:
    """Adds a span to sorted spans that do not touch each other. Joins those that it touches."""
    at = bisect_left(spans, (begin, end))
    if at and spans[at - 1][1] >= begin:
        at -= 1
    upto = at
    while upto < len(spans) and spans[upto][0] <= end:
        begin, end = min(begin, spans[upto][0]), max(end, spans[upto][1])
        upto += 1
    spans[at:upto] = [(begin, end)]


class Sender:
    """Threads that send parts. ``halt``: raises an exception when the run is stopping; called while a worker waits."""

    def __init__(self, most: int = SENDERS) -> None:
        self._most, self._threads = most, list[threading.Thread]()
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._free = threading.Semaphore(most)
        self._lock = threading.Lock()
        self._wanted = 0
        self._buffers: list[memoryview] = []
        self.halt: Callable[[], object] = lambda: None

    def run(self, task: Callable[[], None]) -> None:
        """Runs a task on a thread. Waits while all threads are busy."""
        with self._lock:
            self._wanted += 1
        try:
            while not self._free.acquire(timeout=_POLL_SECONDS):
                self.halt()
        except BaseException:
            with self._lock:
                self._wanted -= 1
            raise
        with self._lock:
            if len(self._threads) < self._most:
                thread = threading.Thread(target=self._work, name=f"streammerge-send-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put(task)

    @property
    def busy(self) -> bool:
        """Whether all threads have a part to send."""
        return self._wanted >= self._most

    def buffer(self, size: int, each: int) -> _Buffer:
        """Returns a buffer for ``size`` bytes of a part. Buffers of ``each`` bytes are used again."""
        with self._lock:
            found = self._buffers.pop() if self._buffers else None
        if found is None or len(found) < size:
            found = memoryview(mmap.mmap(-1, max(size, 1)))
        return _Buffer(found, size)

    def give_back(self, buffer: _Buffer) -> None:
        """Takes a buffer that is not needed any more."""
        with self._lock:
            if len(self._buffers) < self._most:
                self._buffers.append(buffer.whole)

    def close(self) -> None:
        """Ends the threads after their present part."""
        self._buffers.clear()
        for _ in self._threads:
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            finally:
                with self._lock:
                    self._wanted -= 1
                self._free.release()
            del task


class PartedOutput(Output):
    """A file that is sent in parts.

    ``earlier``: the parts that an earlier run has sent; they are kept. ``whole``: whether the file is there already, by
    a run that was killed while it published.
    """

    in_parts = True

    def __init__(
        self,
        location: Location,
        size: int,
        upload: Upload | None,
        sender: Sender,
        each: int = 0,
        earlier: dict[int, Part] | None = None,
        whole: bool = False,
    ) -> None:
        self.location, self.size = location, size
        self.part_bytes = each or part_bytes(size)
        self.upload, self._sender, self.whole = upload, sender, whole
        self.parts: dict[int, Part] = dict(earlier or {})
        self.kept = bool(earlier) or whole
        self._buffers: dict[int, _Buffer] = {}
        self._under_way: set[int] = set()
        self._literals: list[tuple[int, bytes]] = []
        self._changed = threading.Condition()
        self._failed: BaseException | None = None
        self._closed = False

    @property
    def count(self) -> int:
        """The number of parts. An empty file has one."""
        return max(-(-self.size // self.part_bytes), 1)

    @property
    def waiting(self) -> int:
        """The number of parts that are in memory because some of their bytes are missing."""
        return len(self._buffers)

    def halted_by(self, halt: Callable[[], object]) -> None:
        self._sender.halt = halt

    def holds(self, offset: int, nbytes: int) -> bool:
        if self.whole:
            return True
        numbers = range(offset // self.part_bytes, -(-(offset + nbytes) // self.part_bytes))
        return all(number in self.parts for number in numbers)

    def preset(self, literals: Iterable[tuple[int, bytes]]) -> None:
        """Gives bytes that are known before the others, as (offset, bytes). They need no memory of their own."""
        with self._changed:
            self._literals = sorted(literals)
            if (
                self.upload is not None
                and self.upload.in_order
                and self.size
                and not any(at == 0 for at, _ in self._literals)
            ):
                raise RecipeError(
                    f"{printable(self.location)}: this store takes a file from its begin on, where checksums stand that "
                    "are known last; write a folder of safetensors (a name that ends in /), or to s3://"
                )
            numbers = list(self._buffers)
        for number in numbers:
            self._fill(number)

    def write_full(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        self.check()
        done = 0
        while done < len(view):
            number, start = divmod(offset + done, self.part_bytes)
            count = min(self._size(number) - start, len(view) - done)
            self._write(number, view[done : done + count], start)
            done += count

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from parts that were not sent yet. Raises StoreError for others, which cannot be read."""
        done, wanted = 0, min(len(buffer), self.size - offset)
        while done < wanted:
            number, start = divmod(offset + done, self.part_bytes)
            count = min(self._size(number) - start, wanted - done)
            found = self._buffers.get(number)
            if found is None and (number in self.parts or number in self._under_way):
                raise StoreError(f"{printable(self.location)} was sent in part, and cannot be read before it is published")
            if found is not None:
                found.fill()
            buffer[done : done + count] = bytes(count) if found is None else found.data[start : start + count]
            done += count
        return done

    def check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def sync(self) -> None:
        """Waits for the parts that are being sent. An incomplete part is not sent."""
        self.synced = True
        with self._changed:
            now = self._under_way.copy()
            while now & self._under_way:
                self._changed.wait(_POLL_SECONDS)

    def finish(self) -> list[Part]:
        """Sends what is left, and returns all parts. Bytes that nobody wrote are zero."""
        if self.whole:
            return [self.parts[number] for number in sorted(self.parts)]
        for number in range(self.count):
            if number not in self.parts and number not in self._under_way:
                self._fill(number)
                with self._changed:
                    left = number not in self._under_way and number not in self.parts
                    buffer = self._buffers.pop(number, None) if left else None
                    if left:
                        self._under_way.add(number)
                if left:
                    buffer = buffer or self._new_buffer(number)
                    buffer.fill()
                    self._send(number, buffer)
        self.sync()
        self.check()
        return [self.parts[number] for number in range(self.count)]

    def close(self) -> None:
        """Forgets incomplete parts."""
        self._closed = True
        self._buffers.clear()

    def _new_buffer(self, number: int) -> _Buffer:
        return self._sender.buffer(self._size(number), self.part_bytes)

    def _size(self, number: int) -> int:
        return min(self.part_bytes, self.size - number * self.part_bytes)

    def _await_senders(self) -> None:
        """Waits while parts are sent more slowly than they are begun. Parts that are sent in order depend on the others."""
        if self.upload is None or self.upload.in_order:
            return
        while len(self._buffers) >= _MOST_WAITING and self._sender.busy:
            self._changed.wait(_POLL_SECONDS)
            self._sender.halt()
            self.check()

    def _write(self, number: int, data: memoryview, start: int) -> None:
        with self._changed:
            if number not in self._buffers and number not in self.parts and number not in self._under_way:
                self._await_senders()
            if self._closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self.whole or number in self.parts or number in self._under_way:
                return  # an earlier run, or this one, has sent the same bytes
            self.synced = False
            buffer = self._buffers.get(number)
            new = buffer is None
            if buffer is None:
                buffer = self._buffers[number] = self._new_buffer(number)
        buffer.put(data, start)
        self._covered(number, buffer, start, start + len(data))
        if new and self._literals:
            self._fill(number)

    def _fill(self, number: int) -> None:
        """Puts the known bytes of a part into its buffer."""
        begin = number * self.part_bytes
        end = begin + self._size(number)
        at = bisect_left(self._literals, (begin, b""))
        while at and self._literals[at - 1][0] + len(self._literals[at - 1][1]) > begin:
            at -= 1
        for offset, data in self._literals[at:]:
            if offset >= end:
                break
            first, last = max(offset, begin), min(offset + len(data), end)
            if first < last:
                with self._changed:
                    buffer = self._buffers.get(number)
                    if buffer is None and (number in self.parts or number in self._under_way):
                        return
                    if buffer is None:
                        buffer = self._buffers[number] = self._new_buffer(number)
                buffer.put(data[first - offset : last - offset], first - begin)
                self._covered(number, buffer, first - begin, last - begin)

    def _covered(self, number: int, buffer: _Buffer, begin: int, end: int) -> None:
        with self._changed:
            whole = buffer.covered(begin, end) and self._buffers.get(number) is buffer
            if whole:
                del self._buffers[number]
                self._under_way.add(number)
        if whole:
            self._send(number, buffer)

    def _send(self, number: int, buffer: _Buffer) -> None:
        upload = self.upload
        if upload is None:
            raise StoreError(f"{printable(self.location)} is there already, and cannot be written")

        def task() -> None:
            made = failed = None
            try:
                made = upload.send(number, buffer.data)
            except BaseException as error:  # noqa: BLE001 - raised by the next write
                failed = error
            self._sender.give_back(buffer)
            with self._changed:
                if made is not None:
                    self.parts[number] = made
                else:
                    self._failed = self._failed or failed
                self._under_way.discard(number)
                self._changed.notify_all()

        try:
            self._sender.run(task)
        except BaseException:
            with self._changed:
                self._under_way.discard(number)
                self._failed = self._failed or StoreError(f"{printable(self.location)} was not sent: the run was stopped")
                self._changed.notify_all()
            raise


class SmallOutput(Output):
    """A file that is kept in memory and sent whole when the output is published: an index, a receipt."""

    in_parts = True

    def __init__(self, location: Location, size: int) -> None:
        self.location, self.size = location, size
        self.data = bytearray(size)

    def holds(self, offset: int, nbytes: int) -> bool:
        return False

    def preset(self, literals: Iterable[tuple[int, bytes]]) -> None:
        """Does nothing: they are written with the others."""

    def write_full(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        self.data[offset : offset + len(view)] = view

    def read_into(self, buffer: memoryview, offset: int) -> int:
        there = memoryview(self.data)[offset : offset + len(buffer)]
        buffer[: len(there)] = there
        return len(there)
