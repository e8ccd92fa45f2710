"""Local files that are read, and mapped. Counts are always compared: a short read is a ChangedError."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import stat
import sys
import threading

from streammerge.errors import ChangedError, FormatError, printable
from streammerge.stores import system
from streammerge.stores.base import Damage, Input, Location, Status
from streammerge.stores.descriptors import Descriptor
from streammerge.units import HUGE_PAGE_BYTES

_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)


def status_of(found: os.stat_result) -> Status:
    """Returns the status: device and inode are the place, the modification time is the version."""
    return Status((found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns)


def file_status(path: str) -> Status:
    """The status of a regular file; FormatError for anything else.

    Links of every input file are followed to any place, for example into the cache of the hub or to another disk. They must
    end at a regular file.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise FormatError(broken_link(path) or f"{printable(path)}: {said}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = next((word for is_kind, word in _KINDS if is_kind(found.st_mode)), "special file")
        target = f" is a link to {printable(os.path.realpath(path))}, which" if os.path.islink(path) else ""
        raise FormatError(f"{printable(path)}{target} is not a regular file but a {kind}; put the file itself there")
    return status_of(found)


def broken_link(path: str) -> str:
    """Returns the mistake of a link that leads to nothing, and its target, or of a name in a folder that this user may not
    enter; "" for anything else."""
    if not os.path.islink(path):
        try:
            os.lstat(path)
        except PermissionError as error:
            return f"{printable(path)}: {error.strerror}, since its folder may not be entered; allow it (chmod a+x)"
        except (OSError, ValueError):
            pass
        return ""
    try:
        os.stat(path)
    except OSError as error:
        link, remedy = f"{printable(path)} is a link to", "put the file there, or remove the link"
        if error.errno == errno.ELOOP:
            return f"{link} {printable(os.readlink(path))}, which leads in a circle; {remedy}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return f"{link} {printable(os.path.realpath(path))}, which is absent; {remedy}"
    return ""


class InputFile(Input):
    """A local file, opened for reading at offsets and, when asked, mapped.

    ``damaged`` collects the file if mapped pages turn out to be gone: it was truncated, or the disk failed. ``polite``:
    released pages leave the page cache too.
    """

    def __init__(
        self,
        location: Location,
        expected: Status | None = None,
        damaged: list[Damage] | None = None,
        polite: bool = False,
    ) -> None:
        self.location, self._polite = location, polite
        self._damaged: list[Damage] = [] if damaged is None else damaged
        self._map: mmap.mmap | None = None
        self._step: int | None = None
        """Bytes that the system reads ahead at once."""
        self._lock = threading.Lock()
        self.descriptor = Descriptor(functools.partial(_open_as, location, expected))
        with self.descriptor as fd:
            status = status_of(os.fstat(fd))
            self.size = status.size
        self.descriptor.opened = functools.partial(_open_as, location, status)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.descriptor.close()

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes as mapped pages: nothing is read until they are touched."""
        with self._lock:
            if self._map is None:
                try:
                    with self.descriptor as fd:
                        self._map = _mapped(fd, self.size)
                except ValueError as error:  # the file is shorter than it was
                    raise self.ended(offset, nbytes) from error
                from streammerge.stores import faults  # here, because headers are read without a map

                faults.watch(self._map, functools.partial(self._damaged.append, Damage(self.location, self.size)))
        if offset + nbytes > self.size:
            raise self.ended(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Gives back the mapped pages of a range, and its cached pages too if the file is ``polite``. A later access
        reads them again.

        A touch maps more than what is touched, so the range begins a little earlier and ends a little later.
        """
        start = max(offset - offset % mmap.PAGESIZE - HUGE_PAGE_BYTES, 0)
        stop = min(offset + nbytes + HUGE_PAGE_BYTES, self.size)
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        if self._polite:
            with self.descriptor as fd:  # not what comes after the range, which the system may have read ahead
                system.drop_cached(fd, start, min(offset + nbytes, self.size) - start)

    def is_cached(self, offset: int) -> bool:
        with self.descriptor as fd:
            return system.is_cached(fd, offset)

    def will_need(self, offset: int, nbytes: int) -> None:
        with self.descriptor as fd:
            if self._step is None:
                self._step = system.most_ahead(os.fstat(fd).st_dev)
            stop = min(offset + nbytes, self.size)
            for start in range(offset, stop, self._step):
                system.read_ahead(fd, start, min(self._step, stop - start))

    def read_into_cache(self, offset: int, nbytes: int, sink: int) -> None:
        with self.descriptor as fd:
            system.read_into_cache(fd, offset, nbytes, sink)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        with self.descriptor as fd:
            done = system.pread_into(fd, buffer, offset)
            while done < len(buffer):
                count = system.pread_into(fd, buffer[done:], offset + done) if done else 0
                if count == 0:
                    raise self.ended(offset, len(buffer))
                done += count

    def close(self) -> None:
        self.descriptor.close()


def _open_as(location: Location, expected: Status | None) -> int:
    """Opens a file for reading. ChangedError when it is not the file that was expected, and the descriptor is closed."""
    try:
        fd = os.open(location.key, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if expected is None:
            raise
        raise ChangedError(f"{printable(location)} is gone since it was planned; run the command again") from error
    if expected is not None and status_of(os.fstat(fd)) != expected:
        os.close(fd)
        raise ChangedError(f"{printable(location)} changed since it was planned; run the command again")
    return fd


def _mapped(fd: int, size: int) -> mmap.mmap:
    """Maps the file read-only. From Python 3.13 on, the map keeps no descriptor."""
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, size, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(fd, size, access=mmap.ACCESS_READ)
