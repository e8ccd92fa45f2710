"""The format of torch.save before 1.6: five pickles back to back, then each storage's length and bytes.

The lengths are walked, so every storage is read in place. Storages may be unaligned; reading does not need alignment.
"""

from __future__ import annotations

import struct

from streammerge.errors import FormatError, StreammergeError, printable
from streammerge.formats.base import Container, StorageBytes
from streammerge.pickles.arrays import Arrays
from streammerge.pickles.rebuild import StorageTable, text
from streammerge.pickles.unpickle import unpickle
from streammerge.stores.base import Location

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def matches(head: bytes, size: int) -> bool:
    """Whether the first pickle of the file, in any protocol, is the magic number."""
    try:
        return bool(unpickle(head[:64]) == MAGIC)
    except StreammergeError:
        return False


def read(path: Location) -> Container:
    """Returns the container of a legacy checkpoint. Raises FormatError; nothing in it is executed."""
    where, size = printable(path), path.size
    table = StorageTable()
    with path.stream() as stream:
        unpickle(stream, where=where)
        protocol = unpickle(stream, where=where)
        if protocol != _PROTOCOL:
            raise FormatError(
                f"{where} has version {printable(protocol)} of torch's legacy format; only {_PROTOCOL} is known"
            )
        system = unpickle(stream, where=where)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise FormatError(
                f"{where} was saved on a big-endian machine, which is not supported; save it again on this one"
            )
        begin = stream.tell()
        arrays = Arrays(path, begin)
        tree = unpickle(stream, table, where, arrays=arrays)
        pickle_bytes = stream.tell() - begin - arrays.left_bytes
        keys = unpickle(stream, where=where)
        if not isinstance(keys, list) or not all(isinstance(k, str | bytes) for k in keys):
            raise FormatError(f"{where}: its list of storages is damaged")
        item_bytes: dict[str, tuple[int, int]] = {}
        for ref in table.refs.values():
            item_bytes.setdefault(ref.key, (ref.dtype.element_bytes if ref.dtype else 1, ref.numel))
        storages: dict[str, StorageBytes] = {}
        cursor = stream.tell()
        for key in map(text, keys):
            if key not in item_bytes:
                raise FormatError(
                    f"{where}: storage {printable(key)} belongs to no tensor, so its length is unknown; it is damaged"
                )
            stream.seek(cursor)
            header = stream.read(8)
            numel = struct.unpack("<q", header)[0] if len(header) == 8 else -1
            nbytes = numel * item_bytes[key][0]
            if numel != item_bytes[key][1]:
                raise FormatError(
                    f"{where}: storage {printable(key)} has {numel} elements, expected {item_bytes[key][1]}; it is damaged"
                )
            if cursor + 8 + nbytes > size:
                raise FormatError(
                    f"{where} is truncated: storage {printable(key)} ends at byte {cursor + 8 + nbytes}, the file at {size}"
                )
            storages[key] = StorageBytes(path, cursor + 8, nbytes)
            cursor += 8 + nbytes
    return Container(
        path,
        "PyTorch legacy",
        tree,
        storages,
        (path,),
        notes=arrays.notes,
        pickled=True,
        held_bytes=pickle_bytes,
        arrays=arrays.sources,
    )
