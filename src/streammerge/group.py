"""What a merge method sees: the same tensor of every model, as chunks of numbers. No file, offset or budget.

A method is a function from a :class:`TensorGroup` to a kernel; a kernel makes one chunk of the output from a
:class:`Chunk` of the inputs. Before it returns its kernel a method may look at the whole group in *passes*, each of
which streams all chunks and answers with something small: sums, a Gram matrix, an exact k-th largest number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from streammerge import order, sums
from streammerge.rng import uniform
from streammerge.select import Cut, sort_keys
from streammerge.tensors import GRAIN, ranges

if TYPE_CHECKING:
    import torch

Kernel = Callable[["Chunk"], "torch.Tensor"]
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


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """The same-named tensors of all models.

    ``models`` counts them, without the base that ``based`` says is there; ``shape`` is theirs. ``row`` elements belong
    together and are never parted between chunks. ``compute`` is the dtype of the arithmetic.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    compute: torch.dtype
    sweep: Sweep
    based: bool = False
    row: int = 1
    seed: int = 0

    @property
    def elems(self) -> int:
        return math.prod(self.shape)

    @property
    def grain(self) -> int:
        """Elements whose sum is taken at once: 2^16, or as many whole rows."""
        return whole_rows(GRAIN, self.row)

    def reduce(self, terms: Callable[[Chunk], Iterable[torch.Tensor]]) -> list[torch.Tensor]:
        """The sum over all chunks of each tensor that ``terms(chunk)`` yields, in float64.

        A tensor of the chunk's length gives a number; one of (rows, columns) the sum of each column. A sum is made of
        the partial sums of the grains, added in their order, piece by piece, and so does not depend on how it was run.
        """
        return sums.reduce(self, terms)

    def gram(self, deltas: bool = False) -> torch.Tensor:
        """The (models, models) matrix of inner products in float64; ``deltas``: of the models less the base, which are
        formed before they are multiplied."""
        return sums.gram(self, deltas)

    def kth_largest(
        self,
        values: Callable[[Chunk], Iterable[torch.Tensor]],
        ranks: Sequence[Sequence[int]],
        signed: bool = False,
    ) -> list[list[Cut]]:
        """Exact order statistics: for each tensor that ``values(chunk)`` yields, and each of its ranks, the cut that
        keeps so many of the largest; of equal numbers those with the lowest element indices.

        ``values`` are in the compute dtype, and not below zero unless ``signed``: magnitudes, mostly. A rank of 0 keeps
        nothing, one of all elements or more everything. With ``signed`` only the thresholds
        are found. Ranks within each row are
        :func:`streammerge.select.row_ranks`, since a row is always held whole.
        """
        return order.kth_largest(self, values, ranks, signed)

    def uniform(self, chunk: Chunk, model: int) -> torch.Tensor:
        """Numbers in [0, 1), float32, one for each element of the chunk: a function of seed, tensor name, model and
        element index."""
        import torch

        out = chunk.empty("uniform", torch.float32)
        return uniform(self.seed, self.name, model, chunk.start, out, chunk.empty("uniform bits", torch.int32))

    @classmethod
    def of(
        cls,
        *models: torch.Tensor,
        base: torch.Tensor | None = None,
        name: str = "tensor",
        seed: int = 0,
        row: int = 1,
        compute: torch.dtype | None = None,
        chunk_elems: int = GRAIN,
    ) -> TensorGroup:
        """A group of tensors in memory, to try a method without files: ``group.merged(slerp(group, t=0.3))``."""
        import torch

        sources = ([] if base is None else [base]) + list(models)
        wide = any(t.dtype == torch.float64 for t in sources)
        compute = compute or (torch.float64 if wide else torch.float32)
        flat = [tensor.detach().contiguous().reshape(-1) for tensor in sources]
        step, buffers = chunk_elems, _Allocated()

        def chunks(start: int, stop: int, sparse: int) -> Iterator[Chunk]:
            for a, b in list(chunk_spans(start, stop, step, row, sparse)) or [(0, 0)]:
                yield Chunk(
                    a,
                    b,
                    compute,
                    buffers,
                    lambda source, start, stop: flat[source][start:stop],
                    base is not None,
                    len(models),
                )

        def sweep(work: Callable[[Iterable[Chunk]], T], start: int, stop: int, sparse: int = 0) -> Iterator[T]:
            yield work(chunks(start, stop, sparse))

        return cls(name, tuple(sources[0].shape), len(models), compute, sweep, base is not None, row, seed)

    def merged(self, kernel: Kernel) -> torch.Tensor:
        """The whole tensor that a kernel makes, in the compute dtype. In memory: for trying a method."""
        import torch

        def work(chunks: Iterable[Chunk]) -> list[torch.Tensor]:
            return [kernel(chunk).reshape(-1).clone() for chunk in chunks]

        made = [chunk for piece in self.sweep(work, 0, self.elems) for chunk in piece]
        return torch.cat(made).reshape(self.shape) if made else torch.empty(self.shape, dtype=self.compute)


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


class _Allocated:
    """Buffers of a group in memory."""

    def __init__(self) -> None:
        self._slots: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(self, slot: str, dtype: torch.dtype, elems: int) -> torch.Tensor:
        import torch

        known = self._slots.get((slot, dtype))
        if known is None or len(known) < elems:
            known = self._slots[slot, dtype] = torch.empty(elems, dtype=dtype)
        return known[:elems]


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
