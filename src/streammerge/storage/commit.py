"""Making an output visible: made in a hidden folder beside its place, synced, renamed in one step.

Leaving a :class:`Staging` without :meth:`Staging.commit` removes all that it made, unless it is to be continued.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path

from streammerge.errors import LockedError, RecipeError, printable
from streammerge.storage.files import OutputFile
from streammerge.storage.journal import NAME

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK)


class Staging:
    """The hidden folder beside the output in which everything is made until it is whole.

    It has the output's file system, so that :meth:`commit` is a rename; one run at a time holds it (LockedError for
    the second). What a killed run left in it is there until :meth:`clear`. ``published``: whether the output is there.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out, self._overwrite = out, overwrite
        self.folder = out.parent / f".{out.name}.streammerge"
        self.content = self.folder / "output"
        self.published = False
        self._files: dict[str, OutputFile] = {}
        check_writable(out, overwrite)
        self._lock_fd = self._lock()
        try:
            replaced = self.folder / "replaced"
            if replaced.exists() and not out.exists():  # killed between two renames, where there is no exchange
                os.rename(replaced, out)
            check_writable(out, overwrite)
            self.content.mkdir(exist_ok=True)
        except BaseException:
            self.abort(keep=True)
            raise

    def clear(self) -> None:
        """Removes what an earlier run left."""
        for left in self.folder.iterdir():
            if left.name != "lock":
                remove(left)
        self.content.mkdir()

    def _lock(self) -> int:
        while True:
            if self.folder.is_symlink():
                raise RecipeError(f"{printable(self.folder)} is a link, and what it leads to would be cleared; remove it")
            try:
                self.folder.mkdir(exist_ok=True)
                fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except FileNotFoundError:
                if self.out.parent.is_dir():
                    continue  # the run before this one was just removing the folder
                raise RecipeError(f"the folder {printable(self.out.parent)} does not exist; make it first") from None
            except OSError as error:
                if error.errno not in _FORBIDDEN:
                    raise
                raise RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}") from error
            try:
                if not _owns(fd, self.out):
                    os.close(fd)
                    continue
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            except BaseException:
                os.close(fd)
                raise
            return fd

    def create(self, name: str, size: int, keep: bool = False) -> OutputFile:
        """A file of the output, by its name within it; ``keep``: as an earlier run left it, if it did."""
        if name in self._files:
            self._files.pop(name).close()
        file = self._files[name] = OutputFile(self.content / name, size, keep)
        return file

    def temporary(self, name: str, size: int) -> OutputFile:
        """A file that lives as long as this folder."""
        file = self._files[f"../{name}"] = OutputFile(self.folder / name, size)
        return file

    @property
    def outputs(self) -> dict[str, OutputFile]:
        """The files of the output by name."""
        return {name: file for name, file in self._files.items() if file.path.parent == self.content}

    def commit(self, as_folder: bool) -> None:
        """Makes the output, whose files are synced, visible under its name, durably."""
        for file in self._files.values():
            file.close()
        (self.folder / NAME).unlink(missing_ok=True)  # from here on there is nothing to continue
        made = self.content
        if as_folder:
            sync_folder(self.content)
        else:
            (made,) = self.content.iterdir()
        self._rename(made)
        self.published = True
        try:
            sync_folder(self.out.parent)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{printable(self.out)} is there, whole, but its folder could not be synced ({error.strerror}); "
                "a power failure may still undo it",
            ) from error
        self.abort()

    def _rename(self, made: Path) -> None:
        """One step, in which the name is either nothing or the old output before, and the new one after."""
        empty_folder = self.out.is_dir() and not any(self.out.iterdir())
        if not self._overwrite and not empty_folder:
            if _rename2(made, self.out, _NOREPLACE):
                return
            check_writable(self.out, overwrite=False)
        elif made.is_dir() and self.out.is_dir() and not empty_folder:
            if _rename2(made, self.out, _EXCHANGE):
                return
            os.rename(self.out, self.folder / "replaced")
        os.replace(made, self.out)

    def abort(self, keep: bool = False) -> None:
        """Removes all that was made, or leaves it to be continued; after a commit, what was temporary."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock_fd >= 0:
            if not keep or not (self.folder / NAME).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def sweep(out: Path) -> None:
    """Removes what a run left that was killed and cannot be continued: it had not begun to write, or was done."""
    folder = out.parent / f".{out.name}.streammerge"
    if folder.is_dir() and not folder.is_symlink() and not (folder / NAME).exists() and not (folder / "replaced").exists():
        with contextlib.suppress(OSError, LockedError):
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if _owns(fd, out):
                    shutil.rmtree(folder)
            finally:
                os.close(fd)


def _owns(fd: int, out: Path) -> bool:
    """Takes the lock; False when its file was removed meanwhile. LockedError when another run has it.

    The lock is the kernel's, so it ends with its process, however that ends.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
        locked = error.errno not in _UNSUPPORTED or _runs(owner)
        if locked:
            raise LockedError(
                f"{printable(out)} is being written by process {printable(owner) or 'unknown'}; wait for it"
            ) from error
    try:
        return os.path.samestat(os.fstat(fd), os.stat(out.parent / f".{out.name}.streammerge" / "lock"))
    except FileNotFoundError:
        return False


def _runs(owner: str) -> bool:
    """Whether that process is alive, for file systems that know no locks."""
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return int(owner) != os.getpid()


def _rename2(source: Path, target: Path, flag: int) -> bool:
    """renameat2; False where the kernel or the file system has none."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    if number == errno.EEXIST:
        check_writable(target, overwrite=False)
    raise OSError(number, os.strerror(number), str(target))


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
