"""Files that are planned and not written: the output of a stage, as a folder that can be opened.

Their headers, pickles and texts can be read. The bytes of tensors cannot: they are computed when they are needed. A side
file is the file that it would be a copy of.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections import defaultdict
from typing import Any, BinaryIO, ClassVar

from streammerge.errors import ChangedError, FormatError, printable
from streammerge.formats.base import LayoutFile, Literal
from streammerge.planning.outputs.layout import Layout
from streammerge.stores.base import Input, Location, Status, Store
from streammerge.stores.streams import InputStream


class Unwritten(Store):
    """The folder of one stage. A worker process gets it without files, because it reads none of them."""

    scheme: ClassVar[str] = "stage"

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.sealed = False
        """Whether reading the bytes of a tensor is an error. While a container is read, they are zeros."""
        self._files: dict[str, _Planned | Location] = {}

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name,)

    @property
    def folder(self) -> Location:
        return Location(self, self.name, self.spelled(self.name))

    def file(self, name: str) -> Location:
        """Returns the place of an output that is one file. Messages call it by the stage's name alone."""
        return Location(self, f"{self.name}/{name}", self.spelled(self.name))

    def add(self, layout: Layout) -> None:
        """Puts the files of a planned output into the folder."""
        self._files |= {name: source for source, name in layout.side_files}
        self._files |= {file.name: _Planned(file) for file in layout.files}

    def spelled(self, key: str) -> str:
        inside = key.removeprefix(self.name)
        return f"<stage {self.name}>{inside}"

    def _inside(self, location: Location) -> str:
        return location.key.removeprefix(f"{self.name}/")

    def _found(self, location: Location) -> _Planned | Location:
        found = self._files.get(self._inside(location))
        if found is None:
            raise FormatError(f"{printable(location)} does not exist")
        return found

    def status(self, location: Location) -> Status:
        found = self._found(location)
        if isinstance(found, Location):
            return found.status()
        return Status((self.scheme, location.key), found.size, found.version)

    def is_folder(self, location: Location) -> bool:
        inside = f"{self._inside(location)}/"
        return location.key in (".", self.name) or any(name.startswith(inside) for name in self._files)

    def list_names(self, location: Location) -> list[str]:
        if not self.is_folder(location):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(location))
        if location.key == ".":
            return [self.name]
        inside = "" if location.key == self.name else f"{self._inside(location)}/"
        names = (name[len(inside) :].partition("/")[0] for name in self._files if name.startswith(inside))
        return list(dict.fromkeys(names))

    def opened(self, location: Location) -> Input:
        found = self._found(location)
        return found.open() if isinstance(found, Location) else _Input(location, found, self)

    def stream(self, location: Location) -> BinaryIO:
        """Opens a file as a stream, which does not read ahead into the place of a tensor."""
        return io.BufferedReader(InputStream(self.open(location)), 1 if self.sealed else io.DEFAULT_BUFFER_SIZE)

    def local_path(self, location: Location) -> str | None:
        found = self._files.get(self._inside(location))
        return found.local_path if isinstance(found, Location) else None


class _Planned:
    """A planned file: the bytes outside tensors. Its checksums are zeros."""

    def __init__(self, file: LayoutFile) -> None:
        self.size = file.size
        self.literals = sorted(file.around(defaultdict(int), file.receipt), key=lambda literal: literal.offset)
        digest = hashlib.sha256()
        for each in self.literals:
            digest.update(b"%d " % each.offset)
            digest.update(each.data)
        self.version = digest.hexdigest()


class _Input(Input):
    def __init__(self, location: Location, file: _Planned, store: Unwritten) -> None:
        self.location, self.size = location, file.size
        self._file, self._store = file, store

    def read_into(self, buffer: memoryview, offset: int) -> None:
        stop = offset + len(buffer)
        if stop > self.size:
            raise self.ended(offset, len(buffer))
        at = offset
        for literal in self._file.literals:
            at = self._put(literal, buffer, offset, at)
            if at == stop:
                return
        self._gap(buffer, offset, at, stop)

    def _put(self, literal: Literal, buffer: memoryview, offset: int, at: int) -> int:
        """Copies what the literal has from ``at`` on. Returns where the next bytes are needed."""
        begin, end = max(literal.offset, at), min(literal.offset + len(literal.data), offset + len(buffer))
        if begin >= end:
            return at
        self._gap(buffer, offset, at, begin)
        buffer[begin - offset : end - offset] = literal.data[begin - literal.offset : end - literal.offset]
        return end

    def _gap(self, buffer: memoryview, offset: int, begin: int, end: int) -> None:
        """Fills the place of tensors with zeros."""
        if begin == end:
            return
        if self._store.sealed:
            raise ChangedError(f"{printable(self.location)} is not stored, so bytes {begin} to {end} cannot be read")
        buffer[begin - offset : end - offset] = bytes(end - begin)
