"""The common part of stores that are read over a network by ranged requests.

A store of this kind defines three questions, each of which is one request or a few: :meth:`RemoteStore.look` (the status
of a file), :meth:`RemoteStore.entries` (what is in a folder) and :meth:`RemoteStore.fetched` (a range of one version).
From these follow statuses, listings, patterns, streams and inputs that are read ahead. A failure that may pass is raised as
:class:`Passing`; the request is then repeated.
"""

from __future__ import annotations

import functools
import io
import random
import threading
import time
from abc import abstractmethod
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar

from streammerge.errors import ChangedError, FormatError, StoreError, printable
from streammerge.stores.ahead import BLOCK_BYTES, Ahead
from streammerge.stores.base import Input, Location, Status, Store
from streammerge.stores.buffers import Buffers
from streammerge.stores.remembering import known, recalled
from streammerge.stores.streams import InputStream
from streammerge.stores.tags import CELL_BYTES, cells, read_through

T = TypeVar("T")
PAGE_BYTES = 16 << 10
"""Headers are read in pages of this size, so that most take one request."""
_MOST_PAGE_BYTES, _MOST_PAGES_BYTES = 256 << 10, 8 << 20
_BUFFER_BYTES = 512
_NEAR = 4
_HEADS_AT_ONCE = 32
TRIES = 8
"""How often a request is made before its failure counts."""
_FIRST_WAIT_SECONDS, _MOST_WAIT_SECONDS = 0.1, 5.0


class Passing(Exception):
    """Raised for a failure that may pass: a busy server, a lost connection, a body that is too short.

    ``wait_seconds``: how long the server asks to wait. ``advice``: what to do if it does not pass.
    """

    def __init__(self, said: object, wait_seconds: float = 0.0, advice: str = "") -> None:
        super().__init__(said)
        self.wait_seconds, self.advice = wait_seconds, advice or "look at the network, and run it again"


class Unresolved(Passing):
    """Raised where the system does not know the address of a host, as on a machine without a network. It may pass only if a
    host has answered before."""


class Entries(NamedTuple):
    """What is directly in a folder: its files with their status, and its folders. Both are empty if there is no folder."""

    files: dict[str, Status]
    folders: frozenset[str]


_reached = threading.Event()
"""Whether a host has answered in this process."""


def persistently(ask: Callable[[], T], what: str) -> T:
    """Returns the answer to a request. Repeats it after a :class:`Passing` failure, with growing pauses.

    ``what``: names the request in the error. Raises StoreError if it fails each time. Without a network it is not repeated
    while nothing was read yet: a path that is mistyped may look like a repository, or like a bucket.
    """
    for attempt in range(TRIES):
        try:
            answer = ask()
        except Passing as error:
            if isinstance(error, Unresolved) and not _reached.is_set():
                raise StoreError(f"{what} failed ({printable(error)}); {error.advice}") from error
            if attempt == TRIES - 1:
                raise StoreError(f"{what} failed {TRIES} times ({printable(error)}); {error.advice}") from error
            wait = min(_FIRST_WAIT_SECONDS * 2**attempt, _MOST_WAIT_SECONDS)
            time.sleep(max(wait * random.uniform(0.5, 1.0), error.wait_seconds))
        else:
            _reached.set()
            return answer
    raise AssertionError("unreachable")


class RangedInput(Input):
    """A file of a remote store, pinned to one version.

    ``ahead``: holds what is read next. Without it, pages are read, which are remembered while a plan is made.
    """

    def __init__(self, location: Location, store: RemoteStore, status: Status, ahead: Ahead | None = None) -> None:
        self.location, self.size = location, status.size
        self.identity = (store.scheme, *status.place, status.size, status.version)
        self._store, self._status, self._ahead = store, status, ahead
        self._ask = store.fetcher(location, status)
        self._pages: _Pages = recalled(("pages", self.identity), _Pages)

    def fetch(self, start: int, stop: int, buffers: Buffers | None = None) -> memoryview:
        """Returns these bytes of the file, in one of ``buffers`` where the store can put them there.

        Raises ChangedError if the file is another version now.
        """
        sums = self._store.sums(self, self.location, self._status) if self._ahead is not None else None
        return persistently(lambda: self._once(start, stop, sums, buffers), f"reading {printable(self.location)}")

    def _once(self, start: int, stop: int, sums: Sequence[int] | None = None, buffers: Buffers | None = None) -> memoryview:
        """Asks once. ``sums``: the checksums of the file's cells, if they are known."""
        data = memoryview(self._ask(start, stop, buffers)).cast("B")
        if len(data) != stop - start:
            raise Passing(f"{len(data)} bytes came instead of {stop - start}")
        if self._ahead is None and self._store.unsafe():
            again = memoryview(self._ask(start, stop, None)).cast("B")
            if again != data:
                raise Passing("other bytes came the second time")
        if sums is not None and start % CELL_BYTES == 0 and (stop % CELL_BYTES == 0 or stop == self.size):
            first = start // CELL_BYTES
            if list(cells(data)) != sums[first : first + -(-len(data) // CELL_BYTES)]:
                raise Passing("other bytes came than the file has")
        return data

    def read_through(self, tag: str) -> list[int] | None:
        """Reads the whole file, and returns the checksums of its cells, whose digest is the tag. None if the tag is none.

        Raises StoreError if the file is different each time that it is read.
        """
        seen = set[str]()
        for _ in range(TRIES):
            spans = [(at, min(at + BLOCK_BYTES, self.size)) for at in range(0, self.size, BLOCK_BYTES)]
            what = f"reading {printable(self.location)}"
            blocks = (persistently(functools.partial(self._once, *span), what) for span in spans)
            is_digest, plain, sums = read_through(tag, self.size, blocks)
            if is_digest:
                return sums
            if plain in seen:  # the same bytes again: the tag is no digest, as with encryption by a key service
                return None
            seen.add(plain)
        raise StoreError(f"{printable(self.location)} is different each time that it is read; look at the network")

    def announce(self, offset: int, nbytes: int) -> None:
        if self._ahead is not None:
            self._ahead.announce(self, offset, nbytes)

    def alone(self, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes > self.size:
            raise self.ended(offset, nbytes)
        return self.fetch(offset, offset + nbytes) if nbytes else memoryview(b"")

    def held(self, offset: int, nbytes: int) -> memoryview | None:
        if self._ahead is None or offset + nbytes > self.size or not nbytes:
            return None
        return self._ahead.held(self, offset, nbytes)

    def read_starts(self, offsets: Sequence[int]) -> None:
        """Reads the bytes that a stream reads at these places, all at once. Places close together are one request."""
        spans: list[tuple[int, int]] = []
        for offset in sorted(offsets):
            start, stop = offset, min(offset + _BUFFER_BYTES, self.size)
            if spans and stop - spans[-1][0] <= PAGE_BYTES:
                spans[-1] = spans[-1][0], stop
            elif start < stop:
                spans.append((start, stop))

        def read(span: tuple[int, int]) -> None:
            self._pages.add(span[0], self.fetch(*span))

        with ThreadPoolExecutor(_HEADS_AT_ONCE, "streammerge-heads") as pool:
            for made in [pool.submit(read, span) for span in spans]:
                made.result()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        nbytes = len(buffer)
        if offset + nbytes > self.size:
            raise self.ended(offset, nbytes)
        if not nbytes:
            return
        buffer = buffer.cast("B") if buffer.format != "B" else buffer
        if self._ahead is not None:
            self._ahead.read_into(self, buffer, offset)
            return
        if self._pages.read_into(buffer, offset):
            return
        start = offset - offset % PAGE_BYTES
        stop = min(-(-(offset + nbytes) // PAGE_BYTES) * PAGE_BYTES, self.size)
        data = self.fetch(start, stop)
        buffer[:] = data[offset - start : offset - start + nbytes]
        if len(data) <= _MOST_PAGE_BYTES:
            self._pages.add(start, data)


class _Pages:
    """Short ranges of a file that were read, by their starts. Safe for threads. Forgets the first if they are too many."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._pages: dict[int, memoryview] = {}
        self._lock = threading.Lock()
        self._nbytes = 0

    def read_into(self, buffer: memoryview, offset: int) -> bool:
        """Fills the buffer if one range holds all of it. Returns whether it does."""
        with self._lock:
            at = bisect_right(self._starts, offset)
            near = [(start, self._pages[start]) for start in self._starts[max(at - _NEAR, 0) : at]]
        for start, data in reversed(near):
            part = data[offset - start : offset - start + len(buffer)]
            if len(part) == len(buffer):
                buffer[:] = part
                return True
        return False

    def add(self, start: int, data: memoryview) -> None:
        with self._lock:
            if start not in self._pages:
                insort(self._starts, start)
            self._nbytes += len(data) - len(self._pages.get(start, b""))
            self._pages[start] = data
            while self._nbytes > _MOST_PAGES_BYTES and len(self._starts) > 1:
                first = next(iter(self._pages))
                self._nbytes -= len(self._pages.pop(first))
                self._starts.remove(first)


class RemoteStore(Store):
    """A store that is read by ranged requests."""

    mappable = False
    reads_ahead = True

    @abstractmethod
    def look(self, location: Location) -> Status | None:
        """Returns the status of a file now, None if there is none. ``version``: plain text."""

    @abstractmethod
    def entries(self, location: Location) -> Entries:
        """Returns what is directly in a folder now."""

    def unsafe(self) -> bool:
        """Whether bytes may change on their way, as on a connection without TLS. Headers are then read twice."""
        return False

    def sums(self, file: RangedInput, location: Location, status: Status) -> Sequence[int] | None:
        """Returns the checksums of a file's cells, by which each range is compared; None if nothing tells them."""
        return None

    @abstractmethod
    def fetched(self, location: Location, status: Status, start: int, stop: int, buffers: Buffers | None = None) -> Any:
        """Returns a buffer with these bytes of that version of the file, one of ``buffers`` where that is cheaper.

        Raises ChangedError if the file has another version now, :class:`Passing` for a failure that may pass, StoreError
        for others.
        """

    def fetcher(self, location: Location, status: Status) -> Callable[[int, int, Buffers | None], Any]:
        """Returns :meth:`fetched` for one version of a file. Asked once for each file that is opened: what settings say is
        not looked up for each request."""
        return functools.partial(self.fetched, location, status)

    # -------------------------------------------------------------------------------------------------------------- inputs

    def status(self, location: Location) -> Status:
        found = self._status(location)
        if found is None:
            what = "is not a regular file but a folder" if self.is_folder(location) else "does not exist"
            raise FormatError(f"{printable(location)} {what}")
        return found

    def _status(self, location: Location) -> Status | None:
        listed: Entries | None = known(("entries", location.parent))
        if listed is not None and location.name:
            return listed.files.get(location.name)
        return recalled(("status", location), lambda: self.look(location))

    def is_file(self, location: Location) -> bool:
        return self._status(location) is not None

    def is_folder(self, location: Location) -> bool:
        listed: Entries | None = known(("entries", location.parent))
        if listed is not None and location.name:
            return location.name in listed.folders
        return any(self._entries(location))

    def exists(self, location: Location) -> bool:
        return self.is_file(location) or self.is_folder(location)

    def _entries(self, location: Location) -> Entries:
        return recalled(("entries", location), lambda: self.entries(location))

    def list_names(self, location: Location) -> list[str]:
        found = self._entries(location)
        if not any(found):
            raise FileNotFoundError(2, "No such folder", str(location))
        return list(dict.fromkeys((*found.files, *found.folders)))

    def opened(self, location: Location) -> Input:
        return RangedInput(location, self, self.status(location))

    def opened_ahead(self, location: Location, expected: Status | None, ahead: Ahead) -> Input:
        return RangedInput(location, self, self.status(location) if expected is None else expected, ahead)

    def stream(self, location: Location) -> BinaryIO:
        return io.BufferedReader(InputStream(self.opened(location)), _BUFFER_BYTES)

    def read_heads(self, locations: Iterable[Location]) -> None:
        """Reads the first page of files, all at once."""

        def read(location: Location) -> None:
            file = self.open(location)
            if file.size:
                file.read_into(memoryview(bytearray(min(file.size, PAGE_BYTES))), 0)

        with ThreadPoolExecutor(_HEADS_AT_ONCE, "streammerge-heads") as pool:
            for made in [pool.submit(read, location) for location in locations]:
                try:
                    made.result()
                except (FormatError, ChangedError):  # it is said by the reader
                    continue
