"""NearSwap: moves the base to the other model's numbers where the two are near."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import merge_method

if TYPE_CHECKING:
    import torch


@merge_method("nearswap", models=(1, 1), base="required", passes=False, pointwise=True, buffers=5)
def nearswap(group: TensorGroup, *, t: float) -> Kernel:
    r"""Moves the base towards the model, all the way where they are within ``t``.

    .. math:: y = w\, x + (1 - w)\, b, \qquad w = \operatorname{clamp}\big(t / \max(|b - x|, 10^{-6}),\, 0,\, 1\big)

    alchemonaut, *QuartetAnemoi-70B-t0.0001*, 2024 (huggingface.co). One model and the base; any shape. Edge cases: a
    ``t`` of 0 or below gives the base; equal elements stay as they are.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        x, weight = chunk.load(0), chunk.empty("weight")
        distance = torch.sub(chunk.base, x, out=weight).abs_().clamp_(min=1e-6)
        weight = distance.reciprocal_().mul_(t).clamp_(0, 1)
        rest = torch.sub(1, weight, out=chunk.empty("rest"))
        return x.mul_(weight).add_(rest.mul_(chunk.base))

    return kernel
