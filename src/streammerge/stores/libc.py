"""Calls of the C library that Python lacks, and that a platform may lack too. Each function returns what it could do. None
fails because its call is missing."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

from streammerge.stores.system import UNSUPPORTED

AT_FDCWD = -100
NOREPLACE, EXCHANGE = 1, 2
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


def return_large_blocks() -> None:
    """Lets the C library give each block of memory from 512 KiB on back to the system as soon as it is free.

    By default it keeps blocks of up to 32 MiB for later ones, once it has seen one of that size. A small block that is
    taken from a large one keeps the rest of it from being used for the next large one. Half a GiB was lost to that.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 512 << 10)
