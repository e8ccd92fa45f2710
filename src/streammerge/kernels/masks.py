"""What a method makes in a pass and needs again in its kernel: bits of masks, numbers of rows. It lies beside memory.

A mask is a function of the seed, the name and the numbers of a tensor, and what belongs to a row is one of the row's
numbers. So what is not there is made again, with the same bits, and nothing depends on how much is there.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge.errors import SpaceError
from streammerge.kernels.spill import Spill

if TYPE_CHECKING:
    import numpy as np

    Bits = np.ndarray[Any, np.dtype[np.uint8]]

_END = struct.Struct("<QQ")
"""What follows the bytes of a chunk: the number of their tensor, and the element after the last one. The bytes are written
before it, so it is not there without them."""


class MaskRoom(NamedTuple):
    """Room beside memory for the masks of one tensor. ``number``: one that no other tensor has in this room, not 0."""

    spill: Spill
    number: int


class Kept:
    """Bytes for the chunks of a tensor. A chunk begins with a grain. ``grain``: the elements of one; ``grain_bytes``: the
    bytes for these. A chunk of several grains has no more than so many times these bytes."""

    def __init__(self, room: MaskRoom, elems: int, grain: int, grain_bytes: int) -> None:
        self._spill: Spill | None = room.spill
        self._number, self._grain = room.number, grain
        self._grains = -(-elems // grain)
        self._slot = grain_bytes + _END.size

    def keep(self, model: int, start: int, stop: int, data: bytes) -> None:
        """Keeps the bytes of a chunk, if the disk has room."""
        if self._spill is None or start % self._grain:
            return
        try:
            self._spill.write(memoryview(data + _END.pack(self._number, stop)), self._place(model, start))
        except (OSError, SpaceError):
            self._spill = None

    def kept(self, model: int, start: int, stop: int, nbytes: int) -> bytearray | None:
        """Returns the bytes of a chunk, None if they are not there."""
        if self._spill is None or start % self._grain:
            return None
        found = bytearray(nbytes + _END.size)
        try:
            self._spill.read_into(memoryview(found), self._place(model, start))
        except OSError:
            return None
        if _END.unpack_from(found, nbytes) != (self._number, stop):
            return None
        del found[nbytes:]
        return found

    def _place(self, model: int, start: int) -> int:
        return (model * self._grains + start // self._grain) * self._slot


def kept_bytes(models: int, elems: int, grain: int, grain_bytes: int) -> int:
    """Returns the room for what is kept of a tensor."""
    return models * -(-elems // grain) * (grain_bytes + _END.size)


class Masks:
    """The masks of a tensor, by model and chunk. See :class:`Kept`."""

    def __init__(self, room: MaskRoom, elems: int, grain: int) -> None:
        self._kept = Kept(room, elems, grain, _mask_bytes(grain))

    def keep(self, model: int, start: int, stop: int, bits: Bits) -> None:
        """Keeps the mask of a chunk, if the disk has room."""
        self._kept.keep(model, start, stop, bits.tobytes())

    def kept(self, model: int, start: int, stop: int) -> Bits | None:
        """Returns the mask of a chunk, None if it is not there."""
        import numpy as np

        found = self._kept.kept(model, start, stop, -(-(stop - start) // 8))
        return None if found is None else np.frombuffer(found, np.uint8)


def masks_bytes(models: int, elems: int, grain: int) -> int:
    """Returns the room for all masks of a tensor."""
    return kept_bytes(models, elems, grain, _mask_bytes(grain))


def _mask_bytes(grain: int) -> int:
    return -(-grain // 64) * 8
