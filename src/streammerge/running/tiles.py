"""Weighted sums of several outputs in tiles: inputs are converted once, and outputs are summed from the CPU's own cache.

The operations on a number, and their order, are those of each output's kernel, so the results are the same to the bit.
Compiled functions make them where the package has these. Else one call of torch works on several outputs, since for tiles
that a core's own cache holds, calling torch costs as much as computing.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Slot
from streammerge.kernels.places import dtype_of
from streammerge.methods.linear import Combination, Combinations
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

TILE_BYTES = 3 << 20
"""Memory for the tiles of all inputs, and of a few sums."""
_MOST_ELEMS, _LEAST_ELEMS = 1 << 14, 1 << 11
"""With more elements, the sums and a few inputs leave a core's own cache: 65,536 took half as long again."""
_AT_ONCE = 4
"""So many outputs are made at once."""
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
        slots = sources + 1  # 1: numbers on their way to the compute dtype
        most = TILE_BYTES // 8 // (slots + _AT_ONCE)
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
        import torch

        made = self._compiled_sums(start, stop, read, kernels, outs) if compute == torch.float64 else None
        return self._sums(start, stop, compute, read, kernels, outs) if made is None else made

    def _compiled_sums(
        self,
        start: int,
        stop: int,
        read: Callable[[int, int, int], torch.Tensor],
        kernels: Sequence[Summed],
        outs: Sequence[torch.Tensor],
    ) -> list[bool] | None:
        """Does the same by compiled functions, in float64. Returns None if they do not know a dtype, and where a number is
        not finite, whose bits are torch's."""
        import numpy as np

        from streammerge.compiled.numbers import known
        from streammerge.compiled.sums import MOST_SOURCES, TILES_ELEMS, CompiledSums

        memory = np.frombuffer(self._memory, np.float64, TILES_ELEMS)
        for sources, numbers in self._groups(kernels, len(kernels)):
            held, own = [read(source, start, stop) for source in sources], [outs[number] for number in numbers]
            dtypes, out_dtypes = [dtype_of(each) for each in held], [dtype_of(each) for each in own]
            if len(held) > MOST_SOURCES or not known([*dtypes, *out_dtypes]):
                return None
            chosen = [kernels[number][0] for number in numbers]
            weights = [(*each.weights, each.of_base) if each.of_base else each.weights for each in chosen]
            sums = CompiledSums(weights, [each.quotient for each in chosen], dtypes, out_dtypes, memory)
            if not all(sums.put([each.data_ptr() for each in held], [each.data_ptr() for each in own], stop - start)):
                return None
        return [True] * len(outs)

    def _sums(
        self,
        start: int,
        stop: int,
        compute: torch.dtype,
        read: Callable[[int, int, int], torch.Tensor],
        kernels: Sequence[Summed],
        outs: Sequence[torch.Tensor],
    ) -> list[bool]:
        import torch

        groups = [
            (sources, numbers, _joined(kernels, numbers, compute)) for sources, numbers in self._groups(kernels, _AT_ONCE)
        ]
        parts = [torch.split(out, self._elems) for out in outs]
        wanted = sorted({source for sources, _, _ in groups for source in sources})
        magnitudes: dict[int, list[float]] = {source: [] for source in wanted}
        memory = torch.frombuffer(self._memory[-_AT_ONCE * self._elems * 8 :], dtype=compute)
        rows = dict[tuple[int, int], tuple[torch.Tensor, list[torch.Tensor]]]()
        for tile, (a, b) in enumerate(ranges(stop - start, self._elems)):
            chunk = Chunk(start + a, start + b, compute, self, read, based=False, models=0)
            loaded = {source: chunk.load(source, (_SOURCE, source)) for source in wanted}
            for source, values in loaded.items():
                magnitudes[source].append(_norm(values))
            for sources, numbers, joined in groups:
                shape = len(numbers), b - a
                if shape not in rows:
                    totals = memory[: shape[0] * shape[1]].view(shape)
                    rows[shape] = totals, list(totals.unbind())
                joined([loaded[source] for source in sources], *rows[shape])
                torch._foreach_copy_([parts[number][tile] for number in numbers], rows[shape][1])
        largest = {source: _largest_of(found) for source, found in magnitudes.items()}
        finite = [False] * len(outs)
        for sources, numbers, _ in groups:
            for number in numbers:
                bound = kernels[number][0].bound([largest[source] for source in sources])
                finite[number] = bound < _limit(outs[number].dtype)
        return finite

    def _groups(self, kernels: Sequence[Summed], most: int) -> list[tuple[tuple[int, ...], list[int]]]:
        """Returns the numbers of up to ``most`` outputs that are made at once, with the sources that they sum, in their
        order."""
        alike: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
        for number, (kernel, models, base) in enumerate(kernels):
            sources = tuple(models) if base is None else (*models, base)
            alike.setdefault((sources, base is None, kernel.divisor == 1), []).append(number)
        return [
            (sources, numbers[begin : begin + most])
            for (sources, _, _), numbers in alike.items()
            for begin in range(0, len(numbers), most)
        ]


def _joined(kernels: Sequence[Summed], numbers: Sequence[int], compute: torch.dtype) -> Combinations:
    return Combinations([kernels[number][0] for number in numbers], compute)


def _norm(values: torch.Tensor) -> float:
    """Returns a number that no magnitude exceeds; NaN or infinity if the values hold any."""
    import torch

    return math.sqrt(torch.dot(values, values).item()) if values.numel() else 0.0


def _largest_of(magnitudes: Sequence[float]) -> float:
    """Returns the largest, or NaN if one is not finite."""
    return max(magnitudes, default=0.0) if all(map(math.isfinite, magnitudes)) else math.nan


def _limit(dtype: torch.dtype) -> float:
    """Returns a number that a dtype can hold, and a part of its largest."""
    import torch

    return torch.finfo(dtype).max / 4 if dtype.is_floating_point else 0.0
