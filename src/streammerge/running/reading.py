"""Works that read files from begin to end: checksums of parts, and hashes of whole files."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from streammerge.running.executors.base import Host
from streammerge.stores.base import Location
from streammerge.stores.checksums import Checksum
from streammerge.stores.digests import COPY_BYTES, outside
from streammerge.stores.inputs import InputFiles

RANGE_BYTES = 16 << 20
"""The most bytes of a unit of several parts."""
_MOST_IN_UNIT = 4096
FileRange = tuple[Any, Location, int, int]
"""A value that comes back with the checksum, then file, offset and number of bytes."""
FileRanges = tuple[list[Any], Location, "array[int]", "array[int]"]
"""Neighbours in a file: their values, the file, their offsets and numbers of bytes."""


def neighbours(parts: Iterable[FileRange]) -> Iterator[FileRanges]:
    """Yields units of :class:`ChecksumWork`: parts that lie one behind the other in a file, so that reads are large."""
    values, near, offsets, sizes = list[Any](), None, array("Q"), array("Q")
    end, nbytes = -1, 0
    for value, path, offset, size in parts:
        follows = path is near and offset == end and nbytes + size <= RANGE_BYTES and len(values) < _MOST_IN_UNIT
        if near is not None and not follows:
            yield values, near, offsets, sizes
            values, offsets, sizes, nbytes = [], array("Q"), array("Q"), 0
        values.append(value)
        offsets.append(offset)
        sizes.append(size)
        near, end, nbytes = path, offset + size, nbytes + size
    if near is not None:
        yield values, near, offsets, sizes


class ChecksumWork(NamedTuple):
    """Computes checksums of parts of files. The result of a unit is its values, and the checksum of each."""

    checksum: Checksum
    modules: tuple[str, ...] = ()

    def open(self, host: Host) -> _ChecksumWorker:
        return _ChecksumWorker(self.checksum, host)


class _ChecksumWorker:
    def __init__(self, checksum: Checksum, host: Host) -> None:
        self._checksum, self._host = checksum, host
        self._files = host.kept("files to be read through", lambda: InputFiles({}))
        self._buffer = memoryview(bytearray(COPY_BYTES))

    def run(self, unit: FileRanges) -> tuple[list[Any], array[int]]:
        values, path, offsets, sizes = unit
        file, sums = self._files.get(path), array("I")
        begin = end = 0  # the bytes of the file that are in the buffer
        last = offsets[-1] + sizes[-1]
        for offset, nbytes in zip(offsets, sizes, strict=True):
            value, stop = 0, offset + nbytes
            while offset < stop:
                if offset >= end:
                    self._host.check()
                    begin, end = offset, min(offset + COPY_BYTES, last)
                    file.read_into(self._buffer[: end - begin], begin)
                upto = min(stop, end)
                value = self._checksum.update(self._buffer[offset - begin : upto - begin], value)
                offset = upto
            sums.append(value)
        return values, sums

    def close(self) -> None:
        """Does nothing: the files stay open for the next work."""


def largest_first(files: Iterable[tuple[Any, Location]]) -> list[tuple[Any, Location]]:
    """Returns the units of :class:`HashWork`, sorted so that no worker begins a large file when the others are done."""
    return sorted(files, key=lambda unit: -unit[1].size)


class HashWork(NamedTuple):
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
