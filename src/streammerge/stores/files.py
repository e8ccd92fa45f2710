"""Local files: read, mapped, preallocated, written, synced.

Counts are always compared: a short read is a ChangedError, a short write is continued, a full disk a SpaceError found
before the first byte.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import stat
import sys
import threading
from typing import Any

from streammerge.errors import ChangedError, FormatError, printable
from streammerge.stores import system
from streammerge.stores.base import Damage, Input, Location, Output, Status
from streammerge.stores.descriptors import Descriptor
from streammerge.stores.space import no_room, space_checked
from streammerge.units import HUGE_PAGE_BYTES, PAGE_BYTES

_LEAST_DIRECT_BYTES = 256 << 10
_OUTPUT_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_LEAST_WRITEBACK_BYTES = 1 << 20
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
    """Returns the mistake of a link that leads to nothing, and its target; "" for anything else."""
    if not os.path.islink(path):
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
            with self.descriptor as fd:
                system.drop_cached(fd, start, stop - start)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        with self.descriptor as fd:
            while done < len(buffer):
                count = system.pread_into(fd, buffer[done:], offset + done)
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


class OutputFile(Output):
    """A local file of known size, preallocated; written at offsets, by any thread, in any order.

    Long writes go past the page cache (O_DIRECT) where the file system allows it. The run waits for the disk in any case,
    and new pages of the cache cost more processor time than the arithmetic of a weighted mean. ``reserved``: whether the
    disk has reserved the room.
    """

    def __init__(self, location: Location, size: int, keep: bool = False) -> None:
        path = location.key
        kept = keep and _has_size(path, size)
        if not kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._begin(location, size, kept, 0 if kept else os.O_CREAT | os.O_EXCL)
        try:
            with space_checked(location, size, location.parent.free_bytes()), self._descriptor as fd:
                self._descriptor.opened = functools.partial(_open_output, path, _OUTPUT_FLAGS)
                self.reserved = system.reserve(fd, size)
            if not (self.reserved or self.kept):
                _check_room(location, size)
        except BaseException:
            self.close()
            raise

    @classmethod
    def existing(cls, location: Location, size: int) -> OutputFile:
        """Opens a file that already exists in this size."""
        file = cls.__new__(cls)
        file._begin(location, size, True, 0)
        file.reserved = True
        return file

    def _begin(self, location: Location, size: int, kept: bool, create: int) -> None:
        self.location, self.size, self.kept, self.synced = location, size, kept, True
        self._failed: OSError | None = None
        self._direct = True
        opened = functools.partial(_open_output, location.key, _OUTPUT_FLAGS | create)
        self._descriptor = Descriptor(opened, self._before_closing)
        self._direct_descriptor = Descriptor(functools.partial(_open_direct, location.key))

    def check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def write_full(self, data: Any, offset: int) -> None:
        """Writes all of it. Whole pages go past the page cache if they are aligned in memory as in the file."""
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        self.synced = False
        with space_checked(self.location, len(view)):
            first, end = -offset % PAGE_BYTES, len(view) - (offset + len(view)) % PAGE_BYTES
            if self._direct and end - first >= _LEAST_DIRECT_BYTES:
                self._write(view[:first], offset)
                first += self._write_direct(view[first:end], offset + first)
                view, offset = view[first:], offset + first
            self._write(view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        begin, nbytes = offset, len(view)
        if not nbytes:
            return
        with self._descriptor as fd:
            while len(view):
                count = os.pwrite(fd, view, offset)
                view, offset = view[count:], offset + count
            self.synced = False  # once more, because a sync may have begun before these bytes were there
            if nbytes >= _LEAST_WRITEBACK_BYTES:
                system.start_writing(fd, begin, nbytes)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """Writes whole pages past the cache, as far as the file system can. Returns the number of bytes."""
        done = 0
        try:
            with self._direct_descriptor as fd:
                while done < len(view) and done % PAGE_BYTES == 0:
                    done += os.pwrite(fd, view[done:], offset + done)
        except _NotDirect:
            self._direct = False
        except OSError as error:
            if error.errno not in system.UNSUPPORTED:
                raise
        return done

    def read_into(self, buffer: memoryview, offset: int) -> int:
        done = 0
        with self._descriptor as fd:
            while done < len(buffer):
                count = system.pread_into(fd, buffer[done:], offset + done)
                if count == 0:
                    break
                done += count
        return done

    def sync(self) -> None:
        """Waits until the disk has everything that was written. After an error no byte can be trusted: the kernel
        forgets which pages it could not write, and a second sync would succeed without them."""
        self.check()
        with self._descriptor as fd:
            self._sync(fd)

    def _sync(self, fd: int) -> None:
        self.synced = True  # first, because another thread may write during the sync
        try:
            system.full_sync(fd)
        except BaseException:
            self.synced = False
            raise

    def _before_closing(self, fd: int) -> None:
        """Syncs before the descriptor is closed: the kernel may report an error only to those who had the file open."""
        if not self.synced and self._failed is None:
            try:
                self._sync(fd)
            except OSError as error:
                self._failed = error

    def close(self) -> None:
        self._descriptor.close()
        self._direct_descriptor.close()


class SharedOutputFile(OutputFile):
    """A local file of known size, of which several machines write ranges. Whoever opens it first makes it.

    ``exact``: the file system may have other machines. Then nothing is written past the page cache. A client of NFS writes
    a whole page for a few bytes of it, also the bytes that another machine has written meanwhile. It writes no byte more
    than it was given through a descriptor with O_DSYNC. So the parts of pages at the ends of a range go there.
    """

    def __init__(self, location: Location, size: int, exact: bool) -> None:
        self._begin(location, size, True, os.O_CREAT)
        self._direct = not exact
        self._exact = (
            Descriptor(functools.partial(_open_output, location.key, _OUTPUT_FLAGS | os.O_DSYNC)) if exact else None
        )
        try:
            with self._descriptor as fd:
                self._descriptor.opened = functools.partial(_open_output, location.key, _OUTPUT_FLAGS)
                self.reserved = os.fstat(fd).st_size == size
                if not self.reserved:
                    with space_checked(location, size, location.parent.free_bytes()):
                        self.reserved = system.reserve(fd, size)
        except BaseException:
            self.close()
            raise

    def _write(self, view: memoryview, offset: int) -> None:
        if self._exact is None:
            super()._write(view, offset)
            return
        first = min(-offset % PAGE_BYTES, len(view))
        end = max(len(view) - (offset + len(view)) % PAGE_BYTES, first)
        super()._write(view[first:end], offset + first)
        with self._exact as fd:
            for part, begin in ((view[:first], offset), (view[end:], offset + end)):
                while len(part):
                    count = os.pwrite(fd, part, begin)
                    part, begin = part[count:], begin + count

    def close(self) -> None:
        super().close()
        if self._exact is not None:
            self._exact.close()


def _check_room(location: Location, size: int) -> None:
    """SpaceError when a file that has no room reserved cannot fit any more."""
    free = location.parent.free_bytes()
    if free is not None and free < size:
        raise no_room(location, size)


class _NotDirect(OSError):
    """The file system does not write past the page cache."""


def _open_output(path: str, flags: int) -> int:
    return os.open(path, flags, 0o666)


def _open_direct(path: str) -> int:
    fd = system.open_direct(path)
    if fd < 0:
        raise _NotDirect(errno.EINVAL, os.strerror(errno.EINVAL))
    return fd


def _has_size(path: str, size: int) -> bool:
    try:
        return file_status(path).size == size
    except FormatError:
        return False
