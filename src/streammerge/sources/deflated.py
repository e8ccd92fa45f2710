"""A tensor in a packed record. It cannot be read at random: the record is unpacked into a temporary file first.

Packed records are compressed, or are the text or the big-endian numbers of an array in a pickle.
"""

from __future__ import annotations

import array
import codecs
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from streammerge.sources.base import Allocated, Blob, BlobPath, Needs, Reader, Room, Source, read_whole
from streammerge.sources.stored import Stored
from streammerge.tensors.spec import TensorSpec, is_contiguous

if TYPE_CHECKING:
    from streammerge.sources.strided import Strided


@dataclass(frozen=True, slots=True)
class PackedRecord:
    """A packed record: where it lies, and its length in bytes before and after unpacking.

    ``form``: "deflate"; "text", which has a character for each byte and is written in UTF-8; "raw". ``swapped_bytes``: the
    size of its numbers if they are big-endian, else 1.
    """

    offset: int
    compressed_bytes: int
    nbytes: int
    form: str = "deflate"
    swapped_bytes: int = 1

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.compressed_bytes


@dataclass(frozen=True, slots=True)
class Deflated(Source):
    """A tensor in a packed record of ``path``. ``within``: the tensor as a source over the unpacked bytes."""

    spec: TensorSpec
    path: BlobPath
    record: PackedRecord
    within: Stored | Strided

    def needs(self) -> Needs:
        return self.within.needs()

    def open(self, room: Room) -> Reader:
        raise ValueError(f"{self.spec.name} lies in a packed record, which must be inflated first")

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (Blob(self.path, *self.record.span),)

    @property
    def key(self) -> PackedKey:
        return (self.path, self.record)

    def inflated(self, path: BlobPath, offset: int) -> Source:
        """Returns the tensor as a source over its inflated record, which begins at ``offset`` of ``path``."""
        return replace(self.within, spec=self.spec, path=path, offset=self.within.offset + offset)

    def rows(self, start: int, stop: int) -> Source:
        within = self.within.rows(start, stop)
        return replace(self, spec=within.spec, within=within)  # type: ignore[arg-type]


PackedKey = tuple[BlobPath, PackedRecord]
"""A record, and the file that it lies in."""


def of_bytes(
    spec: TensorSpec,
    path: BlobPath,
    offset: int,
    strides: tuple[int, ...] | None = None,
    record: PackedRecord | None = None,
    lazy: str = "",
) -> Source:
    """Returns the source of a tensor over bytes of a file.

    ``offset``: of the first element in ``path``, or in the inflated record. ``strides``: in elements, C order if not given.
    ``lazy``: see :class:`Strided`.
    """
    if not spec.numel:
        return Stored(spec, path, 0 if record else offset)
    if lazy or (strides is not None and not is_contiguous(spec.shape, strides)):
        from streammerge.sources.strided import Strided  # here, because most tensors are contiguous

        found: Stored | Strided = Strided.of(spec, path, offset, strides, lazy)
    else:
        found = Stored(spec, path, offset)
    return Deflated(spec, path, record, found) if record else found


def records(source: Source) -> Iterator[PackedKey]:
    """Yields the packed records that a source reads, at any depth of the expression."""
    if isinstance(source, Deflated):
        yield source.key
    for part in source.parts:
        yield from records(part)


def with_inflated(source: Source, places: Mapping[PackedKey, tuple[BlobPath, int]]) -> Source:
    """Returns the source with its records read from their inflated bytes. ``places``: record -> path and offset."""
    if isinstance(source, Deflated):
        return source.inflated(*places[source.key]) if source.key in places else source
    parts = source.parts
    changed = tuple(with_inflated(part, places) for part in parts)
    return source if all(a is b for a, b in zip(parts, changed, strict=True)) else source.with_parts(changed)


MOST_AT_ONCE = 1 << 20
"""The most bytes that an unpacker returns at once."""
_MOST_SMALL = 1 << 20


class Damaged(ValueError):
    """The packed bytes are impossible."""


class _Unpacked:
    """The bytes of a record in memory, in the place of a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def open(self) -> _Unpacked:
        return self

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self._data[offset : offset + len(buffer)]


def read_small(source: Source) -> bytes:
    """Returns all bytes of a short tensor of a file or of memory, also if it lies in packed records.

    Raises Damaged for a record that cannot be unpacked, or that is longer than 1 MiB.
    """
    places: dict[PackedKey, tuple[BlobPath, int]] = {}
    for path, record in records(source):
        if max(record.compressed_bytes, record.nbytes) > _MOST_SMALL:
            raise Damaged(f"a record of {max(record.compressed_bytes, record.nbytes)} bytes is too long for a short tensor")
        packed = bytearray(record.compressed_bytes)
        path.open().read_into(memoryview(packed), record.offset)
        data = b"".join(islice(unpacked(record, iter([bytes(packed)])), 4))
        if len(data) != record.nbytes:
            raise Damaged("a packed record has another length than it says")
        places[path, record] = _Unpacked(data), 0
    return bytes(read_whole(with_inflated(source, places), Allocated(lambda path: path.open())))


def unpacked(record: PackedRecord, pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Yields the bytes of a record. ``pieces``: its packed bytes. Raises Damaged, if they are not of the record's form.

    Holds a few MiB at most. Yields more bytes than the record has if it is damaged, but not many more.
    """
    made = _FORMS[record.form](pieces)
    return _swapped(made, record.swapped_bytes) if record.swapped_bytes > 1 else made


def _inflated(pieces: Iterator[bytes]) -> Iterator[bytes]:
    machine = zlib.decompressobj(-15)
    try:
        while not machine.eof:
            piece = machine.unconsumed_tail or next(pieces, b"")
            data = machine.decompress(piece, MOST_AT_ONCE)
            if not data and not piece:
                return
            yield data
    except zlib.error as error:
        raise Damaged(str(error)) from error


def _encoded(pieces: Iterator[bytes]) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces:
            yield decoder.decode(piece).encode("latin-1")
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise Damaged(str(error)) from error


def _itself(pieces: Iterator[bytes]) -> Iterator[bytes]:
    return pieces


_FORMS: dict[str, Callable[[Iterator[bytes]], Iterator[bytes]]] = {
    "deflate": _inflated,
    "text": _encoded,
    "raw": _itself,
}


def _swapped(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    left = b""
    for piece in pieces:
        whole = left + piece
        end = len(whole) // size * size
        yield swapped(whole[:end], size)
        left = whole[end:]
    yield left


def swapped(data: bytes, size: int) -> bytes:
    """Returns numbers of ``size`` bytes each (1, 2, 4 or 8) with their bytes in reverse order."""
    if size == 1:
        return data
    numbers = array.array({2: "H", 4: "I", 8: "Q"}[size], data)
    numbers.byteswap()
    return numbers.tobytes()
