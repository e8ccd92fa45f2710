"""Helpers shared by the oracles of several families; they use no code of the package."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def top(values: Tensor, k: int) -> Tensor:
    """Returns 1 for the k largest (the first among equal ones), 0 elsewhere."""
    mask = torch.zeros(values.numel(), dtype=torch.float64)
    mask[values.reshape(-1).argsort(descending=True, stable=True)[:k]] = 1
    return mask.reshape(values.shape)


def elected(deltas: Tensor) -> Tensor:
    """Whether a model's delta has the sign of the sum of deltas; a zero sum counts as positive."""
    return deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
