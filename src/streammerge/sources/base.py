"""The protocol of sources: what a tensor is, where its bytes are, what reading it needs, and how it is read."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

from streammerge.tensors.spec import TensorSpec

T = TypeVar("T")
BlobPath = Any
"""A store's name for a blob. Opaque here: it can be hashed, compared, shown as text, and given back to the store."""
COPY_BYTES = 1 << 20
"""Size of the block through which readers copy."""
_ALIGNMENT = 64


class Blob(NamedTuple):
    """Bytes that a source reads: ``nbytes`` bytes from ``offset`` of the blob that the store calls ``path``."""

    path: BlobPath
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Needs:
    """Memory that a reader needs beside the caller's buffer, for one worker. The budget adds these.

    ``scratch_bytes``: its own region of the worker's buffers; readers get it from :meth:`Room.take`. ``shared_bytes``: a
    region that all readers of the worker share, valid within one call of ``read``. ``tiles``: how many tiles it wants (a
    tile holds elements read ahead; the budget sets its size, which may be 0). ``held_bytes``: what it holds outside the
    worker's buffers. ``passes_bytes``: what it holds there while it looks at a whole tensor before it is read
    (:meth:`Room.first`). ``computes``: whether torch takes part.
    """

    scratch_bytes: int = 0
    shared_bytes: int = 0
    tiles: int = 0
    held_bytes: int = 0
    computes: bool = False
    passes_bytes: int = 0

    def __add__(self, other: Needs) -> Needs:
        if other is NO_NEEDS or self is NO_NEEDS:  # as of each of thousands of pieces
            return self if other is NO_NEEDS else other
        return Needs(
            self.scratch_bytes + other.scratch_bytes,
            max(self.shared_bytes, other.shared_bytes),
            self.tiles + other.tiles,
            self.held_bytes + other.held_bytes,
            self.computes or other.computes,
            max(self.passes_bytes, other.passes_bytes),
        )


NO_NEEDS = Needs()
"""Of a source that is read where it lies."""


def region_bytes(nbytes: int) -> int:
    """Bytes that :meth:`Room.take` uses up to give ``nbytes``: the next region begins aligned for every dtype."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


class File(Protocol):
    """An open blob: ``read_into`` fills the buffer from ``offset`` of the blob."""

    def read_into(self, buffer: memoryview, offset: int) -> None: ...


class Room(Protocol):
    """The services of a worker for its readers: files, memory, and a cache for results that are computed once."""

    def file(self, path: BlobPath) -> File:
        """Returns the open file of a blob's ``path``."""
        ...

    def touched(self, path: BlobPath, offset: int, nbytes: int) -> None:
        """Announces that these bytes were read, so that a polite run gives their page cache back."""
        ...

    def take(self, nbytes: int) -> memoryview:
        """Returns a region for this reader alone. :attr:`Needs.scratch_bytes` counts ``region_bytes(nbytes)`` for it."""
        ...

    def tile(self) -> memoryview:
        """Returns a tile for this reader alone. :attr:`Needs.tiles` counts it."""
        ...

    def remembered(self, source: Source) -> tuple[memoryview, memoryview]:
        """Returns the memory for what readers of ``source`` remember: of its first elements, and of those read last. Either
        may be empty."""
        ...

    def shared(self, nbytes: int) -> memoryview:
        """Returns a region that other readers use too. It is valid within one call of ``read``."""
        ...

    def once(self, source: Source, make: Callable[[], T]) -> T:
        """Returns the result of ``make``, which is called once for each source, also if the tensor is opened again."""
        ...

    def common(self, source: Source, make: Callable[[], Reader]) -> Reader:
        """Returns the one reader of a source in this room. ``make`` makes it when it is asked for first."""
        ...

    def first(self, make: Callable[[], object]) -> None:
        """Says what a reader must make before it is read. Readers of inner sources say it before."""
        ...

    def prepare(self) -> None:
        """Makes all that readers must make first, one after the other, in the order in which they have said it."""
        ...

    def halt(self) -> None:
        """Raises when the run is stopping. Long-running readers call it from time to time."""
        ...

    def met(self, origin: str, count: int) -> None:
        """Announces so many NaN and infinite numbers in what a reader has computed, and where they come from."""
        ...


class Reader(ABC):
    """An open source, used by one worker."""

    @abstractmethod
    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        """Reads elements ``start`` to ``stop`` in C order, as bytes of the source's dtype.

        Counts elements as the source's shape does: a complex number is one. Fills ``out``, which has room for exactly
        these elements, and returns it; or returns other memory that holds them and stays valid.
        """

    def place(self, start: int, stop: int) -> tuple[BlobPath, int] | None:
        """Returns the path and the offset of these elements if they lie together in one blob as they are. Else None, also
        where that is not known."""
        return None


class Source(ABC):
    """A tensor as an expression: frozen plain data that can be pickled, without open files.

    Subclasses are frozen dataclasses with slots. Inner sources are fields of type ``Source`` or ``tuple[Source, ...]``. The
    methods here find them by these types.
    """

    __slots__ = ()
    spec: TensorSpec
    """Name, dtype and shape of the tensor."""

    @abstractmethod
    def needs(self) -> Needs:
        """Returns the memory that its reader needs, inner readers included."""

    @abstractmethod
    def open(self, room: Room) -> Reader:
        """Returns a reader, which takes its memory from ``room``. Opens inner sources with the same room."""

    @property
    def parts(self) -> tuple[Source, ...]:
        """The inner sources, in the order of the fields."""
        return tuple(_sources_in(self))

    def with_parts(self, parts: tuple[Source, ...]) -> Source:
        """Returns the same expression over other inner sources, given in the order of :attr:`parts`."""
        rest, changed = iter(parts), dict[str, Any]()
        for name in _field_names(type(self)):
            value = getattr(self, name)
            if _is_source(type(value)):
                changed[name] = next(rest)
            elif _is_sources(value):
                changed[name] = tuple(next(rest) for _ in value)
        return replace(self, **changed) if changed else self  # type: ignore[type-var]

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All bytes that it reads from stores."""
        return tuple(blob for part in self.parts for blob in part.blobs)

    @property
    def ranged(self) -> bool:
        """Whether :meth:`blobs_of` tells where its elements are."""
        return False

    def blobs_of(self, start: int, stop: int) -> Iterator[Blob]:
        """Yields the bytes that elements ``start`` to ``stop`` are read from. Nothing unless it is :attr:`ranged`."""
        return iter(())

    @property
    def held(self) -> bool:
        """Whether some of its numbers lie in the caller's memory, so that no later run can read them again."""
        return any(part.held for part in self.parts)

    @property
    def dequantises(self) -> bool:
        """Whether its numbers are those of quantised weights. They are then float32 because nothing has rounded them yet,
        and not because a file holds float32."""
        return any(part.dequantises for part in self.parts)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def begin(self) -> tuple[BlobPath, int]:
        """Path and offset of the first blob; (None, 0) for a source that reads none."""
        blobs = self.blobs
        return blobs[0][:2] if blobs else (None, 0)

    @property
    def paths(self) -> tuple[BlobPath, ...]:
        """The path of each blob, once."""
        return tuple(dict.fromkeys(blob.path for blob in self.blobs))

    @property
    def origin(self) -> str:
        """The origin of its numbers, for messages: its paths."""
        shown = list(map(str, self.paths))
        more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
        return ", ".join(shown[:4]) + more or "a constant"

    @property
    def place(self) -> tuple[object, ...]:
        """A key that is equal for two sources exactly when they are the same tensor, under any name. It has plain values,
        because the digest of a plan is computed from it."""
        kind = type(self)
        return (kind.__name__, *[_plain(getattr(self, name)) for name in _field_names(kind)])

    def named(self, name: str) -> Source:
        """Returns the same tensor under another name."""
        return self if name == self.spec.name else replace(self, spec=self.spec.named(name))  # type: ignore[type-var]

    def rows(self, start: int, stop: int) -> Source | None:
        """Returns rows ``start`` to ``stop`` as a source that is cheaper than a gather of rows, or None."""
        return None


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple([field.name for field in fields(kind)])


_KINDS: dict[type, bool] = {}


def _is_source(kind: type) -> bool:
    """Whether values of this type are sources. Asked for each field of each source, so it is remembered."""
    known = _KINDS.get(kind)
    if known is None:
        known = _KINDS[kind] = issubclass(kind, Source)
    return known


def _is_sources(value: object) -> bool:
    if type(value) is not tuple or not value:
        return False
    for each in value:  # noqa: SIM110 - a plain loop, because this runs for every field
        if not _is_source(type(each)):
            return False
    return True


def _sources_in(source: Source) -> Iterator[Source]:
    for name in _field_names(type(source)):
        value = getattr(source, name)
        if _is_source(type(value)):
            yield value
        elif _is_sources(value):
            yield from value


def _plain(value: Any) -> Any:
    """Returns a field as a value that can be hashed."""
    kind = type(value)
    if kind is TensorSpec:
        return (value.dtype, value.shape)
    if _is_source(kind):
        return value.place
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value


class Allocated:
    """A room that allocates new memory. It serves to read a source outside a run, in tests and notebooks.

    ``files`` opens a blob's path. ``tile_bytes``: the size of a tile, and of what is remembered of each source.
    """

    def __init__(self, files: Callable[[Any], File] | None = None, tile_bytes: int = 1 << 20) -> None:
        self._files, self._tile_bytes = files, tile_bytes
        self._made: dict[int, tuple[Source, Any]] = {}
        self._readers: dict[tuple[object, ...], Reader] = {}
        self._first: list[Callable[[], object]] = []
        self._lock = threading.RLock()  # a value may be made of others that are made once

    def file(self, path: BlobPath) -> File:
        if self._files is None:
            raise ValueError(f"a room without files cannot open {path}")
        return self._files(path)

    def touched(self, path: BlobPath, offset: int, nbytes: int) -> None:
        """Does nothing: outside a run there is no page cache to give back."""

    def take(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def tile(self) -> memoryview:
        return memoryview(bytearray(self._tile_bytes))

    def remembered(self, source: Source) -> tuple[memoryview, memoryview]:
        whole = memoryview(bytearray(min(source.nbytes, self._tile_bytes)))
        return (whole, whole[:0]) if len(whole) == source.nbytes else (whole[:0], whole)

    def shared(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def once(self, source: Source, make: Callable[[], T]) -> T:
        with self._lock:
            if id(source) not in self._made:
                self._made[id(source)] = source, make()
        return self._made[id(source)][1]  # type: ignore[no-any-return]

    def common(self, source: Source, make: Callable[[], Reader]) -> Reader:
        if source.place not in self._readers:
            self._readers[source.place] = make()
        return self._readers[source.place]

    def first(self, make: Callable[[], object]) -> None:
        self._first.append(make)

    def prepare(self) -> None:
        with self._lock:
            while self._first:
                self._first.pop(0)()

    def forget(self) -> None:
        """Gives back what readers keep here. They hold the room too, so else all stays until cycles are searched."""
        self._first.clear()
        self._made.clear()
        self._readers.clear()

    def halt(self) -> None:
        """Does nothing: outside a run nothing stops."""

    def met(self, origin: str, count: int) -> None:
        """Does nothing: outside a run nobody asks."""


def read_whole(source: Source, room: Room) -> bytearray:
    """Returns all bytes of a source, in memory. For tests and small tensors."""
    out = bytearray(source.nbytes)
    if source.spec.numel:
        view = memoryview(out)
        made = source.open(room).read(0, source.spec.numel, view)
        if made is not view:
            view[:] = made
    return out


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """Yields blocks that together are elements ``start`` to ``stop`` of a C-order tensor: each as its range per dimension.

    The blocks come in C order. Each is whole in all dimensions after its first dimension that is longer than 1.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner, rest = 1, shape[1:]
    for size in rest:
        inner *= size
    (first, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        for box in boxes(rest, begin, end):
            yield ((first, first + 1), *box)
        return
    if begin:
        for box in boxes(rest, begin, inner):
            yield ((first, first + 1), *box)
        first += 1
    if first < last:
        yield ((first, last), *((0, size) for size in rest))
    for box in boxes(rest, 0, end):
        yield ((last, last + 1), *box)
