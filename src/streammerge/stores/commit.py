"""Making an output visible: made in a hidden folder beside its place, synced, renamed in one step.

Leaving a :class:`Staging` without :meth:`Staging.commit` removes all that it made, unless it is to be continued.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from pathlib import Path

from streammerge.errors import LockedError, RecipeError, printable
from streammerge.stores.journal import NAME, NEW
from streammerge.stores.local import OutputFile

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
_renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
_PUT_BY, _REPLACED = "journal.done", "replaced"
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK)


class Staging:
    """The hidden folder beside the output in which everything is made until it is whole.

    It has the output's file system, so that :meth:`commit` is a rename; one run at a time holds it (LockedError for
    the second). What a killed run left in it is there until :meth:`clear`.
    """

    def __init__(self, out: Path, overwrite: bool = False) -> None:
        self.out, self._overwrite = out, overwrite
        self.folder = staging_folder(out)
        self.content = self.folder / "output"
        self._made: tuple[int, int] | None = None
        self._files: dict[str, OutputFile] = {}
        check_writable(out, overwrite)
        self._lock_fd = self._lock()
        try:
            _recover(self.folder, out)
            check_writable(out, overwrite)
            self.content.mkdir(exist_ok=True)
        except BaseException:
            self.abort(keep=True)
            raise

    def clear(self) -> None:
        """Removes what an earlier run left."""
        _remove_ours(self.folder)
        self.content.mkdir()

    def _lock(self) -> int:
        while True:
            if os.path.islink(self.folder):
                raise RecipeError(f"{printable(self.folder)} is a link, and what it leads to would be cleared; remove it")
            try:
                self.folder.mkdir(exist_ok=True)
                fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            except (FileNotFoundError, FileExistsError):
                if not self.out.parent.is_dir():
                    raise RecipeError(f"the folder {printable(self.out.parent)} does not exist; make it first") from None
                if self.folder.exists() and not self.folder.is_dir():
                    raise RecipeError(f"{printable(self.folder)} is in the way; remove it") from None
                continue  # the run before this one was just removing the folder
            except OSError as error:
                if error.errno not in _FORBIDDEN:
                    raise
                raise RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}") from error
            try:
                if not _owns(fd, self.out):
                    os.close(fd)
                    continue
                with contextlib.suppress(OSError):  # who it is, for the one that comes second; a full disk says it later
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
        """The files of the output by name; of this moment, for other threads ask too."""
        return {name: file for name, file in dict(self._files).items() if file.path.parent == self.content}

    @property
    def published(self) -> bool:
        """Whether what was made here is what is under the output's name."""
        try:
            return self._made is not None and identity_of(self.out) == self._made
        except OSError:
            return False

    @property
    def resumable(self) -> bool:
        """Whether a next run could go on from here."""
        return (self.folder / NAME).exists()

    def commit(self, as_folder: bool) -> None:
        """Makes the output visible under its name, durably: data, then names."""
        for file in self.outputs.values():
            if not file.synced:
                file.sync()
        for file in self._files.values():
            file.close()
        made = self.content
        if as_folder:
            sync_folder(self.content)
        else:
            (made,) = self.content.iterdir()
        journal, put_by = self.folder / NAME, self.folder / _PUT_BY
        try:
            if journal.exists():
                os.rename(journal, put_by)  # so that what is left after a crash can be told from what can be continued
            self._made = identity_of(made)
            self._rename(made)
        except BaseException:
            if put_by.exists() and not self.published:
                os.rename(put_by, journal)
            raise
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
            os.replace(made, self.out)
        elif made.is_dir() and self.out.is_dir() and not empty_folder:
            if not _rename2(made, self.out, _EXCHANGE):
                self._rename_twice(made)
        else:
            os.replace(made, self.out)

    def _rename_twice(self, made: Path) -> None:
        """For file systems that cannot exchange; a crash in between is mended by the next run."""
        replaced = self.folder / _REPLACED
        os.rename(self.out, replaced)
        try:
            os.replace(made, self.out)
        except BaseException:
            if not self.out.exists():
                os.rename(replaced, self.out)
            raise

    def abort(self, keep: bool = False) -> None:
        """Removes all that was made, or leaves it to be continued; after a commit, what was temporary."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._lock_fd >= 0:
            if not (keep and self.resumable):
                _remove_folder(self.folder, self.out)
            os.close(self._lock_fd)
            self._lock_fd = -1


def staging_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.streammerge"


def identity_of(path: Path) -> tuple[int, int]:
    """(device, inode) of a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _recover(folder: Path, out: Path) -> None:
    """Puts things right after a crash within a commit: an old output between two renames, a journal put by."""
    if (folder / _REPLACED).exists() and not os.path.lexists(out):
        os.rename(folder / _REPLACED, out)
    if (folder / _PUT_BY).exists() and (folder / "output").is_dir() and not (folder / NAME).exists():
        os.rename(folder / _PUT_BY, folder / NAME)


def _remove_ours(folder: Path) -> None:
    """Removes what runs make in a staging folder, but for its lock; what somebody else put there stays."""
    for name in ("output", "staged", NAME, NEW, _PUT_BY, _REPLACED):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            import shutil  # here, since looking at a file does without

            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _remove_folder(folder: Path, out: Path) -> None:
    """Ends a staging folder whose lock is held. The lock goes last: until then no other run may begin in it."""
    with contextlib.suppress(OSError):
        if os.path.lexists(out) or not (folder / _REPLACED).exists():
            _remove_ours(folder)
            (folder / "lock").unlink()
            folder.rmdir()


def sweep(out: Path) -> None:
    """Removes what a run left that was killed and cannot be continued: it had not begun to write, or was done."""
    folder = staging_folder(out)
    with contextlib.suppress(OSError, LockedError):
        if not folder.is_symlink() and folder.is_dir() and not (folder / NAME).exists():
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if _owns(fd, out) and os.path.lexists(out):
                    _remove_folder(folder, out)
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
        return os.path.samestat(os.fstat(fd), os.stat(staging_folder(out) / "lock"))
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
        raise RecipeError(f"{printable(out)} exists already; pass `overwrite=True` to replace it, or choose another name")


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """A small file, whole and durable, or not at all; RecipeError when it cannot be written, or is there already."""
    import tempfile

    try:
        fd, partial = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
        try:
            with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text)
                stream.flush()
                os.fchmod(fd, 0o666 & ~_umask())
                os.fsync(fd)
            if overwrite or not _rename2(Path(partial), path, _NOREPLACE):
                check_writable(path, overwrite)
                os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise RecipeError(f"cannot write {printable(path)}: {error.strerror}") from error


def _umask() -> int:
    """The file mode mask, which can only be asked for by setting it; Linux tells it without."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
