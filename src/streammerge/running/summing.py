"""Weighted sums of many models: a block of every model is read, and a product with the weights gives the sums.

A product is several times as fast as a product and a sum for each model, but adds in another order, and so has other last
bits. So it is a proposal. The exact sum, the proposal and the kernel's own sum lie closer together than a bound. Rounding
is monotone: if the bound's two ends round to one number, the kernel's sum does too. The few other elements are computed by
the kernel itself. So every byte is the kernel's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from streammerge.kernels.chunk import Buffers, Chunk
from streammerge.methods.linear import Combination
from streammerge.planning.summed import sizes, summed_bytes
from streammerge.running.computing import KernelMaker
from streammerge.tensors.dtypes import DType
from streammerge.tensors.spec import GRAIN, ranges

if TYPE_CHECKING:
    import torch

    from streammerge.running.workspace import Outgoing
    from streammerge.stores.base import Input

_MOST_UNSURE_BYTES = 256 << 10
_SMALLEST = 1e-290
"""A bound above this is not touched by what products lose that are too small for float64."""
_UNIT = 2.0**-53
"""The relative error of one operation."""


def by_products(maker: KernelMaker, memory: memoryview, buffers: Buffers, source: Sources) -> ProductMaker | None:
    """Returns what makes the sums of a task (:func:`is_summed`) in this memory. None if its kernel is no sum that products
    can propose. ``maker``: calls the kernel."""
    kernel, task = maker.kernel, maker.task
    if not isinstance(kernel, Combination) or not kernel.divisor:
        return None
    dtype = task.sources[0].spec.dtype
    if summed_bytes(len(kernel.weights) + bool(kernel.of_base), dtype.element_bytes) > len(memory):
        return None
    return ProductMaker(Summing(kernel, dtype, task.based, memory, buffers, source), maker)


class ProductMaker:
    """Makes sums by products. What is not finite is settled by the kernel's maker."""

    def __init__(self, sums: Summing, kernel: KernelMaker) -> None:
        self._sums, self._kernel = sums, kernel
        self.nonfinite, self.spans = kernel.nonfinite, kernel.spans

    def put(self, start: int, stop: int, outgoing: Outgoing) -> memoryview:
        import torch

        chunk, dtype = self._kernel.chunk(start, stop), self._kernel.task.out.dtype
        part = outgoing.room((stop - start) * dtype.element_bytes)
        out = torch.frombuffer(part, dtype=dtype.torch)
        if not self._sums.sums(start, stop, out):
            self._kernel.count(out, chunk)
        return part


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
        """Elements of the present chunk whose sums are not sure, and the numbers that they are made of. They wait, since
        few cost as much as many."""
        self._unsure_bytes = 0

    def sums(self, start: int, stop: int, out: torch.Tensor) -> bool:
        """Computes elements ``start`` to ``stop``, rounded into ``out``. Returns whether all are finite for certain."""
        import torch

        limit, finite, size = torch.finfo(out.dtype).max / 4, True, self._dtype.element_bytes
        places = [self._source.place(row + self._first, start, stop) for row in range(self._count)]
        for a, b in ranges(stop - start, self._elems):
            nbytes, begin, together = (b - a) * size, 0, 0
            for row, place in enumerate(places):
                part = self._rows[begin : begin + nbytes]
                begin += nbytes
                if place is None:
                    self._source.fill(row + self._first, start + a, start + b, part)
                else:
                    place[0].read_into(part, place[1] + a * size)
                together |= _any_bits(part)  # now, while the core's own cache holds it
            most = self._all * _largest(together, self._rows[:begin], self._dtype)
            self._block(self._rows[:begin], most, out[a:b], a)
            finite = finite and most < limit
            if self._unsure_bytes > _MOST_UNSURE_BYTES:
                self._settle(out)
        self._settle(out)
        return finite

    def _block(self, rows: memoryview, most: float, out: torch.Tensor, begin: int) -> None:
        """Rounds the sums of a block, which begins at an element of the chunk, into ``out``. No magnitude of a sum exceeds
        ``most``."""
        import torch

        elems = len(out)
        raw = torch.frombuffer(rows, dtype=self._dtype.torch).view(self._count, elems)
        error = (2 * self._count + 16) * _UNIT * most
        if not _SMALLEST < error < math.inf:
            self._exact(raw, out)
            return
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
        differ = out.view(bits).numpy() != upper.view(bits).numpy()
        unsure = torch.from_numpy(differ.nonzero()[0])
        nbytes = len(unsure) * self._count * self._dtype.element_bytes
        if 8 * len(unsure) > elems or nbytes > _MOST_UNSURE_BYTES:
            self._exact(raw, out)
        elif len(unsure):
            self._unsure.append((unsure + begin, raw.index_select(1, unsure)))
            self._unsure_bytes += nbytes

    def _settle(self, out: torch.Tensor) -> None:
        """Puts the kernel's own sums where products are not sure, into the results of a chunk."""
        import torch

        if self._unsure:
            where = torch.cat([elems for elems, _ in self._unsure])
            made = torch.empty(len(where), dtype=out.dtype)
            self._exact(torch.cat([numbers for _, numbers in self._unsure], 1), made)
            out[where] = made
        self._unsure.clear()
        self._unsure_bytes = 0

    def _exact(self, raw: torch.Tensor, out: torch.Tensor) -> None:
        """Rounds the kernel's own sums into ``out``."""
        import torch

        def read(source: int, start: int, stop: int) -> torch.Tensor:
            return raw[source - self._first, start:stop]

        for a, b in ranges(len(out), GRAIN):
            chunk = Chunk(a, b, torch.float64, self._buffers, read, self._based, self._models)
            out[a:b].copy_(self._kernel(chunk))


def _any_bits(octets: memoryview) -> int:
    """Returns the bits that any eight bytes have."""
    import numpy as np

    words = len(octets) // 8 * 8
    found = int(np.bitwise_or.reduce(np.frombuffer(octets[:words], np.uint64))) if words else 0
    return found | int.from_bytes(octets[words:], "little") if words < len(octets) else found


def _largest(together: int, rows: memoryview, dtype: DType) -> float:
    """Returns a number that no magnitude exceeds; infinity or NaN if there is one. ``together``: the bits that any eight
    bytes have. Magnitudes are ordered as their bits are, and no number is larger than the one that has the bits of all."""
    import numpy as np

    width = 8 * dtype.element_bytes
    mask, bits = (1 << width - 1) - 1, 0
    while together:
        bits |= together & mask
        together >>= width
    found = _number(bits, dtype)
    if math.isfinite(found):
        return found
    positive = int(np.frombuffer(rows, f"int{width}").max())
    negative = int(np.frombuffer(rows, f"uint{width}").max()) & mask
    return _number(max(positive, negative), dtype)


def _number(bits: int, dtype: DType) -> float:
    import torch

    return float(torch.tensor([bits], dtype=getattr(torch, f"int{8 * dtype.element_bytes}")).view(dtype.torch).double())
