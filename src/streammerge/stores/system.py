"""System calls that a file system or platform may lack. Each function returns what it could do. None fails because its
call is missing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sys

AT_FDCWD = -100
NOREPLACE, EXCHANGE = 1, 2
UNSUPPORTED = frozenset(
    getattr(errno, name)
    for name in ("ENOSYS", "EINVAL", "EOPNOTSUPP", "ENOTSUP", "ENOTTY", "ENOLCK")
    if hasattr(errno, name)
)
_SYNC_FILE_RANGE_WRITE = 2
_M_MMAP_THRESHOLD = -3
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = getattr(_libc, "fallocate", None) if sys.maxsize > 1 << 32 else None
_renameat2 = getattr(_libc, "renameat2", None)
_sync_file_range = getattr(_libc, "sync_file_range", None)


def reserve(fd: int, nbytes: int) -> bool:
    """Makes the file this long, and reserves its room on the disk. Returns False if the file system cannot reserve room.

    The C library's ``posix_fallocate`` would write a byte into each block where the system has no such call.
    """
    number = errno.ENOSYS
    if _fallocate is not None and nbytes:
        while _fallocate(fd, 0, ctypes.c_longlong(0), ctypes.c_longlong(nbytes)) != 0:
            number = ctypes.get_errno()
            if number == errno.EINTR:
                continue
            if number not in UNSUPPORTED and number != errno.EPERM:
                raise OSError(number, os.strerror(number))
            break
        else:
            return True
    os.ftruncate(fd, nbytes)
    return not nbytes


def return_large_blocks() -> None:
    """Lets the C library give each block of memory from 512 KiB on back to the system as soon as it is free.

    By default it keeps blocks of up to 32 MiB for later ones, once it has seen one of that size. A small block that is
    taken from a large one keeps the rest of it from being used for the next large one. Half a GiB was lost to that.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 512 << 10)


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


def rename2(source: str | os.PathLike[str], target: str | os.PathLike[str], flag: int) -> bool:
    """Calls ``renameat2``. Returns False if the kernel or the file system lacks it. Raises FileExistsError if the target
    exists."""
    if _renameat2 is None:
        return False
    if _renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), os.fspath(target))


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    """Lets the disk begin with a range, without waiting, so that the final sync is short."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), _SYNC_FILE_RANGE_WRITE)


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


def umask() -> int:
    """Returns the file mode mask of the process. Linux shows it; elsewhere it can only be read by setting it."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
