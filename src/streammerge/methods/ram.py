"""Reinforced Agent Merging: keeps changes of a single model whole, and averages changes of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import Values, merge_method

if TYPE_CHECKING:
    import torch


def _check_epsilon(values: Values) -> None:
    if values["epsilon"] <= 0:
        raise RecipeError("ramplus_tl takes an epsilon above 0")


@merge_method("ram", models=(0, None), base="required", passes=False, pointwise=True, buffers=6)
def ram(group: TensorGroup, *, epsilon: float = 1e-5) -> Kernel:
    r"""Adds changes to the base: whole where one model made them, else their mean.

    .. math:: y = b + \frac{\sum_m a_m \delta_m}{\max(\sum_m a_m, 1)}, \qquad a_m = [\,|\delta_m| > \epsilon\,]

    *Reinforced agent merging*, 2026 (arXiv:2601.13572). Any shape, any number of models. Edge cases: the result is the
    base without models, and where no model moved by more than ``epsilon``.
    """
    return _merge(group, epsilon, [1.0] * group.models)


@merge_method("ramplus_tl", models=(0, None), base="required", buffers=6, check=_check_epsilon)
def ramplus_tl(group: TensorGroup, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Kernel:
    r"""RAM that enlarges a model's unique changes, more if more of its changes are shared.

    .. math:: y = b + \sum_m a_m \delta_m \Big(\lambda_m u + \frac{1 - u}{\sum_k a_k}\Big), \qquad
              u = [\textstyle\sum_k a_k = 1], \qquad \lambda_m = 1 + r\, \operatorname{clip}(\rho_m, 0, \alpha)

    :math:`a_m` is as in ``ram``. :math:`\rho_m` is the number of the model's shared changes divided by that of its
    unique ones (by ``epsilon`` where it has none), counted in each tensor: "tensor-local". *Reinforced agent merging*,
    2026 (arXiv:2601.13572). Any shape, any number of models. Deviation from mergekit: bfloat16 inputs do not give a
    float32 output.
    """

    def counts(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        count = _count(chunk, group, epsilon)
        one = torch.eq(count, 1, out=chunk.empty("one"))
        for model in range(group.models):
            active = _active(chunk.delta(model), epsilon, chunk.empty("active"))
            yield active
            yield active.mul_(one)

    totals = list(map(float, group.reduce(counts))) if group.models else []
    factors = []
    for active, unique in zip(totals[::2], totals[1::2], strict=True):
        rho = (active - unique) / max(unique, epsilon)
        factors.append(1 + r * min(max(rho, 0.0), alpha))
    return _merge(group, epsilon, factors)


def _merge(group: TensorGroup, epsilon: float, factors: Sequence[float]) -> Kernel:
    """Returns the kernel; ``factors`` multiply each model's unique changes."""

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        count, share = _count(chunk, group, epsilon), chunk.empty("share")
        one, mixed = torch.eq(count, 1, out=chunk.empty("one")), chunk.zeros("mixed")
        inverse = count.clamp_(min=1).reciprocal_()
        for model, factor in enumerate(factors):
            delta = chunk.delta(model)
            delta.mul_(_active(delta, epsilon, chunk.empty("active")))
            if factor != 1:  # the inverse is 1 where the change is unique, and gets the factor there
                delta.mul_(torch.mul(one, factor - 1, out=share).add_(1))
            mixed.add_(delta.mul_(inverse))
        return mixed.add_(chunk.base)

    return kernel


def _count(chunk: Chunk, group: TensorGroup, epsilon: float) -> torch.Tensor:
    """Counts the models that changed each element."""
    count = chunk.zeros("count")
    for model in range(group.models):
        count.add_(_active(chunk.delta(model), epsilon, chunk.empty("active")))
    return count


def _active(delta: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    """Returns 1 where a change is larger than epsilon, 0 elsewhere."""
    import torch

    return torch.gt(torch.abs(delta, out=out), epsilon, out=out)
