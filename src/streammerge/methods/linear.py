"""Weighted means: model soups, end-of-training averages, 0.6 of one voice and 0.4 of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from streammerge.group import Chunk, Kernel, TensorGroup


def linear(group: TensorGroup, *, weight: Sequence[float], normalize: bool = True) -> Kernel:
    r"""Weighted mean of the models, in their order.

    .. math:: y = \sum_i w_i x_i \; / \; \sum_i w_i \qquad (\text{without the division if not } normalize)

    Wortsman et al., *Model soups*, 2022 (arXiv:2203.05482); Izmailov et al., *Averaging weights*, 2018
    (arXiv:1803.05407). Any shape; ``weight`` has one number per model, negative ones too; their sum must not be zero
    when normalised. Summed in the compute dtype, float64 unless asked otherwise, and rounded once.
    """
    scale = sum(weight) if normalize else 1.0

    def kernel(chunk: Chunk) -> torch.Tensor:
        total = _scaled(chunk.load(0, "total"), weight[0])
        for model, w in enumerate(weight[1:], start=1):
            # Not add_(alpha=w): torch fuses that on some machines only, and fused sums have other last bits.
            total.add_(_scaled(chunk.load(model), w))
        return total if scale == 1 else total.div_(scale)

    return kernel


def _scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    return values if factor == 1 else values.mul_(factor)
