"""The inputs of a run, opened as they are needed."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import ChangedError, FormatError, printable
from streammerge.stores import descriptors
from streammerge.stores.base import Damage, Input, Location, Status
from streammerge.stores.remembering import forget

if TYPE_CHECKING:
    from streammerge.stores.ahead import Ahead

LEAST_AHEAD_BYTES = 16 << 20
"""Memory for blocks of remote files where no budget says more."""
_AT_ONCE = 32


def _never() -> None:
    """Never halts."""


def statuses(locations: Sequence[Location]) -> dict[Location, Status]:
    """Returns the status of each file now. Remote files are asked for all at once."""
    apart = [location for location in locations if location.store.reads_ahead]
    if len(apart) < 2:
        return {location: location.status() for location in locations}
    from concurrent.futures import ThreadPoolExecutor  # here, since local files do without

    with ThreadPoolExecutor(_AT_ONCE, "streammerge-statuses") as pool:
        found = dict(zip(apart, pool.map(Location.status, apart), strict=True))
    return {location: found.get(location) or location.status() for location in locations}


class InputFiles:
    """Opens each input once. If there are many, the files that were unused for the longest time are forgotten. A file
    that somebody holds stays open.

    ``expected``: the status of the files when they were planned. ``polite``: released pages leave the page cache too.
    ``ahead_bytes``: memory for blocks of remote files, which is used only if there are such files; 0 for a little.
    ``streams``: how many files are read side by side.
    """

    def __init__(
        self, expected: Mapping[Location, Status], polite: bool = False, ahead_bytes: int = 0, streams: int = 1
    ) -> None:
        self._expected, self.polite, self._streams = expected, polite, streams
        self.ahead_bytes = ahead_bytes or LEAST_AHEAD_BYTES
        self._ahead: Ahead | None = None
        self._halt: Callable[[], object] = _never
        self.passed: Callable[[int], object] | None = None
        """Called with the bytes that a worker comes to next, where somebody asks for local files ahead of the workers."""
        self._files: OrderedDict[Location, Input] = OrderedDict()
        self._damaged: list[Damage] = []
        self._most = descriptors.limit()
        self._lock = threading.Lock()

    def get(self, location: Location) -> Input:
        with self._lock:
            file = self._files.get(location)
            if file is None:
                if len(self._files) >= self._most:
                    self._files.popitem(last=False)
                expected = self._expected.get(location)
                file = self._files[location] = location.open(expected, self.polite, self._damaged, self._fetcher(location))
            elif len(self._files) == self._most:  # only then does their order matter, and this runs for every tensor
                self._files.move_to_end(location)
            return file

    def _fetcher(self, location: Location) -> Ahead | None:
        if self._ahead is None and location.store.reads_ahead:
            from streammerge.stores.ahead import Ahead  # here, since local files do without

            self._ahead = Ahead(self.ahead_bytes, self._streams)
            self._ahead.halt = self._halt
        return self._ahead

    @property
    def stay_open(self) -> bool:
        """Whether there are so few that none is closed for another one."""
        return len(self._expected) <= self._most

    @property
    def reads_ahead(self) -> bool:
        """Whether any open file is fetched ahead."""
        return self._ahead is not None

    def announce(self, location: Location, offset: int, nbytes: int) -> None:
        """Says that these bytes are read next. Does nothing for files that are not fetched ahead."""
        if location.store.reads_ahead:
            self.get(location).announce(offset, nbytes)

    def alone(self, ranges: Sequence[tuple[Location, int, int]]) -> list[memoryview]:
        """Returns the bytes of short ranges that lie apart, as (file, offset, bytes). Remote files are asked for all at
        once."""

        def read(place: tuple[Location, int, int]) -> memoryview:
            location, offset, nbytes = place
            return self.get(location).alone(offset, nbytes)

        if not any(location.store.reads_ahead for location, _, _ in ranges):
            return [*map(read, ranges)]
        from concurrent.futures import ThreadPoolExecutor  # here, since local files do without

        with ThreadPoolExecutor(_AT_ONCE, "streammerge-ranges") as pool:
            return [*pool.map(read, ranges)]

    def halted_by(self, halt: Callable[[], object]) -> None:
        """``halt`` raises an exception when the run is stopping. Readers that wait for a remote file call it."""
        self._halt = halt
        if self._ahead is not None:
            self._ahead.halt = halt

    def close(self) -> None:
        """Gives back all mapped pages, closes the files, and forgets them."""
        self.release()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()
            if self._ahead is not None:
                self._ahead.close()
                self._ahead = None

    def release(self) -> None:
        """Gives back the remaining pages. Some pages cannot be given back while their neighbours are in use."""
        with self._lock:
            for file in self._files.values():
                file.release(0, file.size)

    def check_whole(self) -> None:
        """ChangedError when mapped pages of an input turned out to be gone."""
        for damage in self._damaged:
            try:
                truncated = damage.location.status().size < damage.size
            except FormatError:
                truncated = True
            if truncated:
                raise ChangedError(
                    f"{printable(damage.location)} was truncated while it was read; nothing was written, start again"
                )
            raise OSError(errno.EIO, f"{printable(damage.location)} could not be read: the disk or the network failed")

    def check_unchanged(self) -> None:
        """ChangedError when any input is no longer the file that was planned."""
        self.check_whole()
        forget()
        try:
            known = statuses(list(self._expected))
        except FormatError as error:
            raise ChangedError(
                f"{error}; it was there when the run began, so put it back and run the command again"
            ) from error.__cause__
        for location, expected in self._expected.items():
            if known[location] != expected:
                raise ChangedError(
                    f"{printable(location)} changed while it was read; nothing was written, run the command again"
                )
