"""``memory://name``: bytes in the memory of this process, for tests and notebooks::

    import streammerge as sm

    sm.memory_store.put("a.safetensors", data)
    sm.merge(["memory://a.safetensors", "memory://b.safetensors"], "memory://out.safetensors")
    data = sm.memory_store.get("out.safetensors")

Folders exist where names have slashes. Bytes stay until they are removed, and count as the caller's own memory: the
budget of a merge does not know of them. Other processes do not see them.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import threading
from collections.abc import Collection, Iterator
from typing import Any, ClassVar

from streammerge.errors import FormatError, LockedError, RecipeError, printable
from streammerge.stores.base import Input, JournalFile, Location, Output, Staging, Status, Store
from streammerge.stores.space import exists_already

_Data = bytes | bytearray
_JOURNAL = "journal"


class MemoryStore(Store):
    """Files by name, and the folders that were made without a file in them. Safe for threads."""

    scheme: ClassVar[str] = "memory"
    mappable = True
    one_process = True

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._files: dict[str, tuple[_Data, int]] = {}
        self._folders: set[str] = set()
        self._versions = 0
        self.staged: set[str] = set()
        """Keys of the outputs that a run is making now."""

    def __reduce__(self) -> str:
        return "memory_store"

    # ---------------------------------------------------------------------------------------------------- for the caller

    def put(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Keeps a copy of these bytes as ``memory://name``, in place of what was there."""
        self.place(self._key(name), bytes(data))

    def get(self, name: str) -> bytes:
        """A copy of the bytes of ``memory://name``. KeyError when it is absent."""
        with self.lock:
            return bytes(self._files[self._key(name)][0])

    def names(self, folder: str = "") -> list[str]:
        """The names of all files, or of those below a folder, sorted."""
        key = self._key(folder)
        with self.lock:
            return sorted(name for name in self._files if key == "." or name == key or name.startswith(f"{key}/"))

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it; does nothing when it is absent."""
        key = self._key(name)
        with self.lock:
            for each in self.names(name):
                del self._files[each]
            self._folders = {each for each in self._folders if not _is_in(each, key)}

    @staticmethod
    def _key(name: str) -> str:
        return posixpath.normpath("/" + re.sub("^memory://", "", name, flags=re.IGNORECASE)).lstrip("/") or "."

    # ------------------------------------------------------------------------------------------------------------- inside

    def parse(self, text: str) -> Location:
        return Location(self, self._key(text), text)

    def place(self, key: str, data: _Data) -> None:
        """Puts bytes under a key, as a new version."""
        with self.lock:
            if self._is_folder(key):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), key)
            self._versions += 1
            self._files[key] = data, self._versions

    def version(self, key: str) -> int:
        """A number that no other content of any file has."""
        return self._files[key][1]

    def data(self, location: Location) -> tuple[_Data, Status]:
        """Returns the bytes under a name, and their status. Only the run that makes a file changes its bytes."""
        with self.lock:
            found = self._files.get(location.key)
            if found is None:
                is_what = "is not a regular file" if self._is_folder(location.key) else "does not exist"
                raise FormatError(f"{printable(location)} {is_what}")
            return found[0], Status((self.scheme, location.key), len(found[0]), found[1])

    def move(self, source: str, target: str) -> None:
        """Puts a file or folder in place of another, in one step."""
        with self.lock:
            moved = {name: self._files[name] for name in self.names(source)}
            folders = {each for each in self._folders if _is_in(each, source)}
            self.remove(source)
            self.remove(target)
            self._files |= {target + name[len(source) :]: found for name, found in moved.items()}
            self._folders |= {target + each[len(source) :] for each in folders}

    def _is_folder(self, key: str) -> bool:
        inside = "" if key == "." else f"{key}/"
        return key == "." or key in self._folders or any(name.startswith(inside) for name in (*self._files, *self._folders))

    def _below(self, key: str) -> Iterator[str]:
        inside = "" if key == "." else f"{key}/"
        for name in (*self._files, *self._folders):
            if name.startswith(inside):
                yield name[len(inside) :].partition("/")[0]

    # ------------------------------------------------------------------------------------------------------------- inputs

    def status(self, location: Location) -> Status:
        return self.data(location)[1]

    def is_folder(self, location: Location) -> bool:
        with self.lock:
            return self._is_folder(location.key)

    def list_names(self, location: Location) -> list[str]:
        with self.lock:
            if not self._is_folder(location.key):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(location))
            return list(dict.fromkeys(self._below(location.key)))

    def opened(self, location: Location) -> Input:
        return MemoryInput(location, self.data(location)[0])

    # ------------------------------------------------------------------------------------------------------------ outputs

    def check_writable(self, location: Location, overwrite: bool) -> None:
        with self.lock:
            key = location.key
            if key == ".":
                raise RecipeError(f"{printable(location)} is not a name for an output")
            for above in _parents(key):
                if above in self._files:
                    raise RecipeError(f"{printable(location)} lies in {printable(above)}, which is a file")
            filled = key in self._files or any(self._below(key))
            if filled and not overwrite:
                raise exists_already(location)

    def stage(self, location: Location, overwrite: bool = False) -> Staging:
        return MemoryStaging(self, location, overwrite)

    def write_whole(self, location: Location, data: bytes, overwrite: bool) -> None:
        with self.lock:
            self.check_writable(location, overwrite)
            self.place(location.key, data)

    def make_folder(self, location: Location) -> None:
        with self.lock:
            if location.key in self._files:
                raise RecipeError(f"cannot make the folder {printable(location)}: a file has this name")
            self._folders.add(location.key)

    def remove_files(self, location: Location, names: Collection[str]) -> None:
        with self.lock:
            for key in [location.key] if location.key in self._files else [f"{location.key}/{name}" for name in names]:
                self._files.pop(key, None)
            self._folders.discard(location.key)

    def sweep(self, location: Location) -> None:
        with self.lock:
            home = _home(location)
            if location.key not in self.staged and location.exists() and not (home / _JOURNAL).exists():
                self.remove(home.key)


def _is_in(key: str, folder: str) -> bool:
    return folder == "." or key == folder or key.startswith(f"{folder}/")


def _parents(key: str) -> list[str]:
    parts = key.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _home(out: Location) -> Location:
    """The hidden folder in which an output is made."""
    return out.parent / f".{out.name}.streammerge"


class MemoryInput(Input):
    """The bytes at the time of opening. A later change of the file does not change them."""

    def __init__(self, location: Location, data: _Data) -> None:
        self.location, self.size = location, len(data)
        self._view = memoryview(data).toreadonly()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.view(offset, len(buffer))

    def view(self, offset: int, nbytes: int) -> memoryview:
        if offset + nbytes > self.size:
            raise self.ended(offset, nbytes)
        return self._view[offset : offset + nbytes]


class MemoryOutput(Output):
    """A file of known size in the making."""

    def __init__(self, store: MemoryStore, location: Location, size: int, keep: bool) -> None:
        self.location, self.size = location, size
        data: _Data = b""
        if keep and location.is_file():
            data, _ = store.data(location)
        self.kept = keep and isinstance(data, bytearray) and len(data) == size and location.is_file()
        self._data = data if isinstance(data, bytearray) and self.kept else bytearray(size)
        self._open = True
        if not self.kept:
            store.place(location.key, self._data)

    def write_full(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        self.check_range(offset, len(view))
        if not self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.synced = False
        memoryview(self._data)[offset : offset + len(view)] = view

    def read_into(self, buffer: memoryview, offset: int) -> int:
        there = memoryview(self._data)[offset : offset + len(buffer)]
        buffer[: len(there)] = there
        return len(there)

    def close(self) -> None:
        self._open = False


class MemoryJournalFile(JournalFile):
    """A journal as a file of the store."""

    def __init__(self, store: MemoryStore, location: Location) -> None:
        self._store, self.location = store, location

    def read(self) -> bytes | None:
        with self._store.lock:
            return bytes(self._store.data(self.location)[0]) if self.location.is_file() else None

    def begin(self, data: bytes) -> None:
        self._store.place(self.location.key, data)

    def append(self, data: bytes) -> None:
        with self._store.lock:
            self._store.place(self.location.key, (self.read() or b"") + data)

    def end(self) -> None:
        return


class MemoryStaging(Staging):
    """Files under a hidden name beside the output's, which are moved to it in one step."""

    def __init__(self, store: MemoryStore, out: Location, overwrite: bool) -> None:
        super().__init__(out, _home(out), MemoryJournalFile(store, _home(out) / _JOURNAL))
        self._store, self._overwrite = store, overwrite
        self._made: tuple[str, ...] | None = None
        with store.lock:
            store.check_writable(out, overwrite)
            if out.key in store.staged:
                raise LockedError(f"{printable(out)} is being written by this process; wait for it")
            store.staged.add(out.key)
        self._ended = False

    def opened(self, location: Location, size: int, keep: bool) -> Output:
        return MemoryOutput(self._store, location, size, keep)

    @property
    def published(self) -> bool:
        return self._made is not None and self._made == self._standing()

    def _standing(self) -> tuple[str, ...]:
        """Returns the keys and versions of the files under the output's name."""
        with self._store.lock:
            return tuple(f"{name} {self._store.version(name)}" for name in self._store.names(self.out.key))

    @property
    def resumable(self) -> bool:
        return self.journal_file.read() is not None

    def clear(self) -> None:
        self._store.remove(self.home.key)

    def commit(self, as_folder: bool) -> None:
        self.close_files()
        store = self._store
        with store.lock:
            store.check_writable(self.out, self._overwrite)
            if as_folder:
                store.make_folder(self.content)
                store.move(self.content.key, self.out.key)
            else:
                (file,) = self.outputs.values()
                store.move(file.location.key, self.out.key)
            self._made = self._standing()
            self.abort()

    def abort(self, keep: bool = False) -> None:
        self.close_files()
        self._files.clear()
        self._temporary.clear()
        if not self._ended:
            self._ended = True
            with self._store.lock:
                if not (keep and self.resumable):
                    self._store.remove(self.home.key)
                self._store.staged.discard(self.out.key)


memory_store = MemoryStore()
