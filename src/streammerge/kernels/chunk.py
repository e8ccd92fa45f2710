"""One chunk of a group: the numbers of every model at some elements, and where chunks begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from streammerge.kernels.ranking import sort_keys
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

Kernel = Callable[["Chunk"], "torch.Tensor"]
"""Makes one chunk of the output from a chunk of the inputs."""
T = TypeVar("T")
_SAMPLE_SPAN = 1 << 11


class Buffers(Protocol):
    """Memory that a chunk may use: ``get`` returns ``elems`` numbers of a dtype in the named slot."""

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor: ...


class Sweep(Protocol):
    """Runs ``work`` on the chunks of each piece of elements ``start`` to ``stop``, maybe on several workers at once,
    and yields what it returns in the order of the pieces. ``sparse``: only
    one of so many short spans of elements is given, for a sample."""

    def __call__(self, work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]: ...


class Swept(Protocol):
    """What a pass needs to know of a group: the fields of :class:`~streammerge.kernels.group.TensorGroup`."""

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

    ``models[i]`` and ``base`` are the numbers in the compute dtype, each in memory of its own. The methods that come
    with the package use named buffers instead, which are used again and again: ``load(i, slot)`` and ``delta(i,
    slot)`` are valid until the same slot is asked for again, and may be changed; ``raw(i)`` are the numbers in their
    own dtype, valid until the next but one call.
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
    ) -> None:
        self.start, self.stop = start, stop
        self.compute = compute
        self._buffers, self._read, self._count = buffers, read, models
        self._first = int(based)
        self._base: torch.Tensor | None = None
        self._models: list[torch.Tensor] | None = None

    @property
    def elems(self) -> int:
        return self.stop - self.start

    @property
    def models(self) -> list[torch.Tensor]:
        """Every model's numbers, loaded once."""
        if self._models is None:
            self._models = [self.load(model, f"model {model}") for model in range(self._count)]
        return self._models

    @property
    def base(self) -> torch.Tensor:
        """The base's numbers, not to be changed."""
        return self.base_as(self.compute)

    def base_as(self, dtype: torch.dtype) -> torch.Tensor:
        if self._base is None or self._base.dtype != dtype:
            self._base = self._widened(-1, "base", dtype)
        return self._base

    def load(self, model: int, slot: str = "operand", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The model's numbers, in the compute dtype unless another is named."""
        return self._widened(model, slot, dtype or self.compute)

    def delta(self, model: int, slot: str = "operand", dtype: torch.dtype | None = None) -> torch.Tensor:
        """The model's numbers less the base's."""
        dtype = dtype or self.compute
        return self._widened(model, slot, dtype).sub_(self.base_as(dtype))

    def raw(self, model: int) -> torch.Tensor:
        return self._read(model + self._first, self.start, self.stop)

    def keep(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of raw numbers that stays valid for the whole chunk; there is room for one."""
        return self.empty("first", values.dtype).copy_(values)

    def empty(self, slot: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A buffer for one number per element, holding anything."""
        return self._buffers.get(slot, dtype or self.compute, self.elems)

    def zeros(self, slot: str) -> torch.Tensor:
        return self.empty(slot).zero_()

    def sort_keys(self, values: torch.Tensor, signed: bool) -> torch.Tensor:
        """Integers in the order of the values; without a sign, the bits are."""
        import torch

        width = torch.int64 if values.dtype == torch.float64 else torch.int32
        flat = values.reshape(-1)
        return sort_keys(flat, self.empty("keys", width)) if signed else flat.view(width)

    def _widened(self, model: int, slot: str, dtype: torch.dtype) -> torch.Tensor:
        import torch

        raw = self.raw(model)
        if dtype == torch.float64 and raw.dtype not in (torch.bfloat16, torch.float32, torch.float64):
            # torch converts half and fp8 to double element by element; by way of float32 it is exact and faster.
            raw = self.empty("widen", torch.float32).copy_(raw)
        return self.empty(slot, dtype).copy_(raw)


def whole_rows(elems: int, row: int) -> int:
    """The most elements, up to ``elems``, that are whole rows; one row at least."""
    return max(elems // max(row, 1), 1) * max(row, 1)


def whole_grains(elems: int, row: int) -> int:
    """The most elements, up to ``elems``, that are whole grains; one grain at least."""
    return whole_rows(elems, whole_rows(GRAIN, row))


def chunk_spans(start: int, stop: int, elems: int, row: int, sparse: int = 0) -> Iterator[tuple[int, int]]:
    """Where the chunks of so many ``elems`` begin and end, grains whole; or one of so many ``sparse`` short ones."""
    span = whole_rows(_SAMPLE_SPAN, row) if sparse else whole_grains(elems, row)
    for a, b in ranges(stop - start, span * max(sparse, 1)):
        yield start + a, start + min(a + span, b)
