"""The files of this machine by their paths. A name without a scheme means this store."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterable
from typing import BinaryIO

from streammerge.errors import FormatError, RecipeError, printable
from streammerge.stores import system
from streammerge.stores.base import Damage, Input, Joint, Location, Output, Staging, Status, Store
from streammerge.stores.files import InputFile, broken_link, file_status


class LocalLocation(Location):
    """A path. Other libraries can open it."""

    __slots__ = ()

    def __fspath__(self) -> str:
        return self.key


class LocalStore(Store):
    """Folders and files of this machine, its network file systems included."""

    scheme = "file"
    mappable = True
    always_absolute = False

    def __reduce__(self) -> str:
        return "LOCAL"

    def parse(self, text: str) -> Location:
        plain = self.without_scheme(text)
        return LocalLocation(self, os.path.expanduser(plain) if plain.startswith("~") else plain, text)

    def spelled(self, key: str) -> str:
        return key

    def absolute(self, location: Location) -> Location:
        return LocalLocation(self, os.path.abspath(location.key))

    def resolve(self, location: Location) -> Location:
        try:
            return LocalLocation(self, os.path.realpath(location.key))
        except (OSError, ValueError):  # the system does not accept the name
            return location

    def local_path(self, location: Location) -> str | None:
        return location.key

    def broken_link(self, location: Location) -> str:
        return broken_link(location.key)

    def status(self, location: Location) -> Status:
        return file_status(location.key)

    def exists(self, location: Location) -> bool:
        return os.path.exists(location.key)  # Path.exists raises for a name that is too long

    def lexists(self, location: Location) -> bool:
        return os.path.lexists(location.key)

    def is_file(self, location: Location) -> bool:
        return os.path.isfile(location.key)

    def is_folder(self, location: Location) -> bool:
        return os.path.isdir(location.key)

    def list_names(self, location: Location) -> list[str]:
        return os.listdir(location.key)

    def glob(self, location: Location) -> list[Location]:
        import glob  # here, because most names are no patterns

        return [LocalLocation(self, found) for found in glob.glob(location.key)]

    def opened(self, location: Location) -> Input:
        return InputFile(location)

    def open(
        self, location: Location, expected: Status | None = None, polite: bool = False, damaged: list[Damage] | None = None
    ) -> Input:
        return InputFile(location, expected, damaged, polite)

    def will_need(self, location: Location, ranges: Iterable[tuple[int, int]]) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(location.key, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe has no writer yet
            try:
                for offset, nbytes in ranges:
                    system.read_ahead(fd, offset, nbytes)
            finally:
                os.close(fd)

    def stream(self, location: Location) -> BinaryIO:
        file_status(location.key)  # before it is opened: opening a pipe waits for a writer
        try:
            return open(location.key, "rb")
        except OSError as error:
            raise FormatError(f"{printable(location)}: {error.strerror or error}") from error

    # ------------------------------------------------------------------------------------------------------------ outputs

    def check_writable(self, location: Location, overwrite: bool) -> None:
        from streammerge.stores import commit

        commit.check_writable(location.key, overwrite)

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        from streammerge.stores.commit import LocalStaging

        return LocalStaging(location, overwrite)

    def reopen(self, location: Location, size: int) -> Output:
        from streammerge.stores.written_files import OutputFile

        return OutputFile.existing(location, size)

    def sweep(self, location: Location) -> None:
        from streammerge.stores import commit

        commit.sweep(location.key)

    def write_whole(self, location: Location, data: bytes, overwrite: bool) -> None:
        from streammerge.stores import commit

        commit.write_whole(location.key, data, overwrite)

    def make_folder(self, location: Location) -> None:
        try:
            os.makedirs(location.key, exist_ok=True)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            raise RecipeError(f"cannot make the folder {printable(location)}: {error.strerror}") from error

    def remove_files(self, location: Location, names: Collection[str]) -> None:
        if not os.path.isdir(location.key):
            os.unlink(location.key)
            return
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(location.key, name))
        for folder, _, _ in os.walk(location.key, topdown=False):
            with contextlib.suppress(OSError):  # it holds files that are no part of the output
                os.rmdir(folder)

    def replace_small(self, location: Location, data: bytes) -> None:
        from streammerge.stores import joint

        joint.put(location.key, data)

    def create_small(self, location: Location, data: bytes, durable: bool = True) -> bool:
        from streammerge.stores import joint

        return joint.put_new(location.key, data, durable)

    def join(self, location: Location, key: str) -> Joint:
        from streammerge.stores import joint

        return joint.joint_of(location, key)

    def free_bytes(self, location: Location) -> int | None:
        """Room on the file system of the nearest folder that exists."""
        path = os.path.abspath(location.key)
        while not os.path.exists(path) and path != "/":
            path = os.path.dirname(path)
        try:
            status = os.statvfs(path)
        except OSError:
            return None
        return status.f_bavail * status.f_frsize


LOCAL = LocalStore()
