"""Weighted means: model soups, end-of-training averages, 0.6 of one voice and 0.4 of another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.adding import Multiples, add_scaled, exact_reciprocal
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import PerModel, Values, merge_method, sums_to_something

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Combination:
    r"""The kernel of :math:`(w_0 b + \sum_i w_i x_i) / d`, summed in the order of the models."""

    weights: tuple[float, ...]
    of_base: float
    divisor: float

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        total = scaled(chunk.load(0, "total"), self.weights[0])
        for model, w in enumerate(self.weights[1:], start=1):
            add_scaled(total, chunk.load(model), w)
        if self.of_base:
            add_scaled(total, chunk.base, self.of_base)
        number, divides = self.quotient
        return total.div_(number) if divides else scaled(total, number)

    @property
    def quotient(self) -> tuple[float, bool]:
        """What the sum is multiplied by, or divided by if that says so."""
        factor = exact_reciprocal(self.divisor)
        return (self.divisor, True) if factor is None else (factor, False)

    def bound(self, magnitudes: Sequence[float]) -> float:
        """Returns what no magnitude of a result exceeds by more than rounding, from such numbers of the models, and of the
        base if it has a weight. NaN if the divisor is 0."""
        weights = (*self.weights, self.of_base) if self.of_base else self.weights
        most = sum(abs(w) * magnitude for w, magnitude in zip(weights, magnitudes, strict=True))
        return most / abs(self.divisor) if self.divisor else math.nan


class Combinations:
    """Several such kernels over the same numbers, in few operations: the results are the same to the bit.

    They must have a weight of the base all or none, and a divisor other than 1 all or none. ``compute``: the dtype.
    """

    def __init__(self, kernels: Sequence[Combination], compute: torch.dtype) -> None:
        import torch

        rows = [(*each.weights, each.of_base) if each.of_base else each.weights for each in kernels]
        first, *others = zip(*rows, strict=True)
        self._first = torch.tensor(first, dtype=compute).unsqueeze(1)
        self._others = [Multiples(weights, compute) for weights in others]
        self._divisors: torch.Tensor | None = None
        self._factors: torch.Tensor | None = None
        if any(divides for _, divides in (each.quotient for each in kernels)):
            self._divisors = torch.tensor([each.divisor for each in kernels], dtype=compute).unsqueeze(1)
        elif kernels[0].divisor != 1:
            self._factors = torch.tensor([each.quotient[0] for each in kernels], dtype=compute).unsqueeze(1)

    def __call__(self, values: Sequence[torch.Tensor], totals: torch.Tensor, rows: list[torch.Tensor]) -> None:
        """Makes the result of each kernel, a row of ``totals``. ``values``: of the models, then of a base with a weight, in
        the compute dtype; they stay as they are. ``rows``: the same memory row by row."""
        import torch

        torch.mul(values[0], self._first, out=totals)
        for each, multiples in zip(values[1:], self._others, strict=True):
            multiples.add_to(rows, each)
        if self._divisors is not None:
            totals.div_(self._divisors)
        elif self._factors is not None:
            totals.mul_(self._factors)


def combination(weights: Sequence[float], of_base: float = 0.0, divisor: float = 1.0) -> Combination:
    """Returns the kernel of a weighted sum of the models and the base, divided by ``divisor``."""
    return Combination(tuple(weights), of_base, divisor)


def scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Multiplies the values by the factor, in place. A factor of 1 leaves them untouched."""
    return values if factor == 1 else values.mul_(factor)


def check_normal(values: Values) -> None:
    """Raises RecipeError for weights that are to be normalised but sum to zero."""
    if values["normalize"] and not sums_to_something(values["weight"]):
        raise RecipeError(
            "the weights sum to zero, so they cannot be normalised; pass `normalize=False` to use them as given"
        )


# A running sum costs no more in float64, and its result is then the exact mean rounded once.
@merge_method(
    "linear", base="unused", passes=False, pointwise=True, sums=True, buffers=2, compute="float64", check=check_normal
)
def linear(group: TensorGroup, *, weight: PerModel = (1.0,), normalize: bool = True) -> Kernel:
    r"""Weighted mean of the models.

    .. math:: y = \sum_i w_i x_i \; / \; \sum_i w_i \qquad (\text{without the division if not } normalize)

    Wortsman et al., *Model soups*, 2022 (arXiv:2203.05482); Izmailov et al., *Averaging weights leads to wider optima*,
    2018 (arXiv:1803.05407).

    Any shape, one model or more. ``weight``: one number per model, negative ones too.

    Edge cases: weights that sum to zero are an error when normalised. Deviations from mergekit: the sum is in float64
    and rounded once, where mergekit's is in float32; a zero sum is an error instead of infinity.
    """
    return combination(weight, divisor=sum(weight) if normalize else 1.0)


@merge_method("n_average", base="unused", passes=False, pointwise=True, sums=True, buffers=2, compute="float64")
def n_average(group: TensorGroup) -> Kernel:
    r"""Plain mean of the models: linear with equal weights.

    .. math:: y = \tfrac{1}{N} \sum_i x_i

    Polyak and Juditsky, *Acceleration of stochastic approximation by averaging*, 1992. As sd-mecha's ``n_average``,
    which keeps a running mean instead of a sum.

    Any shape, one model or more.
    """
    return combination([1.0] * group.models, divisor=group.models)


@merge_method("weighted_sum", models=(2, 2), base="unused", passes=False, pointwise=True, buffers=2, compute="float64")
def weighted_sum(group: TensorGroup, *, alpha: float = 0.5) -> Kernel:
    r"""Straight line between two models.

    .. math:: y = (1 - \alpha)\, x_0 + \alpha\, x_1

    The "weighted sum" of the image-model mergers; as sd-mecha's ``weighted_sum``. Any shape. ``alpha`` outside [0, 1]
    extrapolates; 0 gives the first model's numbers, 1 the second's.
    """
    return combination([1 - alpha, alpha])


def _check_decay(values: Values) -> None:
    if not 0 <= values["decay"] < 1:
        raise RecipeError(f"ema takes a decay from 0 to below 1, not {values['decay']:g}")


@merge_method(
    "ema", base="unused", passes=False, pointwise=True, sums=True, buffers=2, compute="float64", check=_check_decay
)
def ema(group: TensorGroup, *, decay: float = 0.9) -> Kernel:
    r"""Exponential moving average over the models in their order, the oldest first.

    .. math:: m_0 = x_0, \quad m_i = d\, m_{i-1} + (1 - d)\, x_i, \quad y = m_{N-1}

    This equals the weighted sum with :math:`w_0 = d^{N-1}` and :math:`w_i = (1 - d)\, d^{N-1-i}`. Polyak averaging, as
    trainers do over steps, but over saved checkpoints. Morales-Brotons et al., *Exponential moving average of weights in
    deep learning*, 2024 (arXiv:2411.18704).

    Any shape, one model or more. ``decay`` in [0, 1); 0 gives the last model. The weights sum to 1.
    """
    last = group.models - 1
    return combination([decay**last] + [(1 - decay) * decay ** (last - i) for i in range(1, group.models)])
