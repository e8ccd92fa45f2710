"""Local files that are written: preallocated, written at offsets, synced.

Counts are always compared: a short write is continued, a full disk is a SpaceError found before the first byte.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from typing import Any

from streammerge.errors import FormatError
from streammerge.stores import libc, system
from streammerge.stores.base import Location, Output
from streammerge.stores.descriptors import Descriptor
from streammerge.stores.files import file_status
from streammerge.stores.space import no_room, space_checked
from streammerge.units import PAGE_BYTES

_LEAST_DIRECT_BYTES = 256 << 10
_OUTPUT_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_LEAST_WRITEBACK_BYTES = 1 << 20


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
                self.reserved = libc.reserve(fd, size)
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
                libc.start_writing(fd, begin, nbytes)

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
                        self.reserved = libc.reserve(fd, size)
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
