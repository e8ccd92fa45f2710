"""The bits of the masks that a method makes in a pass and needs again in its kernel. They lie beside memory.

A mask is a function of the seed, the name and the numbers of a tensor. So what is not there is made again, with the same
bits, and nothing depends on how much is there.
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
"""What follows the bits of a chunk: the number of their tensor, and the element after the last one. The bits are written
before it, so it is not there without them."""


class MaskRoom(NamedTuple):
    """Room beside memory for the masks of one tensor. ``number``: one that no other tensor has in this room, not 0."""

    spill: Spill
    number: int


class Masks:
    """The masks of a tensor, by model and chunk. A chunk begins with a grain; ``grain``: the elements of one."""

    def __init__(self, room: MaskRoom, elems: int, grain: int) -> None:
        self._spill: Spill | None = room.spill
        self._number, self._grain = room.number, grain
        self._grains = -(-elems // grain)
        self._slot = _slot_bytes(grain)

    def keep(self, model: int, start: int, stop: int, bits: Bits) -> None:
        """Keeps the mask of a chunk, if the disk has room."""
        if self._spill is None or start % self._grain:
            return
        data = bits.tobytes() + _END.pack(self._number, stop)
        try:
            self._spill.write(memoryview(data), self._place(model, start))
        except (OSError, SpaceError):
            self._spill = None

    def kept(self, model: int, start: int, stop: int) -> Bits | None:
        """Returns the mask of a chunk, None if it is not there."""
        import numpy as np

        if self._spill is None or start % self._grain:
            return None
        size = -(-(stop - start) // 8)
        found = bytearray(size + _END.size)
        try:
            self._spill.read_into(memoryview(found), self._place(model, start))
        except OSError:
            return None
        return np.frombuffer(found, np.uint8, size) if _END.unpack_from(found, size) == (self._number, stop) else None

    def _place(self, model: int, start: int) -> int:
        return (model * self._grains + start // self._grain) * self._slot


def masks_bytes(models: int, elems: int, grain: int) -> int:
    """Returns the room for all masks of a tensor."""
    return models * -(-elems // grain) * _slot_bytes(grain)


def _slot_bytes(grain: int) -> int:
    return -(-grain // 64) * 8 + _END.size
