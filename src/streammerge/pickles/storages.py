"""torch's storages inside a pickle, as ``pickle.dump`` writes them: each is a file of torch's old format among its bytes.

Such a file has five short pickles, then the number of elements, then the elements. Only the pickles are read.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from streammerge.errors import FormatError
from streammerge.pickles.arrays import Arrays, Payload
from streammerge.pickles.rebuild import Damaged, NotRead, StorageTable
from streammerge.pickles.tree import StorageRef
from streammerge.pickles.unpickle import unpickle
from streammerge.sources.deflated import PackedRecord

_MOST_HEAD_BYTES = 4096
_MAGIC = 0x1950A86A20F9469CFC6C
_NOT_READ = "a storage of torch in it is in another form than torch writes; write the file again with torch.save"


class EnclosedStorages:
    """Finds the storages of one plain pickle.

    ``arrays``: knows where the pickle lies in its file. ``places``: key of a storage -> (offset, bytes, record). The offset
    is that in the file, or in the unpacked record.
    """

    def __init__(self, arrays: Arrays) -> None:
        self.arrays = arrays
        self.places: dict[str, tuple[int, int, PackedRecord | None]] = {}
        self._begin = b""
        self._known: dict[int, StorageRef] = {}

    def __call__(self, args: tuple[Any, ...], peek: Callable[[int, int], bytes]) -> StorageRef | None:
        """Returns the storage that ``torch.storage._load_from_bytes`` makes; None if its bytes are in no file.

        ``peek(offset, nbytes)``: returns bytes of the pickle. Raises NotRead and Damaged.
        """
        place = self.arrays.place_of(args[0]) if len(args) == 1 else None
        if place is None or place.offset in self._known:  # a hostile pickle may mention the same bytes without end
            return None if place is None else self._known[place.offset]
        head = _as_bytes(place, peek(place.offset - (self.arrays.offset or 0), min(place.nbytes, 2 * _MOST_HEAD_BYTES)))
        try:
            ref, begin = self._read(head)
        except FormatError as error:
            raise NotRead(_NOT_READ) from error
        end = begin + ref.nbytes
        if end != place.nbytes if place.form == "raw" else not end <= place.nbytes <= 2 * end:
            raise Damaged(f"a storage of {ref.nbytes} bytes has others")
        key = str(place.offset)
        if place.form == "raw":
            self.places[key] = (place.offset + begin, ref.nbytes, None)
        else:
            self.places[key] = (begin, ref.nbytes, PackedRecord(place.offset, place.nbytes, end, place.form))
        made = self._known[place.offset] = replace(ref, key=key)
        return made

    def _read(self, head: bytes) -> tuple[StorageRef, int]:
        """Returns the storage that a file of torch's old format holds, and where its elements begin."""
        stream = io.BytesIO(head)
        if self._begin and head.startswith(self._begin):  # most files begin alike, and a checkpoint has many
            stream.seek(len(self._begin))
        else:
            magic, _, system = unpickle(stream), unpickle(stream), unpickle(stream)
            if magic != _MAGIC or not isinstance(system, dict) or system.get("little_endian") is not True:
                raise NotRead(_NOT_READ)
            self._begin = head[: stream.tell()]
        ref = unpickle(stream, StorageTable())
        unpickle(stream)
        numel = stream.read(8)
        if not isinstance(ref, StorageRef) or ref.view_offset or len(numel) < 8:
            raise NotRead(_NOT_READ)
        if struct.unpack("<q", numel)[0] != ref.numel:
            raise Damaged("a storage has another number of elements than it says")
        return ref, stream.tell()


def _as_bytes(place: Payload, head: bytes) -> bytes:
    """Returns the first bytes of a value. A text, which may be cut in a character, has a character for each byte."""
    return head.decode("utf-8", "ignore").encode("latin-1", "replace") if place.form == "text" else head
