"""Sums over a :class:`~streammerge.kernels.group.TensorGroup`, in one pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.compiled.products import Products
from streammerge.kernels.chunk import OPERAND, Slot
from streammerge.kernels.lanes import row_sums
from streammerge.kernels.places import places
from streammerge.tensors.spec import ranges

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.chunk import Chunk, Look, Swept

FIRST: Slot = ("first",)
"""The slot of the first model while products are made."""
_OTHER: Slot = ("other",)
_PRODUCT: Slot = ("product",)
_MOST_AT_ONCE = 24
"""Sources whose products compiled functions sum. The memory of more would be worth a term in the budget."""


AddTo = Callable[[list[float], "Chunk", int], "list[float] | None"]
"""The ``add_compiled`` that a look may have: (totals, chunk, grain) -> the totals with the sums of the chunk's terms, grain
by grain, in the order of :class:`_Sums`, by compiled functions. None if these cannot. Totals are empty at first."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums the terms of a piece, grain by grain; ``row``: see :class:`TensorGroup`. ``apart``: whether the terms are
    made of one grain after the other too. They then stay in the CPU's own cache, but a look costs more calls."""

    grain: int
    row: int
    apart: bool = False

    def __call__(self, look: Look, chunks: Iterable[Chunk]) -> list[torch.Tensor]:
        totals: list[torch.Tensor] = []
        adds: AddTo | None = getattr(look, "add_compiled", None)
        for whole in chunks:
            added = None if adds is None else adds([total.item() for total in totals], whole, self.grain)
            if added is None:
                for chunk in whole.blocks(self.grain) if self.apart else [whole]:
                    self._add(totals, look, chunk)
            else:
                totals = _numbers(added)
        return totals

    def _add(self, totals: list[torch.Tensor], look: Look, chunk: Chunk) -> None:
        import torch

        for number, values in enumerate(look(chunk)):
            step = self.grain // (self.row if values.dim() > 1 else 1)
            length = values.shape[0]  # torch's len is a function of Python, and slow
            short = length <= step
            for start, stop in [(0, 0)] if short else ranges(length, step):
                part = values if short else values[start:stop]
                flat = part.dim() == 1 and part.dtype in (torch.float32, torch.float64)
                partial = row_sums(part.unsqueeze(0))[0] if flat else part.sum(0, dtype=torch.float64)
                if number == len(totals):
                    totals.append(partial)
                else:
                    totals[number].add_(partial)


def _numbers(totals: Sequence[float]) -> list[torch.Tensor]:
    import torch

    return list(torch.tensor(totals, dtype=torch.float64).unbind())


def reduce(group: Swept, terms: Look, apart: bool = False) -> list[torch.Tensor]:
    """See :meth:`TensorGroup.reduce`. If a sum is not finite, all are made again without agreed elements. ``apart``: see
    :class:`_Sums`."""

    def add(totals: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
        return [total.add_(one) for total, one in zip(totals, more, strict=True)]

    def sums(swept: Swept) -> list[torch.Tensor]:
        return functools.reduce(add, swept.sweep(terms, _Sums(group.grain, group.row, apart), 0, group.elems))

    totals = sums(group)
    return totals if all(map(_finite, totals)) else sums(group.hiding())


def _finite(total: torch.Tensor) -> bool:
    return bool(total.isfinite().all()) if total.dim() else math.isfinite(total.item())


def gram(group: Swept, deltas: bool) -> torch.Tensor:
    """See :meth:`TensorGroup.gram`."""
    import torch

    n = group.models
    sums = reduce(group, _Pairs(n, deltas), apart=True)
    return torch.tensor(matrix([total.item() for total in sums], n), dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Looks at the products of all pairs of models."""

    models: int
    deltas: bool

    def __call__(self, chunk: Chunk) -> Iterator[torch.Tensor]:
        return products(chunk, self.models, self.deltas)

    def add_compiled(self, totals: list[float], chunk: Chunk, grain: int) -> list[float] | None:
        found = places(chunk)
        if found is None or len(found) > _MOST_AT_ONCE:
            return None
        at, dtypes = [place for place, _ in found], [dtype for _, dtype in found]
        first, based = int(chunk.based), self.deltas
        sums = Products(dtypes[first:], dtypes[0] if based else None, grain, totals)
        return sums.add(at[first:], at[0] if based else None, chunk.elems)


def products(chunk: Chunk, models: int, deltas: bool) -> Iterator[torch.Tensor]:
    """Yields the elements' products of all pairs of models, 00, 10, 11, 20, ..., in float64.

    Afterwards :data:`FIRST` still has the first model, and :data:`OPERAND` the second of two.
    """
    import torch

    load = chunk.delta if deltas else chunk.load
    first = load(0, FIRST, torch.float64)  # one model is held, since it is in the most products
    for i in range(models):
        x = load(i, OPERAND, torch.float64) if i else first
        for j in range(i + 1):
            y = x if i == j else load(j, _OTHER, torch.float64) if j else first
            yield torch.mul(x, y, out=chunk.empty(_PRODUCT, torch.float64))


def matrix(sums: Sequence[float], models: int) -> list[list[float]]:
    """Returns the symmetric matrix of the sums of all :func:`products`."""
    return [[sums[max(i, j) * (max(i, j) + 1) // 2 + min(i, j)] for j in range(models)] for i in range(models)]
