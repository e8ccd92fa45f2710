"""One chunk of a group: the numbers of every model in a range of elements, and the bounds of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from streammerge.kernels import agreed
from streammerge.kernels.ranking import has_nan, sort_keys
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

Kernel = Callable[["Chunk"], "torch.Tensor"]
"""Makes one chunk of the output from a chunk of the inputs."""
T = TypeVar("T")
Answer = TypeVar("Answer")
Answer_co = TypeVar("Answer_co", covariant=True)
Look = Callable[["Chunk"], Iterable["torch.Tensor"]]
"""What a method wants to know of a chunk, such as the magnitudes of its numbers. It is made where the method is bound."""
_SAMPLE_SPAN = 1 << 11
Slot = str | tuple[object, ...]
"""The name of a buffer. A method names its buffers by text. The names that this package takes for itself are tuples, which
no text equals."""
OPERAND: Slot = ("operand",)
"""The slot of :meth:`Chunk.load` and :meth:`Chunk.delta` if none is given."""
SCRATCH: Slot = ("scratch",)
"""The slot in which a pass compares the numbers that a look yields."""
_BASE: Slot = ("base",)
_WIDEN: Slot = ("widen",)
_KEPT: Slot = ("kept",)
_KEYS: Slot = ("keys",)


def shown(slot: Slot) -> str:
    """Returns the name of a slot for messages."""
    return slot if isinstance(slot, str) else " ".join(map(str, slot))


class Buffers(Protocol):
    """Memory for a chunk: ``get`` returns ``elems`` numbers of a dtype in the named slot."""

    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor: ...


class Step(Protocol[Answer_co]):
    """Makes one answer of what ``look`` finds in the chunks of a piece.

    A step is plain data that can be pickled: a worker in another process binds the method itself, which gives it the look,
    and is sent the step.
    """

    def __call__(self, look: Look, chunks: Iterable[Chunk], /) -> Answer_co: ...


class Sweep(Protocol):
    """Takes a step over each piece of elements ``start`` to ``stop``, maybe on several workers at once.

    Yields the answers in the order of the pieces. ``sparse``: the chunks are a sample, short spans of elements of which
    one is taken from so many.
    """

    def __call__(self, look: Look, step: Step[T], start: int, stop: int, sparse: int = 0) -> Iterator[T]: ...


class Swept(Protocol):
    """The fields of :class:`~streammerge.kernels.group.TensorGroup` that a pass needs."""

    def hiding(self) -> Swept: ...
    @property
    def elems(self) -> int: ...
    @property
    def grain(self) -> int: ...
    @property
    def row(self) -> int: ...
    @property
    def models(self) -> int: ...
    @property
    def compute(self) -> torch.dtype: ...
    @property
    def sweep(self) -> Sweep: ...


class Chunk:
    """Elements ``start`` to ``stop`` of every model's tensor, in C order.

    ``models[i]`` and ``base`` are 1-d tensors in the compute dtype, each in its own memory. The built-in methods use
    named buffers instead, which are reused: ``load(i, slot)`` and ``delta(i, slot)`` may be changed, and are valid
    until the same slot is requested again. ``raw(i)`` has the model's own dtype and is valid until the next but one
    call. It is read-only: it may be mapped pages of a file, and a process that writes to them is ended by the system.

    ``hides``: whether agreed infinities and NaN are loaded as zero (:mod:`streammerge.kernels.agreed`). ``stays``: whether
    what is read of a source stays valid for the whole chunk.
    """

    def __init__(
        self,
        start: int,
        stop: int,
        compute: torch.dtype,
        buffers: Buffers,
        read: Callable[[int, int, int], torch.Tensor],
        based: bool,
        models: int,
        hides: bool = False,
        stays: Callable[[int], bool] | None = None,
    ) -> None:
        self.start, self.stop = start, stop
        self.compute, self.hides, self._stays = compute, hides, stays
        self._buffers, self._read, self._count = buffers, read, models
        self._first = int(based)
        self._base: torch.Tensor | None = None
        self._taken: dict[tuple[Slot, torch.dtype], torch.Tensor] = {}
        self._models: list[torch.Tensor] | None = None

    def hiding(self) -> Chunk:
        """Returns the same chunk in the same buffers, without its agreed elements."""
        return Chunk(
            self.start, self.stop, self.compute, self._buffers, self._read, self._first > 0, self._count, hides=True
        )  # what stays is not asked for, since it is not hidden there

    def blocks(self, elems: int) -> Iterator[Chunk]:
        """Yields the chunk in parts of so many elements, which use the begin of its buffers. What was taken of these is
        lost."""
        if self.elems <= elems:
            yield self
            return
        for a, b in ranges(self.elems, elems):
            span = (self.start + a, self.start + b)
            based = self._first > 0
            yield Chunk(*span, self.compute, self._buffers, self._read, based, self._count, self.hides, self._stays)

    def settle(self, kernel: Kernel, row: int, out: torch.Tensor) -> int:
        """Puts agreed elements into the kernel's result for this chunk. Returns how many. See :func:`agreed.settle`."""
        sources = self._count + self._first
        return agreed.settle(out, self._read, sources, self.start, row, lambda: kernel(self.hiding()))

    def agreed_elems(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yields the agreed elements block by block. See :func:`agreed.agreed`."""
        return agreed.agreed(self._read, self._count + self._first, self.start, self.stop)

    @property
    def elems(self) -> int:
        return self.stop - self.start

    @property
    def based(self) -> bool:
        """Whether there is a base."""
        return self._first > 0

    @property
    def models(self) -> list[torch.Tensor]:
        """The numbers of every model, loaded once."""
        if self._models is None:
            self._models = [self.load(model, ("model", model)) for model in range(self._count)]
        return self._models

    @property
    def base(self) -> torch.Tensor:
        """The numbers of the base; read-only."""
        return self.base_as(self.compute)

    def base_as(self, dtype: torch.dtype) -> torch.Tensor:
        if self._base is None or self._base.dtype != dtype:
            self._base = self._widened(-1, _BASE, dtype)
        return self._base

    def load(self, model: int, slot: Slot = OPERAND, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the model's numbers, in the compute dtype unless ``dtype`` is given."""
        return self._widened(model, slot, dtype or self.compute)

    def delta(self, model: int, slot: Slot = OPERAND, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns the model's numbers minus the base's."""
        dtype = dtype or self.compute
        return self._widened(model, slot, dtype).sub_(self.base_as(dtype))

    def raw(self, model: int) -> torch.Tensor:
        return self._read(model + self._first, self.start, self.stop)

    def held(self) -> list[torch.Tensor] | None:
        """Returns what :meth:`raw` gives of all sources, the base first, if all of it stays valid and nothing is hidden."""
        sources = range(self._count + self._first)
        if self.hides or self._stays is None or not all(map(self._stays, sources)):
            return None
        return [self._read(source, self.start, self.stop) for source in sources]

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """Copies raw numbers so that they stay valid for the whole chunk. There is room for one copy."""
        return self.empty(_KEPT, values.dtype).copy_(values)

    def empty(self, slot: Slot, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Returns an uninitialised buffer with one number per element."""
        dtype = dtype or self.compute
        known = self._taken.get((slot, dtype))
        if known is None:
            known = self._taken[slot, dtype] = self._buffers.get(slot, dtype, self.stop - self.start)
        return known

    def zeros(self, slot: Slot) -> torch.Tensor:
        return self.empty(slot).zero_()

    def sort_keys(self, values: torch.Tensor, signed: bool) -> torch.Tensor:
        """Returns integers in the order of the values, NaN as the largest; for values that are not ``signed``, these are
        their bits."""
        import torch

        width = torch.int64 if values.dtype == torch.float64 else torch.int32
        flat = values.reshape(-1)
        if not signed:
            return flat.view(width)
        keys = sort_keys(flat, self.empty(_KEYS, width))
        return keys.masked_fill_(flat.isnan(), torch.iinfo(width).max) if has_nan(flat) else keys

    def _widened(self, model: int, slot: Slot, dtype: torch.dtype) -> torch.Tensor:
        import torch

        raw = self.raw(model)
        if dtype == torch.float64 and raw.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            # torch converts half and fp8 to double one element at a time. The way over float32 is exact and faster.
            raw = self.empty(_WIDEN, torch.float32).copy_(raw)
        values = self.empty(slot, dtype).copy_(raw)
        if self.hides:
            agreed.blank(values, self._read, self._count + self._first, self.start, self.stop)
        return values


def whole_rows(elems: int, row: int) -> int:
    """Returns the largest number of elements, up to ``elems``, that is whole rows; at least one row."""
    return max(elems // max(row, 1), 1) * max(row, 1)


def whole_grains(elems: int, row: int) -> int:
    """Returns the largest number of elements, up to ``elems``, that is whole grains; at least one grain."""
    return whole_rows(elems, whole_rows(GRAIN, row))


def chunk_spans(start: int, stop: int, elems: int, row: int, sparse: int = 0) -> Iterator[tuple[int, int]]:
    """Yields the bounds of chunks of at most ``elems`` elements in whole grains; with ``sparse``, of one short span in
    ``sparse``."""
    if (
        not sparse and 0 < stop - start <= GRAIN // 2
    ):  # nearly all tensors; whole rows of up to a grain are at least half of it
        yield start, stop
        return
    span = whole_rows(_SAMPLE_SPAN, row) if sparse else whole_grains(elems, row)
    for a, b in ranges(stop - start, span * max(sparse, 1)):
        yield start + a, start + min(a + span, b)


@dataclass(frozen=True, slots=True, eq=False)
class Hiding(Generic[Answer]):
    """Takes a step over chunks without their agreed elements."""

    step: Step[Answer]

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> Answer:
        return self.step(look, (chunk.hiding() for chunk in chunks))
