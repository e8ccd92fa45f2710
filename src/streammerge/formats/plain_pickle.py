"""A plain pickle of numpy's arrays, as detectron2 publishes weights (``.pkl``), or of torch's tensors.

Their bytes lie in the pickle, and are read there. Nothing in it is imported or executed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import BinaryIO

from streammerge.errors import FormatError, printable
from streammerge.formats.base import Container, LayoutFile, Literal, Match, StorageBytes
from streammerge.formats.records import RECEIPT_KEY, RECIPE_KEY
from streammerge.pickles.arrays import Arrays
from streammerge.pickles.storages import EnclosedStorages
from streammerge.pickles.tree import Blank
from streammerge.pickles.unpickle import unpickle
from streammerge.stores.base import Location

NAME = "pickle"
"""What :class:`Container` calls the format."""

_PROTOCOLS = (b"\2", b"\3", b"\4", b"\5")
_MOST_HEADER_BYTES = 256 << 20


def matches(head: bytes, size: int) -> Match:
    """torch's old format begins with a pickle too."""
    return "unless another" if head[:1] == b"\x80" and head[1:2] in _PROTOCOLS else False


def read(path: Location) -> Container:
    """Returns the container of a plain pickle. Raises FormatError; nothing in it is executed."""
    where, size = printable(path), path.size
    with path.stream() as stream:
        metadata = _metadata(stream)
        begin = stream.tell()
        arrays = Arrays(path, begin)
        enclosed = EnclosedStorages(arrays)
        tree = unpickle(stream, where=where, arrays=arrays, enclosed=enclosed)
        end = stream.tell()
    if end != size:
        raise FormatError(
            f"{where} is a plain pickle with {size - end} bytes behind it, which would be lost; save one object in a file"
        )
    held = end - arrays.left_bytes
    made = Container(path, NAME, tree, {}, (path,), metadata, pickled=True, held_bytes=held, arrays=arrays.sources)
    made.notes += arrays.notes
    made.storages |= {key: StorageBytes(path, *place) for key, place in enclosed.places.items()}
    packed = sum(record is not None for _, _, record in enclosed.places.values())
    if packed:
        made.notes.append(f"{packed} of its storages are texts; they are unpacked into a temporary file first")
    return made


def _metadata(stream: BinaryIO) -> dict[str, str]:
    """Reads the headers of our own outputs. Leaves the stream behind them."""
    found: dict[str, str] = {}
    stream.seek(2)
    while True:
        at = stream.tell()
        head = stream.read(5)
        nbytes = struct.unpack("<I", head[1:])[0] if len(head) == 5 and head[:1] == b"X" else 0
        text = stream.read(nbytes) if 0 < nbytes <= _MOST_HEADER_BYTES else b""
        key, _, value = text.partition(b"\n")
        name = key.decode("ascii", "replace")
        if stream.read(1) != b"0" or name not in (RECIPE_KEY, RECEIPT_KEY):
            stream.seek(at)
            return found
        found[name] = value.decode("utf-8", "replace")


def header(key: str, text: bytes) -> bytes:
    """Returns the header that holds a recipe or a receipt: a text that a loader reads and drops."""
    return key.encode() + b"\n" + text


def plan_layout(file_name: str, pickle: Sequence[bytes | Blank], receipt: bytes) -> LayoutFile:
    """Plans the place of each byte. ``pickle``: its parts; tensors lie between them. ``receipt``: the blank one in it."""
    literals: list[Literal] = []
    offsets: dict[str, int] = {}
    cursor = 0
    for part in pickle:
        if isinstance(part, Blank):
            offsets[part.key] = cursor
            cursor += part.nbytes
        else:
            literals.append(Literal(cursor, part))
            cursor += len(part)
    return LayoutFile(file_name, cursor, offsets, receipt=receipt, seal=partial(_sealed, literals, receipt))


def _sealed(literals: list[Literal], blank: bytes, checksums: Mapping[int, int], receipt: bytes) -> list[Literal]:
    """Returns all bytes outside the tensors with the final receipt. A plain pickle holds no other checksums."""
    return [Literal(each.offset, each.data.replace(blank, receipt)) for each in literals]
