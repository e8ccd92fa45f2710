"""What several families' oracles have in common; no code of the package."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def top(values: Tensor, k: int) -> Tensor:
    """1 for the k largest, the first of equal ones; 0 elsewhere."""
    mask = torch.zeros(values.numel(), dtype=torch.float64)
    mask[values.reshape(-1).argsort(descending=True, stable=True)[:k]] = 1
    return mask.reshape(values.shape)


def elected(deltas: Tensor) -> Tensor:
    """Where a model's delta has the sign of their sum, which is positive for zero."""
    return deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
