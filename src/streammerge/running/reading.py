"""Works that read files from begin to end: checksums of parts, and hashes of whole files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from streammerge.running.executors.base import Host
from streammerge.stores.base import Location
from streammerge.stores.checksums import Checksum
from streammerge.stores.digests import COPY_BYTES, outside
from streammerge.stores.inputs import InputFiles
from streammerge.tensors.spec import ranges

FileRange = tuple[Any, Location, int, int]
"""A value that comes back with the checksum, then file, offset and number of bytes."""


@dataclass(frozen=True, slots=True)
class ChecksumWork:
    """Computes checksums of parts of files. The result of a part is the value that came with it, and its checksum."""

    checksum: Checksum
    modules: tuple[str, ...] = ()

    def open(self, host: Host) -> _ChecksumWorker:
        return _ChecksumWorker(self.checksum, host)


class _ChecksumWorker:
    def __init__(self, checksum: Checksum, host: Host) -> None:
        self._checksum, self._host = checksum, host
        self._files = host.kept("files to be read through", lambda: InputFiles({}))
        self._buffer = memoryview(bytearray(COPY_BYTES))

    def run(self, part: FileRange) -> tuple[Any, int]:
        which, path, offset, nbytes = part
        file, value = self._files.get(path), 0
        for start, stop in ranges(nbytes, COPY_BYTES):
            self._host.check()
            file.read_into(self._buffer[: stop - start], offset + start)
            value = self._checksum.update(self._buffer[: stop - start], value)
        return which, value

    def close(self) -> None:
        """Does nothing: the files stay open for the next work."""


@dataclass(frozen=True, slots=True)
class HashWork:
    """Computes the SHA-256 of files. A unit is a value that comes back with the hash, and a file."""

    modules: tuple[str, ...] = ()

    def open(self, host: Host) -> _HashWorker:
        return _HashWorker(host)


class _HashWorker:
    def __init__(self, host: Host) -> None:
        self._host = host

    def run(self, unit: tuple[Any, Location]) -> tuple[Any, str]:
        which, path = unit
        digest = hashlib.sha256()
        for data in outside(path, []):
            self._host.check()
            digest.update(data)
        return which, digest.hexdigest()

    def close(self) -> None:
        """Does nothing: no file is open."""
