"""The inputs of a run, opened as they are needed."""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Mapping

from streammerge.errors import ChangedError, FormatError, printable
from streammerge.stores import descriptors
from streammerge.stores.base import Damage, Input, Location, Status


class InputFiles:
    """Opens each input once. If there are many, the files that were unused for the longest time are forgotten. A file
    that somebody holds stays open.

    ``expected``: the status of the files when they were planned. ``polite``: released pages leave the page cache too.
    """

    def __init__(self, expected: Mapping[Location, Status], polite: bool = False) -> None:
        self._expected, self._polite = expected, polite
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
                file = self._files[location] = location.open(self._expected.get(location), self._polite, self._damaged)
            elif len(self._files) == self._most:  # only then does their order matter, and this runs for every tensor
                self._files.move_to_end(location)
            return file

    def close(self) -> None:
        """Gives back all mapped pages, closes the files, and forgets them."""
        self.release()
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

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
        for location, expected in self._expected.items():
            if location.status() != expected:
                raise ChangedError(
                    f"{printable(location)} changed while it was read; nothing was written, run the command again"
                )
