"""SCE: selects elements that vary, calculates a weight for each model, erases the minority's signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel, Slot
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.ranking import Cut
from streammerge.methods.contracts import Values, merge_method
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

Variance = Callable[[Chunk], "torch.Tensor"]
Mask = Callable[[Chunk], "torch.Tensor | None"]
Kept = dict[str, "torch.Tensor"]


def _check_topk(values: Values) -> None:
    if not 0 <= values["select_topk"] <= 1:
        raise RecipeError(f"select_topk is the share of elements that is kept, from 0 to 1, not {values['select_topk']:g}")


@merge_method(
    "sce", models=(0, None), base="required", buffers=11, buffers_per_model=1, kept_bits=32, searches=1, check=_check_topk
)
def sce(group: TensorGroup, *, int8_mask: bool = False, select_topk: float = 1.0, uniform_below: float = 0.0) -> Kernel:
    r"""Select, calculate, erase: fuses deltas where they vary, each by its energy.

    .. math:: y = b + \frac{\sum_m c_m\, w_m\, \delta'_m}{\max(\sum_m c_m\, w_m,\, 10^{-6})}, \qquad
              w_m \propto \operatorname{mean}(\delta_m'^2)

    Select: :math:`\delta'` has the :math:`\lfloor topk \cdot n_{v \ne 0} \rfloor` elements with the largest variance v
    over the models. Calculate: the weights sum to 1. Erase: :math:`c_m` is 1 where :math:`\delta'_m` has the sign of
    :math:`\sum_k \delta'_k`, else 0; a zero sum counts as positive. Wan et al., *FuseChat: knowledge fusion of chat
    models*, 2024 (arXiv:2408.07990).

    Any shape, any number of models. ``int8_mask`` is accepted and changes nothing. Edge cases: the result is the base
    without models, and where nothing varies or is selected. Deviations from mergekit: weights are equal only if all
    energies are zero. mergekit makes them equal if they sum to less than 1e-6, as the energies of ordinary fine-tunes
    do; ``uniform_below=1e-6`` is its rule. Among equal variances, those with the lowest index are selected.
    """
    if not group.models:
        return lambda chunk: chunk.base
    kept: Kept = {}
    variance = _variances(group, kept)
    cut = _selection(group, variance, select_topk) if select_topk < 1 else None
    mask_of: Mask = (lambda chunk: None) if cut is None else _masks(group, variance, cut, kept)
    weights = _weights(group, mask_of, uniform_below)

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        mask, spare = mask_of(chunk), chunk.empty("spare")
        deltas = [_selected(chunk, model, mask, f"delta {model}") for model in range(group.models)]
        total = torch.add(deltas[0], deltas[1] if len(deltas) > 1 else 0, out=chunk.empty("sum"))
        for delta in deltas[2:]:
            total.add_(delta)
        sign = torch.ge(total, 0, out=total).mul_(2).sub_(1)
        mixed, divisor = chunk.zeros("mixed"), chunk.empty("divisor")
        for number, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
            agrees = torch.gt(torch.mul(delta, sign, out=spare), 0, out=spare)
            share = torch.mul(agrees, weight, out=spare if number else divisor)
            mixed.add_(delta.mul_(share))
            if number:
                divisor.add_(share)
        return mixed.div_(divisor.clamp_(min=1e-6)).add_(chunk.base)

    return kernel


def _selected(chunk: Chunk, model: int, mask: torch.Tensor | None, slot: Slot = OPERAND) -> torch.Tensor:
    delta = chunk.delta(model, slot)
    return delta if mask is None else delta.mul_(mask)


def _selection(group: TensorGroup, variance: Variance, share: float) -> Cut:
    def varying(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        yield torch.sign(variance(chunk), out=chunk.empty("varying"))  # 1 where it varies; the sign of NaN is 0

    count = int(float(group.reduce(varying)[0]) * share)
    return group.kth_largest(lambda chunk: [variance(chunk)], [[count]])[0][0]


def _variances(group: TensorGroup, kept: Kept) -> Variance:
    """Returns the function that gives the variances, which are not to be changed. Computes those of a tensor of up to a
    grain once, and keeps them. The budget counts them as ``kept_bits``."""

    def variance(chunk: Chunk) -> torch.Tensor:
        if chunk.hides or not chunk.elems == group.elems <= GRAIN:
            return _variance(chunk, group)
        if "variance" not in kept:
            kept["variance"] = _variance(chunk, group).clone()
        return kept["variance"]

    return variance


def _masks(group: TensorGroup, variance: Variance, cut: Cut, kept: Kept) -> Mask:
    """Returns the function that gives 1 where an element is selected, 0 elsewhere. Keeps the mask of a tensor of up to a
    grain in place of its variances."""

    def mask(chunk: Chunk) -> torch.Tensor:
        import torch

        keeps = chunk.elems == group.elems <= GRAIN and not chunk.hides
        if keeps and "mask" in kept:
            return kept["mask"]
        found = cut.keep(variance(chunk), chunk.start)  # nobody asks for the variances any more
        made = torch.ne(found, 0, out=found)
        if keeps:
            kept["mask"] = kept.pop("variance")
        return made

    return mask


def _variance(chunk: Chunk, group: TensorGroup) -> torch.Tensor:
    """Returns the variance of the deltas over the models, by Welford's method; exactly zero where all deltas are equal."""
    import torch

    several = group.models > 1  # the first of several is their mean so far, and adds nothing to the variance
    mean, variance = chunk.delta(0, "mean") if several else chunk.zeros("mean"), chunk.empty("variance")
    for number in range(several, group.models):
        delta = chunk.delta(number)
        apart = torch.sub(delta, mean, out=chunk.empty("apart"))
        mean.add_(torch.div(apart, number + 1, out=chunk.empty("share")))
        if number == several:
            torch.mul(apart, delta.sub_(mean), out=variance)
        else:
            variance.add_(apart.mul_(delta.sub_(mean)))
    return variance.div_(group.models).abs_()  # clears the sign of NaN


def _weights(group: TensorGroup, mask_of: Mask, uniform_below: float) -> list[float]:
    def squares(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        mask = mask_of(chunk)
        for model in range(group.models):
            delta = _selected(chunk, model, mask)
            yield torch.mul(delta, delta, out=delta)

    energies = [float(sum_) / max(group.elems, 1) for sum_ in group.reduce(squares)]
    total = sum(energies)
    if total == 0 or total < uniform_below:
        return [1 / group.models] * group.models
    return [energy / total for energy in energies]
