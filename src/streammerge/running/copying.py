"""Makes tensors whose bytes are those of their only source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from streammerge.planning.tasks import MergeTask
from streammerge.stores.digests import COPY_BYTES
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    from streammerge.running.workspace import Inputs, Outgoing, Workspace
    from streammerge.sources.stored import Stored
    from streammerge.stores.inputs import InputFiles


class StoredCopier:
    """Copies a plain range of bytes. ``out_bytes``: the most bytes of a chunk."""

    def __init__(self, stored: Stored, files: InputFiles, workspace: Workspace, out_bytes: int) -> None:
        self.nonfinite: dict[str, int] = {}
        self._file, self._workspace = files.get(stored.path), workspace
        self._offset, self._size = stored.offset, stored.spec.dtype.component.element_bytes
        self._step = max(min(COPY_BYTES, out_bytes) // self._size, 1)

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yields the bounds of chunks. Gives the file's pages back after the last one."""
        for a, b in ranges(stop - start, self._step):
            yield start + a, start + b
        self._file.release(self._offset + start * self._size, (stop - start) * self._size)

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        part = outgoing.room((stop - start) * self._size)
        self._workspace.asked_bytes += len(part)
        self._file.read_into(part, self._offset + start * self._size)
        return part


class ReaderCopier:
    """Copies what the reader of a source gives, such as rows or a merge. ``out_bytes``: the most bytes of a chunk."""

    def __init__(self, task: MergeTask, source: Inputs, out_bytes: int) -> None:
        self.nonfinite = source.nonfinite
        self._source = source
        self._size, whole = task.out.dtype.component.element_bytes, task.out.dtype.element_bytes
        self._step = max(min(COPY_BYTES, out_bytes) // whole, 1) * (whole // self._size)  # no complex number is cut

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        for a, b in ranges(stop - start, self._step):
            yield start + a, start + b

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        part = outgoing.room((stop - start) * self._size)
        self._source.read_into(0, start, stop, part)
        return part
