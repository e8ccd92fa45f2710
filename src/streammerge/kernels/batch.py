"""Small tensors of equal shape, computed together: one operation answers for all of them.

A call into torch or numpy takes as long as its work on a few thousand numbers. What a method asks of a whole tensor, such
as a sum or a k-th largest number, is found for each tensor by itself. So each result has the bytes that it has alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from streammerge.kernels.chunk import OPERAND, SCRATCH, Chunk, Slot
from streammerge.kernels.lanes import row_sums
from streammerge.kernels.ranking import Cut, keep_rows, select_rows
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

MOST_ELEMS = 1 << 17
"""Numbers of one input that are computed together. With four times as many, buffers leave the CPU's caches."""
MOST_EACH = GRAIN // 2
"""Numbers of a tensor that may be computed with others. One of up to so many is a single chunk and a single grain."""
_CHOSEN: Slot = ("chosen",)
_BITS: Slot = ("chosen bits",)


class Batch(NamedTuple):
    """Tensors of one shape that are neighbours in every input. ``chunk`` has the numbers of all, tensor by tensor.

    ``models`` is the number of models, without the base. See :class:`~streammerge.kernels.group.TensorGroup`.
    """

    names: Sequence[str]
    shape: tuple[int, ...]
    models: int
    seed: int
    chunk: Chunk

    @property
    def elems(self) -> int:
        """Number of elements of each tensor."""
        return math.prod(self.shape)

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """Views a buffer as one row for each tensor."""
        return values.view(len(self.names), -1)

    def column(self, numbers: Sequence[float]) -> torch.Tensor:
        """Returns one number for each tensor, which can be multiplied with :meth:`rows`."""
        import torch

        return torch.tensor(numbers, dtype=self.chunk.compute).unsqueeze(1)

    def sums(self, values: torch.Tensor) -> list[float]:
        """Returns the sum of each tensor's numbers, as :meth:`TensorGroup.reduce` does."""
        sums: list[float] = row_sums(self.rows(values)).tolist()
        return sums

    def grams(self, deltas: bool = False) -> list[list[list[float]]] | None:
        """Returns the matrix of inner products of each tensor, as :meth:`TensorGroup.gram` does. None if any number in them
        is not finite. What is still loaded: see :func:`~streammerge.kernels.reductions.products`."""
        from streammerge.kernels.reductions import matrix, products

        sums = [self.sums(values) for values in products(self.chunk, self.models, deltas)]
        if not all(math.isfinite(total) for of_pair in sums for total in of_pair):
            return None
        return [matrix(of_tensor, self.models) for of_tensor in zip(*sums, strict=True)]

    def cuts(self, values: torch.Tensor, ranks: Sequence[Sequence[int]], signed: bool = False) -> list[list[Cut]] | None:
        """Returns the cuts of each tensor's numbers, as :meth:`TensorGroup.kth_largest` does. ``ranks``: those of each
        tensor. None if any number is NaN."""
        wanted = [[rank for rank in sorted(set(of)) if 0 < rank < self.elems + signed] for of in ranks]
        if not any(wanted):
            return [[Cut(rank, everything=rank > 0) for rank in of] for of in ranks]
        found, nan = select_rows(self.rows(values), wanted, signed, self.chunk.empty(SCRATCH))
        if nan:
            return None
        known = [{cut.rank: cut for cut in cuts} for cuts in found]
        return [
            [one.get(rank) or Cut(rank, everything=rank > 0) for rank in of] for one, of in zip(known, ranks, strict=True)
        ]

    def keep_largest(self, values: torch.Tensor, ranks: Sequence[tuple[int, int]]) -> bool:
        """Keeps of each tensor so many numbers of the largest magnitudes, but not the first so many of these.

        ``ranks`` has both numbers of each tensor. Sets the others to zero. Returns False if a search meets NaN; the numbers
        are then of no use.
        """
        return keep_rows(self.rows(values), ranks, self.chunk.empty(OPERAND), self.chunk.empty(SCRATCH))

    def chosen(self, model: int, chance: float | torch.Tensor) -> torch.Tensor:
        """Returns 1 where the random number of an element is below the chance, else 0, as :meth:`TensorGroup.chosen`."""
        import torch

        from streammerge.kernels.random import chosen_of_each

        out, scratch = self.chunk.empty(_CHOSEN, torch.float32), self.chunk.empty(_BITS, torch.int32)
        return chosen_of_each(self.seed, self.names, model, chance, out, scratch)
