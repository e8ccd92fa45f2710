"""Weighted sums whose weights follow from the models' inner products, of many small tensors at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import OPERAND
from streammerge.methods.contracts import Values
from streammerge.methods.linear import Combination, scaled

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch

Products = Sequence[Sequence[float]]
"""The matrix of the inner products of all models."""
Solve = Callable[[Products, str, bool, Values], Combination]
"""(products, name of the tensor, whether there is a base, parameters) -> the kernel of the tensor. Its divisor is 1."""


def solved(solve: Solve, deltas: bool | None = False) -> Callable[[Batch, Values], torch.Tensor | None]:
    """Returns what merges a batch. ``deltas``: whether the base is subtracted from the models before they are multiplied;
    None: if there is one."""

    def run(batch: Batch, values: Values) -> torch.Tensor | None:
        based = batch.chunk.based
        apart = based if deltas is None else deltas
        products = batch.grams(apart)
        if products is None:
            return None
        kernels = [solve(of_tensor, name, based, values) for of_tensor, name in zip(products, batch.names, strict=True)]
        return combined(batch, kernels, {} if apart else _held(batch))

    return run


def _held(batch: Batch) -> dict[int, torch.Tensor]:
    """Returns the models that are still loaded in the compute dtype after they were multiplied."""
    import torch

    from streammerge.kernels.reductions import FIRST

    chunk = batch.chunk
    if chunk.compute != torch.float64:
        return {}
    first = {0: chunk.empty(FIRST)}
    return first | {1: chunk.empty(OPERAND)} if batch.models == 2 else first


def combined(batch: Batch, kernels: Sequence[Combination], held: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Returns what these kernels make, one for each tensor. ``held``: models by their numbers, which are changed; all
    others are loaded."""
    from streammerge.kernels.reductions import FIRST

    chunk = batch.chunk

    def times(values: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        if all(weight == weights[0] for weight in weights):
            return scaled(values, weights[0])
        batch.rows(values).mul_(batch.column(weights))
        return values

    total = times(held[0] if 0 in held else chunk.load(0, FIRST), [kernel.weights[0] for kernel in kernels])
    for model in range(1, batch.models):
        values = held[model] if model in held else chunk.load(model)
        total.add_(times(values, [kernel.weights[model] for kernel in kernels]))
    of_base = [kernel.of_base for kernel in kernels]
    if all(of_base):
        total.add_(times(chunk.base, of_base))
    elif any(of_base):  # a sum with zeros is another one: -0 + 0 is 0
        for row, base, weight in zip(batch.rows(total).unbind(), batch.rows(chunk.base).unbind(), of_base, strict=True):
            if weight:
                row.add_(scaled(base, weight))
    return total
