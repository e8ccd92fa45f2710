"""Reinforced Agent Merging: keeps changes of a single model whole, and averages changes of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import Values, merge_method

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch


Enlarge = Callable[["torch.Tensor", int, "torch.Tensor"], None]
"""(1 where a change is unique, model, out) -> what is added to such changes of the model, as a part of each."""


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
    return lambda chunk: _merged(chunk, group.models, epsilon)


def _in_batch(batch: Batch, values: Values) -> torch.Tensor | None:
    """Returns the result of :func:`ramplus_tl` for all tensors of a batch."""
    import torch

    chunk, models, epsilon = batch.chunk, batch.models, values["epsilon"]
    if not models:
        return None
    totals = [batch.sums(flags) for flags in _counts(chunk, models, epsilon)]
    factors = [_factors(of_tensor, values["r"], values["alpha"], epsilon) for of_tensor in zip(*totals, strict=True)]

    def enlarge(unique: torch.Tensor, model: int, out: torch.Tensor) -> None:
        more = batch.column([of_models[model] - 1 for of_models in factors])
        torch.mul(batch.rows(unique), more, out=batch.rows(out))

    return _merged(chunk, models, epsilon, enlarge)


@merge_method("ramplus_tl", models=(0, None), base="required", buffers=7, batch=_in_batch, check=_check_epsilon)
def ramplus_tl(group: TensorGroup, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Kernel:
    r"""RAM that enlarges a model's unique changes, more if more of its changes are shared.

    .. math:: y = b + \sum_m a_m \delta_m \Big(\lambda_m u + \frac{1 - u}{\sum_k a_k}\Big), \qquad
              u = [\textstyle\sum_k a_k = 1], \qquad \lambda_m = 1 + r\, \operatorname{clip}(\rho_m, 0, \alpha)

    :math:`a_m` is as in ``ram``. :math:`\rho_m` is the number of the model's shared changes divided by that of its
    unique ones (by ``epsilon`` where it has none), counted in each tensor: "tensor-local". *Reinforced agent merging*,
    2026 (arXiv:2601.13572). Any shape, any number of models. Deviation from mergekit: bfloat16 inputs do not give a
    float32 output.
    """

    totals = list(map(float, group.reduce(lambda chunk: _counts(chunk, group.models, epsilon)))) if group.models else []
    factors = _factors(totals, r, alpha, epsilon)

    def enlarge(unique: torch.Tensor, model: int, out: torch.Tensor) -> None:
        import torch

        torch.mul(unique, factors[model] - 1, out=out)

    return lambda chunk: _merged(chunk, group.models, epsilon, enlarge)


def _counts(chunk: Chunk, models: int, epsilon: float) -> Iterator[torch.Tensor]:
    """Yields for each model 1 where it changed an element, then 1 where no other model did."""
    import torch

    one = torch.eq(_count(chunk, models, epsilon), 1, out=chunk.empty("one"))
    for model in range(models):
        active = _active(chunk.delta(model), epsilon, chunk.empty("active"))
        yield active
        yield active.mul_(one)


def _factors(totals: Sequence[float], r: float, alpha: float, epsilon: float) -> list[float]:
    """Returns what each model's unique changes are multiplied by, from the sums of :func:`_counts`."""
    shared = [(active - unique) / max(unique, epsilon) for active, unique in zip(totals[::2], totals[1::2], strict=True)]
    return [1 + r * min(max(rho, 0.0), alpha) for rho in shared]


def _merged(chunk: Chunk, models: int, epsilon: float, enlarge: Enlarge | None = None) -> torch.Tensor:
    """Returns the base with the changes."""
    import torch

    count, share = _count(chunk, models, epsilon), chunk.empty("share")
    one, mixed = torch.eq(count, 1, out=chunk.empty("one")), chunk.zeros("mixed")
    inverse = count.clamp_(min=1).reciprocal_()
    for model in range(models):
        delta = chunk.delta(model)
        delta.mul_(_active(delta, epsilon, chunk.empty("active")))
        if enlarge is not None:  # the inverse is 1 where the change is unique, and gets the factor there
            enlarge(one, model, share)
            delta.mul_(share.add_(1))
        mixed.add_(delta.mul_(inverse))
    return mixed.add_(chunk.base)


def _count(chunk: Chunk, models: int, epsilon: float) -> torch.Tensor:
    """Counts the models that changed each element."""
    count = chunk.zeros("count")
    for model in range(models):
        count.add_(_active(chunk.delta(model), epsilon, chunk.empty("active")))
    return count


def _active(delta: torch.Tensor, epsilon: float, out: torch.Tensor) -> torch.Tensor:
    """Returns 1 where a change is larger than epsilon, 0 elsewhere."""
    import torch

    return torch.gt(torch.abs(delta, out=out), epsilon, out=out)
