"""Local files of an output that several machines make together, on a file system that all of them have mounted.

Needs exclusive creation of files, and that a file which is opened again shows what another machine has closed. Needs no
locks of the kernel, and no process ids of other machines.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import RecipeError, printable
from streammerge.stores import lock, system
from streammerge.stores.base import Joint, Location, Output, Sent, Staging
from streammerge.stores.commit import LocalStaging, hidden_folder, make_subfolders
from streammerge.stores.written_files import OutputFile, SharedOutputFile

_PUBLISHED = "published"
_NO_LINKS = (errno.EPERM, errno.EMLINK, *system.UNSUPPORTED)


@dataclass(frozen=True, slots=True)
class LocalJoint(Joint):
    """See :class:`Joint`. The machines write ranges of preallocated files."""

    out: Location
    home: Location

    def begin(self, folders: tuple[str, ...]) -> None:
        try:
            for name in ("output", *folders):
                os.makedirs((self.home / name).key, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise RecipeError(f"cannot write beside {printable(self.out)}: {error.strerror}") from error

    def open(self, name: str, size: int) -> Output:
        make_subfolders(Path(self.content.key), name)
        return SharedOutputFile(self.content / name, size, exact=not lock.one_kernel(self.home.key))

    def temporary(self, name: str, size: int) -> Output:
        return OutputFile(self.home / f"temporary.{name}", size)

    def remove(self, location: Location) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(location.key)

    def stage(self, overwrite: bool, sent: Mapping[str, Sequence[Sent]]) -> Staging:
        return _JointStaging(self, overwrite)

    def published(self) -> bool:
        try:
            number = int((Path(self.home.key) / _PUBLISHED).read_bytes())
            return os.stat(self.out.key).st_ino == number
        except (OSError, ValueError):
            return False

    def clear(self) -> None:
        shutil.rmtree(self.home.key, ignore_errors=True)


class _JointStaging(LocalStaging):
    """Publishes files that several machines have written. The caller sees to it that no other machine does so."""

    def __init__(self, joint: LocalJoint, overwrite: bool) -> None:
        self._joint = joint
        super().__init__(joint.out, overwrite, folder=Path(joint.home.key))

    def _lock(self) -> int:
        return -1

    def opened(self, location: Location, size: int, keep: bool) -> Output:
        return self._joint.open(location.relative_to(self.content), size)

    def _rename(self, made: Path) -> None:
        # After a crash between this and the end, the number of the file or folder tells whether it was published.
        put(self.folder / _PUBLISHED, str(os.stat(made).st_ino).encode())
        system.sync_folder(self.folder)
        super()._rename(made)

    def abort(self, keep: bool = False) -> None:
        super().abort(keep)
        if not keep:
            self._joint.clear()


def joint_of(out: Location, key: str) -> LocalJoint:
    """Returns the place where machines make an output together."""
    home = hidden_folder(Path(out.key), f".{key}.machines")
    return LocalJoint(out, out.parent / home.name)


def put(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a small file in place. Other machines see it when they open the file again; a file that was renamed over the
    old one could stay hidden behind a cached name."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    finally:
        os.close(fd)


def put_new(name: str | os.PathLike[str], data: bytes, durable: bool) -> bool:
    """Creates a small file, whole, under a name that only one machine gets. Returns False if another has it.

    The name is a link to a finished file, or an exclusive creation where the file system has no links.
    """
    path = Path(name)
    # Random, because containers have equal names and process ids, and one that was killed leaves its file.
    partial = path.with_name(f".{os.uname().nodename[:60]}.{os.urandom(8).hex()}")
    try:
        _write(partial, data, durable)
        try:
            os.link(partial, path)
            made = True
        except FileExistsError:
            made = os.stat(partial).st_nlink == 2  # the answer of a server may get lost, and the call is sent again
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                _write(path, data, durable)
                made = True
            except FileExistsError:
                made = False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    if made and durable:
        system.sync_folder(path.parent)
    return made


def _write(path: Path, data: bytes, durable: bool) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        if durable:
            system.full_sync(fd)
    finally:
        os.close(fd)
