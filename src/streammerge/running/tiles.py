"""Weighted sums of several outputs in tiles: inputs are converted once, and each output is summed from the CPU's own cache.

The operations on a number, and their order, are those of each output's kernel, so the results are the same to the bit.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Slot
from streammerge.methods.linear import Combination
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

TILE_BYTES = 5 << 18
"""Memory for the tiles of all inputs, a sum and a product: about the half of a core's cache of the second level."""
_MOST_ELEMS, _LEAST_ELEMS = 1 << 15, 1 << 11
_SUM: Slot = ("sum",)
_PRODUCT: Slot = ("product",)
_SOURCE = "source"


Summed = tuple[Combination, Sequence[int], "int | None"]
"""The kernel of an output, and the numbers of its models and of its base among all sources. The base is None without a
weight."""


class Tiles:
    """Memory for tiles. A slot is taken when it is first asked for."""

    def __init__(self) -> None:
        self._memory = memoryview(mmap.mmap(-1, TILE_BYTES))
        self._begins: dict[Slot, int] = {}
        self._elems = 0

    def fit(self, sources: int) -> bool:
        """Divides the memory for so many sources. Returns whether there is room for tiles that are worth it."""
        self._begins.clear()
        most = TILE_BYTES // 8 // (sources + 3)  # 3: the sum, a product, and numbers on their way to the compute dtype
        self._elems = min(most, _MOST_ELEMS) // _LEAST_ELEMS * _LEAST_ELEMS
        return self._elems > 0

    def get(self, slot: Slot, dtype: torch.dtype, elems: int) -> torch.Tensor:
        """Returns the memory of a slot, for a :class:`Chunk` of a tile."""
        import torch

        begin = self._begins.setdefault(slot, len(self._begins) * self._elems * 8)
        return torch.frombuffer(self._memory[begin : begin + elems * dtype.itemsize], dtype=dtype)

    def sums(
        self,
        start: int,
        stop: int,
        compute: torch.dtype,
        read: Callable[[int, int, int], torch.Tensor],
        kernels: Sequence[Summed],
        outs: Sequence[torch.Tensor],
    ) -> list[bool]:
        """Computes elements ``start`` to ``stop`` of each output, and rounds them into its memory in ``outs``. Returns for
        each whether all its numbers are certainly finite."""
        finite = [True] * len(outs)
        for a, b in ((start + a, start + b) for a, b in ranges(stop - start, self._elems)):
            chunk = Chunk(a, b, compute, self, read, based=False, models=0)
            total, product = chunk.empty(_SUM), chunk.empty(_PRODUCT)
            loaded: dict[int, torch.Tensor] = {}
            largest: dict[int, float] = {}
            for number, ((kernel, models, base), out) in enumerate(zip(kernels, outs, strict=True)):
                sources = models if base is None else (*models, base)
                for source in sources:
                    if source not in loaded:
                        loaded[source] = chunk.load(source, (_SOURCE, source))
                        largest[source] = _norm(loaded[source])
                values = [loaded[source] for source in models]
                made = kernel.of(values, None if base is None else loaded[base], total, product)
                out[a - start : b - start].copy_(made)
                finite[number] &= kernel.bound([largest[source] for source in sources]) < _largest(out.dtype)
        return finite


def _norm(values: torch.Tensor) -> float:
    """Returns a number that no magnitude exceeds; NaN or infinity if the values hold any."""
    import torch

    return math.sqrt(torch.dot(values, values).item()) if values.numel() else 0.0


def _largest(dtype: torch.dtype) -> float:
    """Returns a number that a dtype can hold, and a part of its largest."""
    import torch

    return torch.finfo(dtype).max / 4 if dtype.is_floating_point else 0.0
