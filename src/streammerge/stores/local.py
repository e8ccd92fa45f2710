"""Files: read, mapped, preallocated, written, synced.

Counts are always compared: a short read is a ChangedError, a short write is continued, a full disk a SpaceError found
before the first byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from streammerge.errors import ChangedError, FormatError, SpaceError, printable
from streammerge.stores import faults
from streammerge.units import HUGE_PAGE_BYTES, PAGE_BYTES, decimal_bytes

COPY_BYTES = 1 << 20
_LEAST_DIRECT_BYTES = 256 << 10
_LEAST_WRITEBACK_BYTES = 1 << 20
_OPEN_FILES = 256
_KINDS = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISSOCK, "socket"),
)
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
Identity = tuple[int, int, int, int]
Damage = tuple[str, int]
Buffer = bytes | bytearray | memoryview | mmap.mmap


def identity(path: str | os.PathLike[str]) -> Identity:
    """(device, inode, size, mtime in ns) of a regular file; FormatError for anything else.

    The rule for links, the same for every input file: a link is followed wherever it leads, for example into the cache of
    the hub or to another disk, and must end at a regular file.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise FormatError(broken_link(path) or f"{printable(path)}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = next((word for is_kind, word in _KINDS if is_kind(status.st_mode)), "special file")
        target = f" is a link to {printable(os.path.realpath(path))}, which" if os.path.islink(path) else ""
        raise FormatError(f"{printable(path)}{target} is not a regular file but a {kind}; put the file itself there")
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def broken_link(path: str | os.PathLike[str]) -> str:
    """What is wrong with a link that leads to nothing, and where it points; "" for anything else."""
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


def file_size(path: str | os.PathLike[str]) -> int:
    return identity(path)[2]


@contextlib.contextmanager
def open_stream(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file, buffered, for parsing headers."""
    identity(path)
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed below; only opening it may fail like this
    except OSError as error:
        raise FormatError(f"{printable(path)}: {error.strerror or error}") from error
    with stream:
        yield stream


def read_full(path: str | os.PathLike[str], offset: int, nbytes: int) -> bytes:
    """Exactly ``nbytes`` at ``offset``; FormatError when the file ends before."""
    with open_stream(path) as stream:
        stream.seek(offset)
        data = stream.read(nbytes)
    if len(data) != nbytes:
        raise FormatError(f"{printable(path)} ends at byte {offset + len(data)}, {nbytes - len(data)} bytes too early")
    return data


def outside(path: str, spans: list[tuple[int, int]]) -> Iterator[bytes]:
    """All bytes of a file but those of the given (offset, bytes), which are in order."""
    cursor = 0
    with open_stream(path) as stream:
        for offset, nbytes in (*spans, (os.fstat(stream.fileno()).st_size, 0)):
            stream.seek(cursor)
            while cursor < offset:
                data = stream.read(min(offset - cursor, COPY_BYTES))
                if not data:
                    return
                yield data
                cursor += len(data)
            cursor = max(cursor, offset + nbytes)


def digest_outside(path: str, spans: list[tuple[int, int]]) -> str:
    """SHA-256 of a file but for the given (offset, bytes)."""
    import hashlib  # here, since it brings all of OpenSSL

    digest = hashlib.sha256()
    for data in outside(path, spans):
        digest.update(data)
    return digest.hexdigest()


class InputFile:
    """An input, opened for reading at offsets and, when asked, mapped.

    Its path and size go into ``damaged`` when mapped pages were touched that are gone: it was truncated, or the disk
    failed. ``polite``: what is released leaves the page cache too.
    """

    def __init__(
        self, path: str, expected: Identity | None = None, damaged: list[Damage] | None = None, polite: bool = False
    ) -> None:
        self.path, self._polite = path, polite
        self._damaged: list[Damage] = [] if damaged is None else damaged
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._fd)
        self.size = status.st_size
        if expected not in (None, (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)):
            os.close(self._fd)
            raise ChangedError(f"{printable(path)} changed since it was planned; run the command again")
        self._map: mmap.mmap | None = None
        self._lock = threading.Lock()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def view(self, offset: int, nbytes: int) -> memoryview:
        """The bytes as mapped pages: nothing is read until they are touched."""
        with self._lock:
            if self._map is None:
                try:
                    self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
                except ValueError as error:  # the file is shorter than it was
                    raise self._ended(offset, nbytes) from error
                faults.watch(self._map, functools.partial(self._damaged.append, (self.path, self.size)))
        if offset + nbytes > self.size:
            raise self._ended(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Gives the pages of that range back that are mapped, and where one is polite, cached; touched again, they are
        read again.

        A touch maps more than what is touched, so the range begins a little earlier and ends a little later.
        """
        start = max(offset - offset % mmap.PAGESIZE - HUGE_PAGE_BYTES, 0)
        stop = min(offset + nbytes + HUGE_PAGE_BYTES, self.size)
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        if self._polite and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills the buffer from ``offset``; ChangedError when the file ends before."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                raise self._ended(offset, len(buffer))
            done += count

    def _ended(self, offset: int, nbytes: int) -> ChangedError:
        return ChangedError(
            f"{printable(self.path)} ended before byte {offset + nbytes}: it was changed while it was read; start again"
        )


class InputFiles:
    """The inputs of a run, opened as they are needed; the longest unused are closed beyond a few hundred."""

    def __init__(self, expected: dict[str, Identity], polite: bool = False) -> None:
        self._expected, self._polite = expected, polite
        self._files: OrderedDict[str, InputFile] = OrderedDict()
        self._damaged: list[Damage] = []
        self._lock = threading.Lock()

    def get(self, path: str) -> InputFile:
        with self._lock:
            file = self._files.pop(path, None) or InputFile(path, self._expected.get(path), self._damaged, self._polite)
            self._files[path] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def close(self) -> None:
        """Gives back all that is mapped, and closes what nobody else uses any more."""
        self.release()
        with self._lock:
            self._files.clear()

    def release(self) -> None:
        """Gives back what is left of them; some pages cannot go while their neighbours are in use."""
        with self._lock:
            for file in self._files.values():
                file.release(0, file.size)

    def check_whole(self) -> None:
        """ChangedError when mapped pages of an input turned out to be gone."""
        for path, size in self._damaged:
            if not os.path.exists(path) or os.stat(path).st_size < size:
                raise ChangedError(f"{printable(path)} was truncated while it was read; nothing was written, start again")
            raise OSError(errno.EIO, f"{printable(path)} could not be read: the disk or the network failed")

    def check_unchanged(self) -> None:
        """ChangedError when any input is no longer the file that was planned."""
        self.check_whole()
        for path, expected in self._expected.items():
            if identity(path) != expected:
                raise ChangedError(
                    f"{printable(path)} changed while it was read; nothing was written, run the command again"
                )


class OutputFile:
    """A file of known size, preallocated; written at offsets, by any thread, in any order.

    ``keep``: what an earlier run has written stays, where such a file of that size is there; ``kept`` says whether.
    ``synced``: whether nothing was written since it was synced.

    Long writes go past the page cache where the file system lets them (O_DIRECT): "done" means on the disk in any case,
    and new pages of cache cost more processor time than all arithmetic of a weighted mean.
    """

    def __init__(self, path: Path, size: int, keep: bool = False) -> None:
        self.path, self.size = path, size
        self.synced = True
        self.kept = keep and path.is_file() and path.stat().st_size == size
        if not self.kept:
            path.unlink(missing_ok=True)
        self._open(0 if self.kept else os.O_CREAT | os.O_EXCL)
        try:
            with space_checked(path, size):
                if size:
                    os.posix_fallocate(self._fd, 0, size)
        except BaseException:
            self.close()
            raise

    @classmethod
    def existing(cls, path: str, size: int) -> OutputFile:
        """A file that was made already, opened once more: a worker in another process writes to it."""
        file = cls.__new__(cls)
        file.path, file.size = Path(path), size
        file.synced, file.kept = True, True
        file._open(0)
        return file

    def _open(self, flags: int) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o666)
        self._direct_fd = _open_direct(self.path)

    def write_full(self, data: Buffer, offset: int) -> None:
        """Writes all of it. What is to go past the page cache lies in memory as it will in the file, page for page."""
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(view)} lie outside {self.path.name} of {self.size} bytes")
        self.synced = False
        with space_checked(self.path, len(view)):
            first, end = -offset % PAGE_BYTES, len(view) - (offset + len(view)) % PAGE_BYTES
            if self._direct_fd >= 0 and end - first >= _LEAST_DIRECT_BYTES:
                self._write(view[:first], offset)
                first += self._write_direct(view[first:end], offset + first)
                view, offset = view[first:], offset + first
            self._write(view, offset)

    def _write(self, view: memoryview, offset: int) -> None:
        begin, nbytes = offset, len(view)
        while len(view):
            count = os.pwrite(self._fd, view, offset)
            view, offset = view[count:], offset + count
        if nbytes >= _LEAST_WRITEBACK_BYTES and _sync_file_range is not None:
            # Lets the disk begin, without waiting, so that the final sync is short.
            _sync_file_range(self._fd, ctypes.c_longlong(begin), ctypes.c_longlong(nbytes), _SYNC_FILE_RANGE_WRITE)

    def _write_direct(self, view: memoryview, offset: int) -> int:
        """Writes whole pages past the cache, as far as the file system lets it; how many bytes."""
        done = 0
        try:
            while done < len(view) and done % PAGE_BYTES == 0:
                done += os.pwrite(self._direct_fd, view[done:], offset + done)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        return done

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fills the buffer from ``offset``; how many bytes there were."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def copy_from(self, source: InputFile, source_offset: int, offset: int, nbytes: int) -> None:
        """Copies inside the kernel where the file systems allow it."""
        self.synced = False
        while nbytes:
            try:
                count = os.copy_file_range(source.fileno(), self._fd, nbytes, source_offset, offset)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                count = min(nbytes, COPY_BYTES)
                piece = bytearray(count)
                source.read_into(memoryview(piece), source_offset)
                self.write_full(piece, offset)
            if count == 0:
                raise source._ended(source_offset, nbytes)
            source_offset, offset, nbytes = source_offset + count, offset + count, nbytes - count

    def sync(self) -> None:
        """Waits until the disk has all that was written. After an error nothing of the file may be trusted: the kernel
        forgets which pages it could not write, and a second try would succeed without them."""
        self.synced = True  # before, for others may write meanwhile
        try:
            os.fsync(self._fd)
        except BaseException:
            self.synced = False
            raise

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


def _open_direct(path: Path) -> int:
    """The file opened for writing past the page cache; -1 where that cannot be."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except (OSError, AttributeError):
        return -1


def free_bytes(path: Path) -> int:
    """Room on the file system of the nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


@contextlib.contextmanager
def space_checked(path: Path, nbytes: int) -> Iterator[None]:
    """Turns "no space left" into a SpaceError that says how much is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = free_bytes(path.parent)
        missing = f"{decimal_bytes(nbytes - free)} are missing" if nbytes > free else error.strerror
        raise SpaceError(
            f"no room for {printable(path.name)}: it needs {decimal_bytes(nbytes)}, "
            f"{decimal_bytes(free)} are free on that disk ({missing})"
        ) from error
