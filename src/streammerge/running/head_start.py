"""Lets the system read the beginnings of local inputs while a merge is still being planned.

Headers are read and compared, the output is laid out and libraries are loaded before a worker begins, and a disk would have
no work meanwhile. The system may drop what it has read: no byte of the output depends on it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence

from streammerge.errors import StreammergeError
from streammerge.running import process
from streammerge.running.prefetching import in_files
from streammerge.sources.base import Blob, Source
from streammerge.stores.caching import CacheReader
from streammerge.stores.inputs import InputFiles

LEAST_PREFETCHED_BYTES = 256 << 20
"""A run that reads less from local files is over before it matters that they are read ahead."""
MOST_BYTES = 1 << 30
"""The most that is read. A disk of 1 GB/s reads it while 25 checkpoints are planned, or torch is loaded."""
_SHARE_OF_MEMORY = 8
"""No more than one part in so many of the memory is read, so that the system drops nothing before it is used."""
_SAMPLED = (0.3, 0.5, 0.7)
"""Where a range is looked for in the cache. Ends may be there, because headers near them have been read."""
_MOST_TENSORS = 1000
"""Of a checkpoint, to look at more of them would take longer than it saves."""


class HeadStart:
    """Reads the beginnings of checkpoints into the system's cache. ``most_bytes``: of all together, None
    for as much as pays, 0 for nothing.

    Does nothing for short merges, nor for inputs that are in the cache already.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most = most_bytes
        self._files = InputFiles({})
        self._reader: CacheReader | None = None

    def opened(self, checkpoints: Sequence[Mapping[str, Source]]) -> None:
        """Says which checkpoints are open, and which tensors they have, in their order.

        All at once: headers that were still to be read would wait behind what is read here.
        """
        for entries in checkpoints:
            self._begin(entries, len(checkpoints))

    def _begin(self, entries: Mapping[str, Source], count: int) -> None:
        if self._most == 0 or not _are_as_long_as(entries, LEAST_PREFETCHED_BYTES // count):
            return
        if self._most is None:
            self._most = min(MOST_BYTES, process.memory_bytes() // _SHARE_OF_MEMORY)
        with contextlib.suppress(OSError, StreammergeError):  # what cannot be read is an error where it is merged
            for number, (blob, _) in enumerate(in_files(_first_blobs(entries, self._most // count))):
                if blob.path.store.reads_ahead:
                    return
                file = self._files.get(blob.path)
                if number == 0 and all(file.is_cached(blob.offset + int(blob.nbytes * at)) for at in _SAMPLED):
                    return
                if self._reader is None:
                    self._reader = CacheReader()
                self._reader.read(file, blob.offset, blob.nbytes)

    def close(self) -> None:
        """Reads nothing more."""
        if self._reader is not None:
            self._reader.close()
        self._files.close()


def _are_as_long_as(entries: Mapping[str, Source], nbytes: int) -> bool:
    for source in entries.values():
        nbytes -= source.spec.nbytes
        if nbytes <= 0:
            return True
    return False


def _first_blobs(entries: Mapping[str, Source], nbytes: int) -> Iterator[Blob]:
    """Yields the ranges that the first tensors are read from, up to so many bytes, as far as they are known."""
    for source in itertools.islice(entries.values(), _MOST_TENSORS):
        size = source.spec.dtype.element_bytes
        stop = min(source.spec.numel, nbytes // size) if source.ranged else 0
        if stop:
            yield from source.blobs_of(0, stop)
        nbytes -= stop * size
        if nbytes < size:
            return
