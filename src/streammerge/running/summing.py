"""Weighted sums of many models: a block of every model is read, and a product with the weights gives the sums.

A product is several times as fast as a product and a sum for each model, but adds in another order, and so has other last
bits. So it is a proposal. The exact sum, the proposal and the kernel's own sum lie closer together than a bound. Rounding
is monotone: if the bound's two ends round to one number, the kernel's sum does too. The few other elements are computed by
the kernel itself. So every byte is the kernel's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from streammerge.kernels.chunk import Buffers, Chunk, Kernel
from streammerge.methods.linear import Combination
from streammerge.planning.summed import sizes
from streammerge.planning.tasks import MergeTask
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

    from streammerge.stores.base import Input

_SMALLEST = 1e-290
"""A bound above this is not touched by what products lose that are too small for float64."""
_UNIT = 2.0**-53
"""The relative error of one operation."""


def summing(
    kernel: Kernel,
    task: MergeTask,
    memory: memoryview,
    buffers: Buffers,
    source: Sources,
) -> Summing | None:
    """Returns the way to make the sums of a task (:func:`is_summed`) in this memory. None if there is none."""
    if not isinstance(kernel, Combination) or not kernel.divisor:
        return None
    return Summing(kernel, task.sources[0].spec.dtype, task.based, memory, buffers, source)


class Sources(Protocol):
    """The numbers of a task's sources, as :class:`~streammerge.running.workspace.Inputs` has them."""

    def fill(self, source: int, start: int, stop: int, out: memoryview, /) -> None: ...
    def place(self, source: int, start: int, stop: int, /) -> tuple[Input, int] | None: ...


class Summing:
    """A kernel's sums of a task's sources. ``memory``: of :func:`~streammerge.planning.summed.summed_bytes`."""

    def __init__(
        self, kernel: Combination, dtype: DType, based: bool, memory: memoryview, buffers: Buffers, source: Sources
    ) -> None:
        import torch

        self._kernel, self._dtype, self._based, self._buffers = kernel, dtype, based, buffers
        self._source = source
        weights = ((kernel.of_base,) if kernel.of_base else ()) + kernel.weights
        self._count, self._models = len(weights), len(kernel.weights)
        self._first = int(based and not kernel.of_base)
        """The number of the first source that is summed."""
        self._weights = torch.tensor([w / kernel.divisor for w in weights], dtype=torch.float64)
        self._all = sum(map(abs, weights)) / abs(kernel.divisor)
        self._tile, self._elems = sizes(self._count, dtype.element_bytes)
        wide, sums = self._count * self._tile, self._elems
        doubles = torch.frombuffer(memory, dtype=torch.float64, count=wide + 2 * sums)
        self._wide = doubles[:wide].view(self._count, self._tile)
        self._sums, self._ends = doubles[wide : wide + sums], doubles[wide + sums :]
        upper = 8 * (wide + 2 * sums)
        self._upper, self._rows = memory[upper:], memory[upper + 4 * sums :]
        self._unsure: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Elements of the present chunk whose sums are not sure, and the numbers that they are made of."""

    def sums(self, start: int, stop: int, out: torch.Tensor) -> bool:
        """Computes elements ``start`` to ``stop``, rounded into ``out``. Returns whether all are finite for certain."""
        import torch

        limit, finite, size = torch.finfo(out.dtype).max / 4, True, self._dtype.element_bytes
        places = [self._source.place(row + self._first, start, stop) for row in range(self._count)]
        self._unsure.clear()
        for a, b in ranges(stop - start, self._elems):
            nbytes, begin = (b - a) * size, 0
            for row, place in enumerate(places):
                part = self._rows[begin : begin + nbytes]
                begin += nbytes
                if place is None:
                    self._source.fill(row + self._first, start + a, start + b, part)
                else:
                    place[0].read_into(part, place[1] + a * size)
            most = self._block(self._rows[:begin], out[a:b], a)
            finite = finite and most < limit
        if self._unsure:
            where = torch.cat([elems for elems, _ in self._unsure])
            made = torch.empty(len(where), dtype=out.dtype)
            self._exact(torch.cat([numbers for _, numbers in self._unsure], 1), made)
            out[where] = made
        return finite

    def _block(self, rows: memoryview, out: torch.Tensor, begin: int) -> float:
        """Rounds the sums of a block into ``out``, which begins at an element of the chunk. Returns what no magnitude of a
        result exceeds."""
        import torch

        elems = len(out)
        raw = torch.frombuffer(rows, dtype=self._dtype.torch).view(self._count, elems)
        most = self._all * _largest(rows, self._dtype)
        error = (2 * self._count + 16) * _UNIT * most
        if not _SMALLEST < error < math.inf:
            self._exact(raw, out)
            return most
        sums, ends = self._sums[:elems], self._ends[:elems]
        columns = self._wide.T
        for part, made in zip(torch.split(raw, self._tile, 1), torch.split(sums, self._tile), strict=True):
            if len(made) == self._tile:
                self._wide.copy_(part)
                torch.mv(columns, self._weights, out=made)
            else:
                wide = self._wide.view(-1)[: part.numel()].view(part.shape).copy_(part)
                torch.mv(wide.T, self._weights, out=made)
        upper = torch.frombuffer(self._upper, dtype=out.dtype, count=elems)
        out.copy_(torch.sub(sums, error, out=ends))
        upper.copy_(torch.add(sums, error, out=ends))
        bits = torch.int16 if out.element_size() == 2 else torch.int32
        unsure = (out.view(bits) != upper.view(bits)).nonzero().view(-1)
        if 8 * len(unsure) > elems:
            self._exact(raw, out)
        elif len(unsure):
            self._unsure.append((unsure + begin, raw.index_select(1, unsure)))
        return most

    def _exact(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Rounds the kernel's own sums into ``out``."""
        import torch

        def read(source: int, start: int, stop: int) -> torch.Tensor:
            return raw[source - self._first, start:stop]

        for a, b in ranges(len(out), GRAIN):
            chunk = Chunk(a, b, torch.float64, self._buffers, read, self._based, self._models)
            out[a:b].copy_(self._kernel(chunk))


def _largest(rows: memoryview, dtype: DType) -> float:
    """Returns a number that no magnitude exceeds; infinity or NaN if there is one. Magnitudes are ordered as their bits
    are."""
    import numpy as np
    import torch

    bits = 8 * dtype.element_bytes
    mask = (1 << bits - 1) - 1
    words = rows[: len(rows) // 8 * 8]
    together = int(np.bitwise_or.reduce(np.frombuffer(words, np.uint64))) if words else 0
    together |= int.from_bytes(rows[len(words) :], "little")
    largest = 0
    while together:  # the bits that any number has
        largest |= together & mask
        together >>= bits
    found = float(torch.tensor([largest], dtype=getattr(torch, f"int{bits}")).view(dtype.torch).double())
    if math.isfinite(found):
        return found
    positive = int(np.frombuffer(rows, f"int{bits}").max())
    negative = int(np.frombuffer(rows, f"uint{bits}").max()) & mask
    return float(torch.tensor([max(positive, negative)], dtype=getattr(torch, f"int{bits}")).view(dtype.torch).double())
