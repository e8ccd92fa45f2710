"""Room for the masks that a method makes in a pass and needs again in its kernel: temporary files, if disks have room.

The files have no names and are never synced. What is read again soon comes from the page cache.
"""

from __future__ import annotations

from streammerge.errors import SpaceError
from streammerge.kernels.masks import MaskRoom
from streammerge.running.job import Job
from streammerge.stores.spilled import SpillFile, SpillPlace


class _Masks:
    """Masks in a temporary file of this run."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._file: SpillFile | None = None

    def _open(self, nbytes: int) -> None:
        """Opens a file with room for so many bytes in place of the one before. There is none if no disk has the room."""
        self.close()
        try:
            self._file = SpillFile(nbytes, self._job.home, hurries=False)
        except (OSError, SpaceError):
            self._file = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class OwnMasks(_Masks):
    """The masks of tensors that one worker makes alone, one after the other in the same file."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._bytes = self._number = 0

    def room(self, nbytes: int) -> MaskRoom | None:
        """Returns the room for the masks of the next tensor."""
        if nbytes > self._bytes:
            self._open(nbytes)
            self._bytes = nbytes
        self._number += 1
        return None if self._file is None else MaskRoom(self._file, self._number)


class SharedMasks(_Masks):
    """The masks of a long tensor that all workers of this machine share. ``place`` is None until there is room."""

    @property
    def place(self) -> SpillPlace | None:
        return None if self._file is None else self._file.place

    def make_room(self, nbytes: int) -> None:
        """Makes the room. Nobody uses it here."""
        self._open(nbytes)
