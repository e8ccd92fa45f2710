"""An unnamed temporary file, for what a merge method looks at again and memory has no room for."""

from __future__ import annotations

import os
import tempfile
import weakref

from streammerge.stores import libc, system
from streammerge.stores.base import Location
from streammerge.stores.local import LOCAL
from streammerge.stores.space import space_checked


class SpillFile:
    """A file of ``size`` bytes that no other process sees, and that is gone when this object is.

    ``home``: the folder of an output in the making, on whose disk the file lies. Without one, or where that is no folder of
    this machine, it lies in the system's folder for temporary files. Raises SpaceError if the disk has no room.
    """

    def __init__(self, size: int, home: Location | None = None) -> None:
        folder = home if home is not None and home.store is LOCAL else LOCAL.parse(tempfile.gettempdir())
        fd, path = tempfile.mkstemp(prefix="streammerge-", dir=folder.key)
        weakref.finalize(self, os.close, fd)
        os.unlink(path)
        self._fd, self._place = fd, folder / "a temporary file"
        with space_checked(self._place, size, folder.free_bytes()):
            libc.reserve(fd, size)

    def write(self, data: memoryview, offset: int) -> None:
        view = data.cast("B")
        begin, nbytes = offset, len(view)
        with space_checked(self._place, nbytes):
            while len(view):
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        libc.start_writing(self._fd, begin, nbytes)

    def read_into(self, data: memoryview, offset: int) -> None:
        view = data.cast("B")
        while len(view):
            count = system.pread_into(self._fd, view, offset)
            if not count:
                raise OSError(f"a temporary file in {self._place.parent} has become shorter")
            view, offset = view[count:], offset + count
