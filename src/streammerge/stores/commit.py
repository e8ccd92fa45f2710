"""Publishes an output of local files: it is made in a hidden folder beside its place, synced, and renamed in one step.

A :class:`LocalStaging` that ends without :meth:`LocalStaging.commit` removes its files, unless a next run may continue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

from streammerge.errors import LockedError, RecipeError, printable
from streammerge.stores import libc, lock, system
from streammerge.stores.base import JournalFile, Location, Output, Staging
from streammerge.stores.space import exists_already, space_checked
from streammerge.stores.written_files import OutputFile

JOURNAL, NEW = "journal", "journal.new"
_PUT_BY, _REPLACED = "journal.done", "replaced"
_CLOSING = (".nfs", ".fuse_hidden")
"""How network file systems name an open file that was removed."""
_MOST_NAME_BYTES = 255
_MOST_TRIES, _TRY_SECONDS = 50, 0.02
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class LocalJournalFile(JournalFile):
    """A journal as a local file."""

    def __init__(self, location: Location) -> None:
        self.location, self._fd = location, -1

    def read(self) -> bytes | None:
        try:
            return Path(self.location.key).read_bytes()
        except FileNotFoundError:
            return None

    def begin(self, data: bytes) -> None:
        partial = self.location.with_name(NEW)
        with space_checked(partial, len(data)):
            fd = os.open(partial.key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _append(fd, data)
                os.replace(partial.key, self.location.key)
            except BaseException:
                os.close(fd)
                raise
        self.end()
        self._fd = fd

    def append(self, data: bytes) -> None:
        _append(self._fd, data)

    def end(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _append(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    system.full_sync(fd)


class LocalStaging(Staging):
    """The hidden folder beside the output in which everything is made until it is whole.

    It has the output's file system, so that :meth:`commit` is a rename; one run at a time holds it (LockedError for
    the second). What a killed run left in it is there until :meth:`clear`.
    """

    def __init__(self, out: Location, overwrite: bool = False, folder: Path | None = None) -> None:
        self._place, self._overwrite = Path(out.key), overwrite
        self.folder = folder or staging_folder(self._place)
        home = out.parent / self.folder.name
        super().__init__(out, home, LocalJournalFile(home / JOURNAL))
        self._content = self.folder / "output"
        self._made: tuple[int, int] | None = None
        self._process = os.getpid()
        check_writable(self._place, overwrite)
        self._made_folders = _make_folders(self._place.absolute().parent)
        try:
            self._lock_fd = self._lock()
        except BaseException:
            self._remove_made_folders()
            raise
        try:
            _recover(self.folder, self._place)
            check_writable(self._place, overwrite)
            self._content.mkdir(exist_ok=True)
        except BaseException:
            self.abort(keep=True)
            raise

    def clear(self) -> None:
        _remove_ours(self.folder)
        self._content.mkdir()

    def _lock(self) -> int:
        """Takes the lock and returns its descriptor. Tries again while the run before this one removes its folder."""
        for _ in range(_MOST_TRIES):
            fd = self._lock_file()
            if fd < 0:
                time.sleep(_TRY_SECONDS)
                continue
            try:
                lock.take(fd, str(self.folder), self.out)
            except BaseException:
                os.close(fd)
                raise
            if _is_lock_of(fd, self.folder):
                try:
                    lock.sign(fd, str(self.folder), self.out)
                except BaseException:
                    lock.drop(fd)
                    raise
                return fd
            lock.drop(fd)
        raise RecipeError(f"the folder {printable(self.folder)} vanishes when it is made; write to another place")

    def _lock_file(self) -> int:
        """Makes the folder, and opens the lock file in it. Returns -1 if the folder was removed meanwhile."""
        if os.path.islink(self.folder):
            raise RecipeError(f"{printable(self.folder)} is a link, and what it leads to would be cleared; remove it")
        try:
            self.folder.mkdir(exist_ok=True)
        except FileExistsError:
            raise RecipeError(f"{printable(self.folder)} is in the way; remove it") from None
        except FileNotFoundError as error:
            if not self._place.parent.is_dir():
                raise RecipeError(f"the folder {printable(self._place.parent)} does not exist; make it first") from None
            raise RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}") from error
        except OSError as error:
            raise self._forbidden(error) from error
        try:
            return lock.opened(str(self.folder / "lock"))
        except FileNotFoundError:
            return -1
        except OSError as error:
            raise self._forbidden(error) from error

    def _forbidden(self, error: OSError) -> Exception:
        """Returns the error of a folder in which nothing can be made. It names the user whose run has left the folder."""
        if error.errno not in _FORBIDDEN:
            return error
        other = _other_user(self.folder)
        if other and error.errno in (errno.EACCES, errno.EPERM):
            return lock.locked_by_other_user(self.out, self.folder, other)
        return RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}")

    def opened(self, location: Location, size: int, keep: bool) -> Output:
        make_subfolders(self.folder, location.relative_to(self.home))
        file = OutputFile(location, size, keep)
        if not file.reserved and not self.notes:
            self.notes.append(
                f"the file system of {printable(self.out)} does not reserve room; a disk that fills up is noticed late"
            )
        return file

    @property
    def published(self) -> bool:
        try:
            return self._made is not None and _identity_of(self._place) == self._made
        except OSError:
            return False

    @property
    def resumable(self) -> bool:
        return (self.folder / JOURNAL).exists()

    def commit(self, as_folder: bool) -> None:
        """Makes the output visible under its name, durably: data, then names."""
        for file in self.outputs.values():
            if not file.synced:
                file.sync()
        self.close_files()
        made = self._content
        if as_folder:
            for folder in _folders_of(self._content, self._files):
                self._sync_folder(folder)
        else:
            (name,) = self.outputs  # a file system or a desktop may have put files of its own into the folder
            made = self._content / name
        journal, put_by = self.folder / JOURNAL, self.folder / _PUT_BY
        try:
            if journal.exists():
                os.rename(journal, put_by)  # after a crash, this name says that the run was finished
            self._made = _identity_of(made)
            self._rename(made)
        except BaseException as error:
            if put_by.exists() and not self.published:
                os.rename(put_by, journal)
            if isinstance(error, PermissionError):
                raise RecipeError(
                    f"{printable(self.out)} may not be replaced ({error.strerror}); it may be another user's, so choose "
                    "another name, or have it removed"
                ) from error
            raise
        try:
            self._sync_folder(self._place.parent)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{printable(self.out)} is there, whole, but its folder could not be synced ({error.strerror}); "
                "a power failure may still undo it",
            ) from error
        self.abort()

    def _sync_folder(self, folder: Path) -> None:
        if not system.sync_folder(folder):
            note = f"the file system of {printable(self.out)} does not sync folders; a power failure may undo its name"
            self.notes += [note] if note not in self.notes else []

    def _rename(self, made: Path) -> None:
        """Renames in one step. Before it, the name is free or leads to the old output; after it, to the new output."""
        empty_folder = self._place.is_dir() and not any(self._place.iterdir())
        if not self._overwrite and not empty_folder:
            if not _renamed_to_nothing(made, self._place):
                check_writable(self._place, overwrite=False)
                os.replace(made, self._place)
        elif made.is_dir() and self._place.is_dir() and not empty_folder:
            if not libc.rename2(made, self._place, libc.EXCHANGE):
                self._rename_twice(made)
        else:
            os.replace(made, self._place)

    def _rename_twice(self, made: Path) -> None:
        """Renames twice, for file systems that cannot exchange names. After a crash in between, the next run repairs it."""
        replaced = self.folder / _REPLACED
        os.rename(self._place, replaced)
        try:
            os.replace(made, self._place)
        except BaseException:
            if not self._place.exists():
                os.rename(replaced, self._place)
            raise

    def abort(self, keep: bool = False) -> None:
        """Removes the files, or keeps them for a next run. After a commit, removes the temporary files."""
        self.close_files()
        self._files.clear()
        self._temporary.clear()
        self.journal_file.end()
        if self._process != os.getpid():  # a forked child, which has a copy of this object, and no lock
            return
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            _end(fd, self.folder, self._place, keep and self.resumable)
        self._remove_made_folders()

    def _remove_made_folders(self) -> None:
        """Removes the folders that were made for this output and are empty again."""
        for folder in reversed(self._made_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made_folders.clear()


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it, durably. Returns the new ones. Raises RecipeError if that fails."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()][::-1]
    try:
        for each in missing:
            each.mkdir(exist_ok=True)
            system.sync_folder(str(each.parent))
    except OSError as error:
        raise RecipeError(f"the folder {printable(folder)} cannot be made: {printable(error.strerror or error)}") from error
    return missing


def make_subfolders(content: Path, name: str) -> None:
    """Makes the folders of a file below ``content``. Raises FileExistsError for a file or a link of that name."""
    folder = content
    for part in name.split("/")[:-1]:
        folder /= part
        folder.mkdir(exist_ok=not folder.is_symlink())


def _folders_of(content: Path, names: Iterable[str]) -> list[Path]:
    """Returns the folders that hold the files, the deepest first, so that each is synced before the one above it."""
    above = {content, *(each for name in names for each in (content / name).parents)}
    return sorted((each for each in above if each.is_relative_to(content)), key=lambda each: -len(each.parts))


def staging_folder(out: Path) -> Path:
    """Returns the folder in which an output is made."""
    return hidden_folder(out, ".streammerge")


def hidden_folder(out: Path, ending: str) -> Path:
    """Returns a folder beside an output. A long name is shortened, and a hash keeps it apart from others."""
    name = f".{out.name}{ending}"
    if len(os.fsencode(name)) > _MOST_NAME_BYTES:
        import hashlib  # here, because it loads all of OpenSSL

        digest = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
        name = f".{_shortened(out.name, _MOST_NAME_BYTES - 30 - len(ending))}.{digest}{ending}"
    return out.parent / name


def output_of(staging: str) -> str:
    """Returns the name of the output that belongs to the name of a staging folder; "" for the name of anything else. A
    shortened name gives its beginning and the hash."""
    ours = staging.startswith(".") and staging.endswith(".streammerge")
    return staging.removeprefix(".").removesuffix(".streammerge") if ours else ""


def _shortened(name: str, most_bytes: int) -> str:
    """Returns the beginning of a name, as many whole characters as there is room for."""
    return os.fsencode(name)[:most_bytes].decode("utf-8", "ignore")


def _other_user(path: Path) -> str:
    """Returns the name of the user who owns the file or folder, "" if it is this one, or nobody can tell."""
    try:
        owner = os.lstat(path).st_uid
    except OSError:
        return ""
    return "" if owner == os.geteuid() else _user_name(owner)


def _user_name(number: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def _identity_of(path: Path) -> tuple[int, int]:
    """(device, inode) of a file or folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _recover(folder: Path, out: Path) -> None:
    """Repairs the state after a crash within a commit: moves the old output and the journal back to their names."""
    if (folder / _REPLACED).exists() and not os.path.lexists(out):
        os.rename(folder / _REPLACED, out)
    if (folder / _PUT_BY).exists() and (folder / "output").is_dir() and not (folder / JOURNAL).exists():
        os.rename(folder / _PUT_BY, folder / JOURNAL)


def _remove_ours(folder: Path) -> None:
    """Removes the files that runs make in a staging folder, except the lock. Files of others stay."""
    for name in ("output", "spooled", "turned", "factors", JOURNAL, NEW, _PUT_BY, _REPLACED):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            import shutil  # here, since looking at a file does without

            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _end(fd: int, folder: Path, out: Path, keep: bool) -> None:
    """Gives the lock back. Removes the staging folder before, unless ``keep``.

    The lock file goes last: until then no other run may begin here. The folder itself goes after the lock file is closed,
    because network file systems keep an open file that is removed under another name in its folder.
    """
    removed = False
    if not keep:
        with contextlib.suppress(OSError):
            if os.path.lexists(out) or not (folder / _REPLACED).exists():
                _remove_ours(folder)
                (folder / "lock").unlink()
                removed = True
    lock.release(fd)
    if removed:
        _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Removes the folder if it is empty. Waits a moment for a file system that removes files when they are closed."""
    for _ in range(_MOST_TRIES):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            try:
                left = os.listdir(folder)
            except OSError:
                return
            if not left or not all(name.startswith(_CLOSING) for name in left):
                return
            time.sleep(_TRY_SECONDS)
        else:
            return


def sweep(name: str | os.PathLike[str]) -> None:
    """Removes what a killed run left if it cannot be continued: it had not begun to write, or was done."""
    out = Path(name)
    folder = staging_folder(out)
    with contextlib.suppress(OSError, LockedError):
        if not folder.is_symlink() and folder.is_dir() and not (folder / JOURNAL).exists():
            fd = lock.opened(str(folder / "lock"))
            try:
                lock.take(fd, str(folder), out)
            except BaseException:
                os.close(fd)
                raise
            _end(fd, folder, out, keep=not (_is_lock_of(fd, folder) and os.path.lexists(out)))


def _is_lock_of(fd: int, folder: Path) -> bool:
    """Whether the descriptor is that of the folder's lock file. False if the file was removed after it was opened."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(folder / "lock"))
    except FileNotFoundError:
        return False


def _renamed_to_nothing(source: Path, target: Path) -> bool:
    """Renames to a free name. Returns False if the system cannot check that the name is free. Raises RecipeError if it is
    taken."""
    try:
        return libc.rename2(source, target, libc.NOREPLACE)
    except FileExistsError:
        check_writable(target, overwrite=False)
        raise


def check_writable(name: str | os.PathLike[str], overwrite: bool) -> None:
    """RecipeError when the output exists and may not be replaced, or its folder can neither be found nor made."""
    out = Path(name).absolute()
    if out == out.parent:
        raise RecipeError(f"{printable(out)} is not a name for an output; choose another name")
    above = next(each for each in out.parents if os.path.lexists(each))
    if not above.is_dir():
        raise RecipeError(f"{printable(above)} is no folder, so {printable(out)} cannot be in it; choose another name")
    _check_permitted(above, name)
    try:
        there = os.lstat(out)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RecipeError(f"cannot write {printable(out)}: {error.strerror}") from error
    else:
        _check_replaceable(out, there)
    if out.is_dir() and not any(out.iterdir()):
        return
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise exists_already(out)


def _check_permitted(folder: Path, out: str | os.PathLike[str]) -> None:
    """Raises RecipeError if this user cannot make files in a folder."""
    if os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return
    why = errno.EACCES
    with contextlib.suppress(OSError):
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            why = errno.EROFS
    raise RecipeError(f"cannot write beside {printable(out)}: {os.strerror(why)}")


def _check_replaceable(out: Path, there: os.stat_result) -> None:
    """Raises RecipeError if the system does not let this user replace the output that exists."""
    user, above = os.geteuid(), os.stat(out.parent)
    if user and above.st_mode & stat.S_ISVTX and user not in (there.st_uid, above.st_uid):
        whose = printable(_user_name(there.st_uid))
        raise RecipeError(
            f"{printable(out)} belongs to {whose}, and nobody else may replace it in the folder {printable(out.parent)}, "
            "which is sticky; choose another name"
        )


def write_whole(name: str | os.PathLike[str], data: bytes, overwrite: bool) -> None:
    """Writes a small file, whole and durable, or not at all. Raises RecipeError if it cannot be written, or exists."""
    import tempfile

    path = Path(name)
    made = _make_folders(path.absolute().parent)
    try:
        fd, partial = tempfile.mkstemp(prefix=f".{_shortened(path.name, 100)}.", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as stream:
                stream.write(data)
                stream.flush()
                with contextlib.suppress(PermissionError):  # some file systems have no modes
                    os.fchmod(fd, 0o666 & ~system.umask())
                system.full_sync(fd)
            if overwrite or not _renamed_to_nothing(Path(partial), path):
                check_writable(path, overwrite)
                os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
        system.sync_folder(path.parent)
    except BaseException as error:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise RecipeError(f"cannot write {printable(path)}: {error.strerror}") from error
        raise
