"""A strided view of a storage (transposed, sliced, expanded, conjugated), gathered from the file where it lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from streammerge.sources.base import COPY_BYTES, Blob, BlobPath, Needs, Reader, Room, Source, boxes
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import TensorSpec, contiguous_strides
from streammerge.units import PAGE_BYTES

if TYPE_CHECKING:
    import torch

STRIP_BYTES = COPY_BYTES
"""Size of the buffer for bytes that are read before they are put in order. All strided readers of a worker share it."""


@dataclass(frozen=True, slots=True)
class Strided(Source):
    """A view over bytes of ``path``: its first element is at ``offset``, ``strides`` count elements and are not negative.

    ``lazy``: "conjugated" or "negated", an operation that torch had not carried out yet.
    """

    spec: TensorSpec
    path: BlobPath
    offset: int
    strides: tuple[int, ...]
    lazy: str = ""

    @classmethod
    def of(
        cls, spec: TensorSpec, path: BlobPath, offset: int, strides: tuple[int, ...] | None = None, lazy: str = ""
    ) -> Strided:
        """Returns a :class:`Strided`, in C order if no strides are given."""
        return cls(spec, path, offset, contiguous_strides(spec.shape) if strides is None else strides, lazy)

    def needs(self) -> Needs:
        return Needs(shared_bytes=STRIP_BYTES, tiles=int(self._scattered), computes=True)

    def open(self, room: Room) -> Reader:
        return _Reader(self, room, self._scattered)

    @property
    def parts(self) -> tuple[Source, ...]:
        return ()

    @property
    def blobs(self) -> tuple[Blob, ...]:
        return (Blob(self.path, self.offset, self._reach_bytes),)

    @property
    def _reach_bytes(self) -> int:
        """Bytes from the first element to the end of the last one."""
        return _reach(self.spec.shape, self.strides) * self.spec.dtype.element_bytes if self.spec.numel else 0

    @property
    def _scattered(self) -> bool:
        """Whether neighbouring elements of the view are not neighbours in the file, as in a transposed matrix."""
        steps = [stride for size, stride in zip(self.spec.shape, self.strides, strict=True) if size > 1 and stride]
        return steps != sorted(steps, reverse=True)

    def rows(self, start: int, stop: int) -> Source:
        spec = self.spec
        shape = (stop - start, *spec.shape[1:])
        offset = self.offset + start * self.strides[0] * spec.dtype.element_bytes
        return replace(self, spec=TensorSpec(spec.name, spec.dtype, shape), offset=offset)


class _Reader(Reader):
    """Gathers elements block by block.

    Neighbours in a scattered view lie far apart in the file. The reader gathers a whole tile of the view at once, so that
    each visit to a row of the file reads more of it.
    """

    def __init__(self, source: Strided, room: Room, scattered: bool) -> None:
        self._source, self._room = source, room
        self._file = room.file(source.path)
        spec = source.spec
        self._size = spec.dtype.element_bytes
        self._tile = room.tile() if scattered else memoryview(b"")
        self._tile_elems, self._scattered = len(self._tile) // self._size, scattered
        self._begin = self._end = 0
        self._last = -1

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        at, size = start, self._size
        if self._tile_elems < 2 * (stop - start) and self._tile_elems < self._source.spec.numel:
            self._gather(start, stop, out)
            at = stop
        while at < stop:
            if not self._begin <= at < self._end and not self._fill(at):
                self._gather(at, stop, out[(at - start) * size :])
                break
            end = min(stop, self._end)
            out[(at - start) * size : (end - start) * size] = self._tile[
                (at - self._begin) * size : (end - self._begin) * size
            ]
            at = end
        self._last = stop
        return out

    def _fill(self, at: int) -> bool:
        """Gathers a tile that contains ``at``. Returns whether it did.

        In sequential reading the tile goes from ``at`` to the next multiple of the tile's length. In reading nearby it
        begins at the previous multiple. Samples, which jump far, get no tile.
        """
        numel, elems = self._source.spec.numel, self._tile_elems
        near = self._last >= 0 and abs(at - self._last) <= elems
        if numel > elems and not near:
            return False
        begin = at if at == self._last and numel > elems else at // elems * elems
        end = min(numel, (at // elems + 1) * elems)
        self._begin = self._end = 0
        self._gather(begin, end, self._tile[: (end - begin) * self._size])
        self._begin, self._end = begin, end
        return True

    def _gather(self, start: int, stop: int, out: memoryview) -> None:
        """Puts elements of the view, in C order, into ``out``."""
        import torch

        source, size = self._source, self._size
        width = _mover(source.spec.dtype)
        numbers = torch.frombuffer(out, dtype=width)
        done = 0
        for box in boxes(source.spec.shape, start, stop):
            shape = [b - a for a, b in box]
            first = sum(a * stride for (a, _), stride in zip(box, source.strides, strict=True))
            count = 1
            for n in shape:
                count *= n
            into = numbers[done : done + count].view(shape)
            kept = [d for d, n in enumerate(shape) if n > 1]
            into = into.view([shape[d] for d in kept])
            self._block(into, [source.strides[d] for d in kept], source.offset + first * size)
            done += count
            end = first + _reach(shape, source.strides)
            if not self._scattered:
                self._room.touched(source.path, source.offset + first * size, (end - first) * size)
        if self._scattered and stop == source.spec.numel:  # earlier, the next tile still needs the same pages
            self._room.touched(*source.blobs[0])
        if source.lazy:
            _carry_out(source.lazy, out, source.spec.dtype)

    def _block(self, into: torch.Tensor, strides: list[int], offset: int) -> None:
        """Fills ``into`` from elements that lie ``strides`` apart, the first one at ``offset``.

        Reads across gaps of up to a page. Visits each part after a longer gap separately.
        """
        import torch

        self._room.halt()
        strip, size = self._room.shared(STRIP_BYTES), self._size
        top = max(range(len(strides)), key=lambda d: (strides[d], into.shape[d]), default=None)
        if top is None or not strides[top]:  # one element, maybe expanded
            self._file.read_into(strip[:size], offset)
            into.copy_(torch.frombuffer(strip[:size], dtype=into.dtype).view([1] * into.dim()).expand(into.shape))
            return
        count, step = into.shape[top], strides[top] * size
        rest = [d for d in range(len(strides)) if d != top]
        inner = _reach([into.shape[d] for d in rest], [strides[d] for d in rest]) * size
        near = step <= inner + PAGE_BYTES
        if inner > len(strip) or not (near or _is_dense([into.shape[d] for d in rest], [strides[d] for d in rest], size)):
            for index in range(count):
                self._block(into.select(top, index), [strides[d] for d in rest], offset + index * step)
            return
        at_once = max((len(strip) - inner) // step + 1 if near else len(strip) // inner, 1)
        for begin in range(0, count, at_once):
            end = min(begin + at_once, count)
            if near:
                data = strip[: (end - begin - 1) * step + inner]
                self._file.read_into(data, offset + begin * step)
                between = strides[top]
            else:
                data = strip[: (end - begin) * inner]
                for index in range(begin, end):
                    place = (index - begin) * inner
                    self._file.read_into(data[place : place + inner], offset + index * step)
                between = inner // size
            found = torch.frombuffer(data, dtype=into.dtype)
            shape = [end - begin if d == top else n for d, n in enumerate(into.shape)]
            steps = [between if d == top else stride for d, stride in enumerate(strides)]
            into.narrow(top, begin, end - begin).copy_(found.as_strided(shape, steps))


def _reach(shape: tuple[int, ...] | list[int], strides: tuple[int, ...] | list[int]) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1


def _is_dense(shape: list[int], strides: list[int], size: int) -> bool:
    """Whether no gap between the elements is longer than a page."""
    reach = size
    for stride, n in sorted(zip(strides, shape, strict=True)):
        if stride * size > reach + PAGE_BYTES:
            return False
        reach += (n - 1) * stride * size
    return True


def _mover(dtype: DType) -> torch.dtype:
    """Returns a dtype of the same width that torch can copy, even if torch does not know the source's own dtype."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[dtype.element_bytes]


def _carry_out(lazy: str, out: memoryview, dtype: DType) -> None:
    """Carries out the operation that torch had delayed: negates the numbers, or the imaginary parts."""
    import torch

    numbers = torch.frombuffer(out, dtype=dtype.component.torch)
    (numbers[1::2] if lazy == "conjugated" else numbers).neg_()
