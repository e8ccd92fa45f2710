"""An unnamed temporary file, for what a merge method looks at again and memory has no room for."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import NamedTuple

from streammerge.stores import libc, system
from streammerge.stores.base import Location
from streammerge.stores.local import LOCAL
from streammerge.stores.space import space_checked
from streammerge.stores.system import boot_id


class SpillPlace(NamedTuple):
    """Where processes of the same machine find a spill file while its maker has it: the maker's process and descriptor, and
    what tells whether that is still the file."""

    process: int
    descriptor: int
    device: int
    inode: int
    boot: str


class SpillFile:
    """A file of ``size`` bytes that has no name, and is gone when nobody has it open any more.

    ``hurries``: whether the disk begins with what is written at once. ``home``: the folder of an output in the making, on
    whose disk the file lies. Without one, or where that is no folder of this machine, it lies in the system's folder for
    temporary files. Raises SpaceError if the disk has no room.
    """

    def __init__(self, size: int, home: Location | None = None, hurries: bool = True) -> None:
        folder = home if home is not None and home.store is LOCAL else LOCAL.parse(tempfile.gettempdir())
        fd, path = tempfile.mkstemp(prefix="streammerge-", dir=folder.key)
        self._closing = weakref.finalize(self, os.close, fd)
        os.unlink(path)
        self._fd, self._place, self._hurries = fd, folder / "a temporary file", hurries
        with space_checked(self._place, size, folder.free_bytes()):
            libc.reserve(fd, size)

    def write(self, data: memoryview, offset: int) -> None:
        view = data.cast("B")
        begin, nbytes = offset, len(view)
        with space_checked(self._place, nbytes):
            while len(view):
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count
        if self._hurries:
            libc.start_writing(self._fd, begin, nbytes)

    def read_into(self, data: memoryview, offset: int) -> None:
        view = data.cast("B")
        while len(view):
            count = system.pread_into(self._fd, view, offset)
            if not count:
                raise OSError(f"a temporary file in {self._place.parent} has become shorter")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Closes the file. Without this it is closed when nothing refers to the object."""
        self._closing()

    @property
    def place(self) -> SpillPlace:
        return SpillPlace(os.getpid(), self._fd, *_identity(self._fd), boot_id())

    @classmethod
    def at(cls, place: SpillPlace) -> SpillFile | None:
        """Opens the file of this place in any process of its machine. Returns None where that is not possible."""
        if place.boot != boot_id():
            return None
        try:
            if place.process == os.getpid():
                fd = os.dup(place.descriptor)
            else:
                fd = os.open(f"/proc/{place.process}/fd/{place.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        made = cls.__new__(cls)
        made._closing = weakref.finalize(made, os.close, fd)
        if _identity(fd) != (place.device, place.inode):
            return None
        made._fd, made._place, made._hurries = fd, LOCAL.parse(tempfile.gettempdir()) / "a temporary file", False
        return made


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
