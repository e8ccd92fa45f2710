"""A merge of other sources as a source: another merge's input, computed chunk by chunk and never stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError, printable
from streammerge.kernels.agreed import AGREED, finite, origins
from streammerge.kernels.chunk import Chunk, Kernel, Look, Slot, Step, T, chunk_spans, shown, whole_grains
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.ranking import held_bytes
from streammerge.methods.contracts import MergeMethod, Values
from streammerge.sources.base import Needs, Reader, Room, Source, region_bytes
from streammerge.sources.stored import Stored
from streammerge.sources.turned import turned, turned_back, turned_spec
from streammerge.stores.libc import return_large_blocks
from streammerge.stores.spilled import SpillFile
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, PIECE_ELEMS, TensorSpec, ranges

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Merged(Source):
    """The merge of ``sources``, rounded to the dtype of ``spec``. The compute dtype as dtype of ``spec`` rounds nothing.

    ``based``: whether the first source is the base. ``parameters``: the method's parameters, resolved for these models.
    ``drawn_as``: the tensor name that random numbers depend on. :func:`merged` makes it. Each number equals the number in a
    merge of the sources into a file.
    """

    spec: TensorSpec
    method: MergeMethod
    sources: tuple[Source, ...]
    parameters: Values = field(default_factory=dict)
    compute: str = "float32"
    based: bool = False
    seed: int = 0
    drawn_as: str = ""
    turned: bool = False

    def needs(self) -> Needs:
        models = [source.spec.dtype.component for source in self.sources]
        compute_bytes, buffers = self.method.buffers_for(models, self.compute, self.based)
        scratch = region_bytes(compute_bytes * self.span) * buffers
        scratch += 2 * region_bytes(max(dtype.element_bytes for dtype in models) * self.span)
        scratch += region_bytes(self.spec.dtype.component.element_bytes * self.span)
        held = self.method.held_bytes(self.row, len(models))
        held += self.method.whole_bytes(self.shape, len(models) - self.based, self.parameters, self.turned)
        passes = held_bytes(self.spec.component_elems, self.method.searches * len(models))
        needed = Needs(scratch_bytes=scratch, held_bytes=held, computes=True, passes_bytes=passes)
        for source in self.sources:
            needed += source.needs()
        return needed

    def open(self, room: Room) -> Reader:
        return _Reader(self, room)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the method sees. A turned tensor is a matrix."""
        shape = self.spec.component_shape
        return (math.prod(shape[:-1]), shape[-1]) if self.turned else shape

    @property
    def row(self) -> int:
        """Elements that the method needs in memory together."""
        return self.method.rows(self.shape, self.parameters)

    @property
    def span(self) -> int:
        """Elements that are computed at once: a grain, in whole rows."""
        return whole_grains(GRAIN, self.row)

    @property
    def dequantises(self) -> bool:
        return False  # its dtype is what the merge rounds to

    @property
    def place(self) -> tuple[object, ...]:
        method = (self.method.name, self.method.identity, repr(sorted(self.parameters.items())), self.compute, self.based)
        drawn = (self.seed, self.drawn_as or self.spec.name)
        return ("Merged", self.spec.dtype, self.spec.shape, *method, *drawn, *(source.place for source in self.sources))


def merged(
    name: str,
    method: MergeMethod,
    sources: Sequence[Source],
    parameters: dict[str, Any] | None = None,
    *,
    based: bool = False,
    dtype: DType | None = None,
    compute: str | None = None,
    seed: int = 0,
) -> Source:
    """Returns the merge of sources of one shape under the name ``name``. ``parameters``: as in a recipe, checked here.

    ``dtype``: of the result, by default the first source's. ``compute``: float32 or float64; by default float64 if a source
    is float64, else the method's own, as in a merge. Raises RecipeError for sources or parameters that do not fit.
    """
    first = sources[0].spec
    for source in sources:
        if source.spec.shape != first.shape or source.spec.dtype.kind != first.dtype.kind:
            raise RecipeError(
                f"{printable(name)}: {source.spec.dtype} {list(source.spec.shape)} cannot be merged with {first.dtype} "
                f"{list(first.shape)}"
            )
    if method.base == "required" and not based:
        raise RecipeError(f"{printable(name)}: {method.name} needs a base")
    values = method.resolve(parameters or {}, len(sources) - based)
    wide = any(source.spec.dtype in (DType.F64, DType.C128) for source in sources)
    compute = "float64" if wide else compute or method.compute
    spec = TensorSpec(name, dtype or first.dtype, first.shape)
    return by_columns(Merged(spec, method, tuple(sources), values, compute, based, seed, name))


def by_columns(source: Merged) -> Source:
    """Returns a merge that is computed turned if its method wants that, and as it is otherwise."""
    spec, turns = source.spec, source.method.turns
    if turns is None or spec.dtype.kind == "complex" or not turns(source.shape, source.parameters):
        return source
    parts = tuple(turned(each) for each in source.sources)
    return turned_back(replace(source, spec=turned_spec(spec), sources=parts, turned=True), spec)


def methods_in(source: Source) -> Iterator[MergeMethod]:
    """Yields the merge methods that a source computes with, at any depth of the expression."""
    if isinstance(source, Merged):
        yield source.method
    for part in source.parts:
        if part.__class__ is not Stored:  # nearly all are
            yield from methods_in(part)


class _Slots:
    """Named buffers for one chunk, each of ``slot_bytes``, taken one after the other."""

    def __init__(self, regions: list[memoryview]) -> None:
        self._regions, self._taken = regions, dict[Slot, int]()

    def clear(self) -> None:
        self._taken.clear()

    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor:
        import torch

        number = self._taken.setdefault(slot, len(self._taken))
        if number >= len(self._regions):
            raise ValueError(f"there is no room for the buffer {shown(slot)} beside {', '.join(map(shown, self._taken))}")
        return torch.frombuffer(self._regions[number], dtype=dtype, count=elems)


class _Reader(Reader):
    """Computes spans of the result. Sequential reading computes each span once.

    The kernel is made once for each tensor, before anything is read. Its passes read the inner sources from begin to end,
    grain by grain, so that the result does not depend on the order of reading.
    """

    def __init__(self, source: Merged, room: Room) -> None:
        import torch

        self._source, self._room = source, room
        self._readers = [each.open(room) for each in source.sources]
        self._dtypes = [each.spec.dtype.component for each in source.sources]
        self._torch = [dtype.torch for dtype in self._dtypes]
        self._compute = getattr(torch, source.compute)
        self._row, self._span = source.row, source.span
        compute_bytes, buffers = source.method.buffers_for(self._dtypes, source.compute, source.based)
        self._slots = _Slots([room.take(compute_bytes * self._span) for _ in range(buffers)])
        widest = max(dtype.element_bytes for dtype in self._dtypes)
        self._raw = [room.take(widest * self._span) for _ in range(2)]
        self._out = source.spec.dtype.component
        self._held = room.take(self._out.element_bytes * self._span)
        self._begin = self._end = self._next = 0
        self._kernel: Kernel | None = None
        self._parts = 2 if source.spec.dtype.kind == "complex" else 1
        self._elems = source.spec.component_elems
        room.first(self._made)

    def read(self, start: int, stop: int, out: memoryview) -> memoryview:
        kernel = self._kernel
        if kernel is None:
            self._room.prepare()
            kernel = self._made()
        start, stop, size = start * self._parts, stop * self._parts, self._out.element_bytes
        at = start
        while at < stop:
            if not self._begin <= at < self._end:
                begin = at // self._span * self._span
                end = min(begin + self._span, self._elems)
                if begin == at and end <= stop:
                    self._compute_span(kernel, begin, end, out[(at - start) * size : (end - start) * size])
                    at = end
                    continue
                self._begin = self._end = 0
                self._compute_span(kernel, begin, end, self._held[: (end - begin) * size])
                self._begin, self._end = begin, end
            end = min(stop, self._end)
            out[(at - start) * size : (end - start) * size] = self._held[
                (at - self._begin) * size : (end - self._begin) * size
            ]
            at = end
        return out

    def _made(self) -> Kernel:
        """Returns the kernel. Makes the passes where nobody has made them, after those of inner merges."""
        if self._kernel is None:
            self._kernel = self._room.once(self._source, self._bind)
        return self._kernel

    def _bind(self) -> Kernel:
        source = self._source
        if source.method.whole:
            return_large_blocks()
        models = len(source.sources) - source.based
        name = source.drawn_as or source.spec.name
        more = (source.based, self._row, source.seed)
        group = TensorGroup(
            name, source.shape, models, self._compute, self._sweep, *more, turned=source.turned, spills=SpillFile
        )
        return source.method.bind(group, source.parameters)

    def _sweep(self, look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
        """Sweeps piece by piece if a merge into a file would do so too, because the order of sums changes the result."""
        piece = whole_grains(PIECE_ELEMS, self._row) if self._source.method.row else PIECE_ELEMS
        if self._elems <= piece or self._source.method.whole:
            yield step(look, self._chunks(start, stop, sparse))
            return
        for begin, end in ranges(stop - start, piece):
            yield step(look, self._chunks(start + begin, start + end, sparse))

    def _chunks(self, start: int, stop: int, sparse: int = 0) -> Iterator[Chunk]:
        models = len(self._source.sources) - self._source.based
        for begin, end in chunk_spans(start, stop, self._span, self._row, sparse):
            self._room.halt()
            self._slots.clear()
            yield Chunk(begin, end, self._compute, self._slots, self._number, self._source.based, models)

    def _number(self, source: int, start: int, stop: int) -> torch.Tensor:
        """Returns raw numbers of an inner source. Valid until the next call but one."""
        import torch

        part = self._raw[self._next][: (stop - start) * self._dtypes[source].element_bytes]
        self._next ^= 1
        made = self._readers[source].read(start // self._parts, stop // self._parts, part)
        return torch.frombuffer(made, dtype=self._torch[source])

    def _compute_span(self, kernel: Kernel, start: int, stop: int, out: memoryview) -> None:
        import torch

        done = 0
        for chunk in self._chunks(start, stop):
            result = kernel(chunk)
            if result.numel() != chunk.elems:
                raise ValueError(f"the kernel made {result.numel()} numbers of a chunk of {chunk.elems}")
            part = out[done : done + chunk.elems * self._out.element_bytes]
            made = torch.frombuffer(part, dtype=self._out.torch).copy_(result.reshape(-1))
            if self._out.kind == "float" and not bool(finite(made).all()):
                self._settle(kernel, chunk, made)
            done += len(part)

    def _settle(self, kernel: Kernel, chunk: Chunk, made: torch.Tensor) -> None:
        """Puts agreed numbers into a result, and announces all that is not finite."""
        settled, inner = chunk.settle(kernel, self._row, made), self._source.sources
        if settled:
            self._room.met(AGREED, settled)
        for name, count in origins(made, settled, self._number, len(inner), chunk.start, lambda n: inner[n].origin):
            self._room.met(name, count)
