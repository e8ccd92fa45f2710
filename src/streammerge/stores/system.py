"""System calls that a file system or platform may lack. Each function returns what it could do. None fails because its
call is missing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys

UNSUPPORTED = frozenset(
    getattr(errno, name)
    for name in ("ENOSYS", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "ENOTTY", "ENOLCK")
    if hasattr(errno, name)
)

_LEAST_AHEAD_BYTES, _MOST_AHEAD_BYTES = 128 << 10, 2 << 20
"""Of the first, Linux reads so much of any device. Of more than the second, one call would take long."""


def boot_id() -> str:
    """Returns the kernel's identifier of this boot, "" if there is none."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def full_sync(fd: int) -> None:
    """Waits until the disk has all that was written to the file; on macOS, past the cache of the drive itself."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
        else:
            return
    os.fsync(fd)


def sync_folder(folder: str | os.PathLike[str]) -> bool:
    """Makes the names in a folder durable. Returns False if the file system cannot sync a folder, or if the folder may be
    written to but not opened."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return False
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED and error.errno != errno.EBADF:
            raise
        return False
    finally:
        os.close(fd)
    return True


def open_direct(path: str) -> int:
    """Opens the file for writing past the page cache. Returns -1 if that is not possible."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECT)
    except AttributeError:
        return -1
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return -1


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Reads into a buffer. Returns the number of bytes, which may be less than the buffer holds."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def drop_cached(fd: int, offset: int, nbytes: int) -> None:
    """Asks the system to drop a range from the page cache."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


def read_ahead(fd: int, offset: int, nbytes: int) -> None:
    """Asks the system to begin to read a range into the page cache. It reads no more at once than :func:`most_ahead`."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def read_into_cache(fd: int, offset: int, nbytes: int, sink: int) -> None:
    """Reads a range into the page cache in one call, which a thread makes without Python's lock, and copies it nowhere.
    ``sink``: a descriptor of the null device."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            while nbytes > 0 and (done := os.sendfile(sink, fd, offset, nbytes)) > 0:
                offset, nbytes = offset + done, nbytes - done


def is_cached(fd: int, offset: int) -> bool:
    """Whether a byte is in the page cache. False where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:
        return False
    return True


def most_ahead(device: int) -> int:
    """Returns how many bytes of a device the system reads ahead at once. It leaves out the rest of a longer range."""
    told = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    with contextlib.suppress(OSError, ValueError), open(told) as file:
        return min(max(int(file.read()) << 10, _LEAST_AHEAD_BYTES), _MOST_AHEAD_BYTES)
    return _LEAST_AHEAD_BYTES


def umask() -> int:
    """Returns the file mode mask of the process. Linux shows it; elsewhere it can only be read by setting it."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
