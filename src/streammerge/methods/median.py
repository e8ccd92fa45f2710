"""Medians, which a single bad model cannot spoil, and a clamp to the range of the other models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import Values, merge_method
from streammerge.methods.linear import combination

if TYPE_CHECKING:
    import torch


@merge_method("median", base="unused", passes=False, pointwise=True, buffers=6, buffers_per_model=5)
def median(group: TensorGroup) -> Kernel:
    r"""Elementwise median of the models; for an even number, the mean of the middle two.

    .. math:: y_i = \operatorname{median}(x_{0,i}, \ldots, x_{N-1,i})

    Any shape, one model or more. Edge case: NaN in any model gives NaN.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        ordered = torch.stack(chunk.models).sort(dim=0).values  # sort puts NaN last
        low, high = ordered[(group.models - 1) // 2], ordered[group.models // 2]
        return low.add(high).div_(2).masked_fill_(ordered[-1].isnan(), torch.nan)

    return kernel


def _check_eps(values: Values) -> None:
    if values["eps"] <= 0:
        raise RecipeError("geometric_median takes an eps above 0")


@merge_method("geometric_median", base="unused", buffers=4, compute="float64", check=_check_eps)
def geometric_median(group: TensorGroup, *, eps: float = 1e-6, max_iter: int = 100, tol: float = 1e-12) -> Kernel:
    r"""Point with the smallest sum of distances to the models; each tensor is one point.

    .. math:: y = \arg\min_z \sum_i \|z - x_i\|, \qquad
              z \leftarrow \frac{\sum_i x_i / \max(\|z - x_i\|, \epsilon)}{\sum_i 1 / \max(\|z - x_i\|, \epsilon)}

    Weiszfeld, *Sur le point pour lequel la somme des distances de n points donnés est minimum*, 1937. z is always a
    weighted mean of the models, so one pass for their inner products is enough, and the iterations work on the weights.
    They start at the mean and stop after ``max_iter`` steps, or when no weight moves by more than ``tol``. As
    sd-mecha's ``geometric_median``. One model or more.
    """
    import torch

    n = group.models
    gram = group.gram()
    # ||z - x_i||^2 for z = sum w_j x_j, from the squared distances between the models (which the Gram matrix gives)
    squared = gram.diagonal()[:, None] + gram.diagonal()[None, :] - 2 * gram
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    for _ in range(max_iter):
        distances = (squared @ weights - weights @ squared @ weights / 2).clamp(min=0).sqrt()
        pull = distances.clamp(min=eps).reciprocal()
        before, weights = weights, pull / pull.sum()
        if float((weights - before).abs().max()) <= tol:
            break
    return combination(weights.tolist())


@merge_method("clamp", models=(2, None), base="unused", passes=False, pointwise=True, buffers=4)
def clamp(group: TensorGroup) -> Kernel:
    r"""Limits the first model to the range that the others span.

    .. math:: y = \min\big(\max(x_0,\, \min_{i > 0} x_i),\, \max_{i > 0} x_i\big)

    As sd-mecha's ``clamp``. Any shape, two models or more. Edge case: NaN in any model gives NaN.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        low, high = chunk.load(1, "low"), chunk.load(1, "high")
        for model in range(2, group.models):
            values = chunk.load(model)
            torch.minimum(low, values, out=low)
            torch.maximum(high, values, out=high)
        return torch.minimum(torch.maximum(chunk.load(0), low, out=low), high, out=low)

    return kernel
