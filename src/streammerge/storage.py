"""Every system call on checkpoint files: reading, mapping, preallocating, writing, syncing, committing.

Counts are always compared: a short read is a ChangedError, a short write is continued, a full disk a SpaceError found
before the first byte. Leaving a :class:`Staging` without :meth:`Staging.commit` removes all that it made.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from streammerge.errors import ChangedError, FormatError, LockedError, RecipeError, SpaceError, printable
from streammerge.units import decimal_bytes

COPY_BYTES = 1 << 20
_OPEN_FILES = 256
_FAULT_AROUND_BYTES = 2 << 20
_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
Identity = tuple[int, int, int, int]
Buffer = bytes | bytearray | memoryview | mmap.mmap


def identity(path: str | os.PathLike[str]) -> Identity:
    """(device, inode, size, mtime in ns) of a regular file; FormatError for anything else."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise FormatError(f"{printable(path)}: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise FormatError(f"{printable(path)} is not a regular file")
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


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


class InputFile:
    """An input, opened for reading at offsets and, when asked, mapped."""

    def __init__(self, path: str, expected: Identity | None = None) -> None:
        self.path = path
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
                self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        if offset + nbytes > self.size:
            raise self._ended(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def release(self, offset: int, nbytes: int) -> None:
        """Gives the mapped pages of that range back; touched again, they are read again.

        A fault maps pages around the one it is for, so the range begins a little earlier and ends a little later.
        """
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            start = max(offset - offset % mmap.PAGESIZE - _FAULT_AROUND_BYTES, 0)
            stop = min(offset + nbytes + _FAULT_AROUND_BYTES, self.size)
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

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

    def __init__(self, expected: dict[str, Identity]) -> None:
        self._expected = expected
        self._files: OrderedDict[str, InputFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str) -> InputFile:
        with self._lock:
            file = self._files.pop(path, None) or InputFile(path, self._expected.get(path))
            self._files[path] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def check_unchanged(self) -> None:
        """ChangedError when any input is no longer the file that was planned."""
        for path, expected in self._expected.items():
            if identity(path) != expected:
                raise ChangedError(
                    f"{printable(path)} changed while it was read; nothing was written, run the command again"
                )


class OutputFile:
    """A file of known size, preallocated; written at offsets, by any thread, in any order."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with space_checked(path, size):
                if size:
                    os.posix_fallocate(self._fd, 0, size)
        except BaseException:
            os.close(self._fd)
            raise

    def write_full(self, data: Buffer, offset: int) -> None:
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(f"bytes {offset} to {offset + len(view)} lie outside {self.path.name} of {self.size} bytes")
        with space_checked(self.path, len(view)):
            while len(view):
                count = os.pwrite(self._fd, view, offset)
                view, offset = view[count:], offset + count

    def copy_from(self, source: InputFile, source_offset: int, offset: int, nbytes: int) -> None:
        """Copies inside the kernel where the file systems allow it."""
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

    def start_writeback(self, offset: int, nbytes: int) -> None:
        """Lets the disk begin with a range that is written, without waiting, so that the final sync is short."""
        if _sync_file_range is not None and nbytes:
            _sync_file_range(self._fd, ctypes.c_longlong(offset), ctypes.c_longlong(nbytes), _SYNC_FILE_RANGE_WRITE)

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def space_checked(path: Path, nbytes: int) -> Iterator[None]:
    """Turns "no space left" into a SpaceError that says how much is missing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(path.parent).free
        missing = f"{decimal_bytes(nbytes - free)} are missing" if nbytes > free else error.strerror
        raise SpaceError(
            f"no room for {printable(path.name)}: it needs {decimal_bytes(nbytes)}, "
            f"{decimal_bytes(free)} are free at {printable(path.parent.parent)} ({missing})"
        ) from error


class Staging:
    """The hidden folder beside the output in which everything is made until it is whole.

    It has the output's file system, so that :meth:`commit` is a rename; one run at a time holds it (LockedError for
    the second); what a killed run left in it is removed by the next.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out, self._overwrite = out, overwrite
        self.folder = out.parent / f".{out.name}.streammerge"
        self.content = self.folder / "output"
        self._files: list[OutputFile] = []
        check_writable(out, overwrite)
        self._lock_fd = self._lock()
        try:
            replaced = self.folder / "replaced"
            if replaced.exists() and not self.out.exists():  # a run was killed between its two renames
                os.rename(replaced, self.out)
                check_writable(out, overwrite)
            for left in self.folder.iterdir():
                if left.name != "lock":
                    remove(left)
            self.content.mkdir()
        except BaseException:
            self.abort()
            raise

    def _lock(self) -> int:
        try:
            self.folder.mkdir(exist_ok=True)
            fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise LockedError(
                f"{printable(self.out)} is being written by process {owner or 'unknown'}; wait for it"
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def create(self, name: str, size: int) -> OutputFile:
        """A file of the output, by its name within it."""
        file = OutputFile(self.content / name, size)
        self._files.append(file)
        return file

    def temporary(self, name: str, size: int) -> OutputFile:
        """A file that lives as long as this folder."""
        file = OutputFile(self.folder / name, size)
        self._files.append(file)
        return file

    def copy_side_file(self, source: Path, name: str) -> None:
        size = file_size(source)
        file = self.create(name, size)
        file.copy_from(InputFile(str(source)), 0, 0, size)

    def commit(self, as_folder: bool) -> None:
        """Makes the output visible under its name, durably: data, then names."""
        for file in self._files:
            if file.path.parent == self.content:
                file.sync()
            file.close()
        if as_folder:
            sync_folder(self.content)
            made = self.content
        else:
            (made,) = self.content.iterdir()
        if as_folder and self._overwrite and self.out.is_dir():
            os.rename(self.out, self.folder / "replaced")
        os.replace(made, self.out)
        sync_folder(self.out.parent)
        self.abort()

    def abort(self) -> None:
        """Removes all that was made; after a commit, what was temporary."""
        for file in self._files:
            file.close()
        self._files.clear()
        if self._lock_fd >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def check_writable(out: Path, overwrite: bool) -> None:
    """RecipeError when the output exists and may not be replaced, or its folder is not there."""
    out = out.absolute()
    if not out.parent.is_dir():
        raise RecipeError(f"the folder {printable(out.parent)} does not exist; make it first")
    if out.is_dir() and not any(out.iterdir()):
        return
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise RecipeError(f"{printable(out)} exists already; pass --overwrite to replace it, or choose another name")


def free_bytes(path: Path) -> int:
    """Room on the file system of the nearest folder that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """A small file, whole or not at all; RecipeError when it cannot be written."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RecipeError(f"cannot write {printable(path)}: {error.strerror}") from error
