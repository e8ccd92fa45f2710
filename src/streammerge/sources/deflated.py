"""A tensor in a compressed record. It cannot be read at random: the record is inflated into a temporary file first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from streammerge.sources.base import Blob, BlobPath, Needs, Reader, Room, Source
from streammerge.sources.stored import Stored
from streammerge.sources.strided import Strided
from streammerge.tensors.spec import TensorSpec, is_contiguous


@dataclass(frozen=True, slots=True)
class Record:
    """A compressed record: where its deflate stream lies, and its length in bytes before and after inflation."""

    offset: int
    compressed_bytes: int
    nbytes: int

    @property
    def span(self) -> tuple[int, int]:
        return self.offset, self.compressed_bytes


@dataclass(frozen=True, slots=True)
class Deflated(Source):
    """A tensor in a compressed record of ``path``. ``within``: the tensor as a source over the inflated bytes."""

    spec: TensorSpec
    path: BlobPath
    record: Record
    within: Stored | Strided

    def needs(self) -> Needs:
        return self.within.needs()

    def open(self, room: Room) -> Reader:
        raise ValueError(f"{self.spec.name} lies in a compressed record, which must be inflated first")

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (Blob(self.path, *self.record.span),)

    @property
    def key(self) -> RecordKey:
        return (self.path, self.record)

    def inflated(self, path: BlobPath, offset: int) -> Source:
        """Returns the tensor as a source over its inflated record, which begins at ``offset`` of ``path``."""
        return replace(self.within, spec=self.spec, path=path, offset=self.within.offset + offset)

    def rows(self, start: int, stop: int) -> Source:
        within = self.within.rows(start, stop)
        return replace(self, spec=within.spec, within=within)  # type: ignore[arg-type]


RecordKey = tuple[BlobPath, Record]
"""A record, and the file that it lies in."""


def of_bytes(
    spec: TensorSpec,
    path: BlobPath,
    offset: int,
    strides: tuple[int, ...] | None = None,
    record: Record | None = None,
    lazy: str = "",
) -> Source:
    """Returns the source of a tensor over bytes of a file.

    ``offset``: of the first element in ``path``, or in the inflated record. ``strides``: in elements, C order if not given.
    ``lazy``: see :class:`Strided`.
    """
    if not spec.numel:
        return Stored(spec, path, 0 if record else offset)
    if lazy or (strides is not None and not is_contiguous(spec.shape, strides)):
        found: Stored | Strided = Strided.of(spec, path, offset, strides, lazy)
    else:
        found = Stored(spec, path, offset)
    return Deflated(spec, path, record, found) if record else found


def records(source: Source) -> Iterator[RecordKey]:
    """Yields the compressed records that a source reads, at any depth of the expression."""
    if isinstance(source, Deflated):
        yield source.key
    for part in source.parts:
        yield from records(part)


def with_inflated(source: Source, places: Mapping[RecordKey, tuple[BlobPath, int]]) -> Source:
    """Returns the source with its records read from their inflated bytes. ``places``: record -> path and offset."""
    if isinstance(source, Deflated):
        return source.inflated(*places[source.key]) if source.key in places else source
    parts = source.parts
    changed = tuple(with_inflated(part, places) for part in parts)
    return source if all(a is b for a, b in zip(parts, changed, strict=True)) else source.with_parts(changed)
