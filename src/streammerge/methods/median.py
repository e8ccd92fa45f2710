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


@merge_method("median", base="unused", passes=False, pointwise=True, buffers=3, buffers_per_model=1)
def median(group: TensorGroup) -> Kernel:
    r"""Elementwise median of the models; for an even number, the mean of the middle two.

    .. math:: y_i = \operatorname{median}(x_{0,i}, \ldots, x_{N-1,i})

    Any shape, one model or more. Edge case: NaN in any model gives NaN.
    """

    middle, other = (group.models - 1) // 2, group.models // 2

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        numbers = [chunk.load(model, f"model {model}") for model in range(group.models)]
        spare, invalid = chunk.empty("spare"), chunk.zeros("invalid")
        for values in numbers:
            invalid.add_(torch.ne(values, values, out=spare))
        # As integers, because two zeros of different signs have no order as floats, and any would be the smaller one.
        width = torch.int64 if spare.dtype == torch.float64 else torch.int32
        keys, moved = [values.view(width) for values in numbers], spare.view(width)
        for key in keys:
            _turn(key, moved)
        for last in range(len(keys) - 1, middle - 1, -1):  # moves the largest of those that are left to the end
            for at in range(last):
                torch.minimum(keys[at], keys[at + 1], out=moved)
                torch.maximum(keys[at], keys[at + 1], out=keys[at + 1])
                keys[at], moved = moved, keys[at]
        result = _turn(keys[middle], moved).view(spare.dtype)
        if other != middle:
            result.add_(_turn(keys[other], moved).view(spare.dtype)).div_(2)
        return result.masked_fill_(invalid != 0, torch.nan)

    return kernel


def _turn(bits: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Turns the bits of floats into integers of the same order, in place, and back again."""
    import torch

    torch.bitwise_right_shift(bits, 8 * bits.element_size() - 1, out=spare)
    return bits.bitwise_xor_(spare.bitwise_and_(torch.iinfo(bits.dtype).max))


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

    As sd-mecha's ``clamp``. Any shape, two models or more. Edge cases: NaN in any model gives NaN; a zero is positive.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        low, high = chunk.load(1, "low"), chunk.load(1, "high")
        for model in range(2, group.models):
            values = chunk.load(model)
            torch.minimum(low, values, out=low)
            torch.maximum(high, values, out=high)
        limited = torch.minimum(torch.maximum(chunk.load(0), low, out=low), high, out=low)
        # Of two zeros, torch takes one or the other, by the element's place in the chunk. Adding 0 makes -0 to 0.
        return limited.add_(0.0)

    return kernel
