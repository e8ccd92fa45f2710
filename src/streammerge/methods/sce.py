"""SCE: selects elements that vary, calculates a weight for each model, erases the minority's signs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.ranking import Cut
from streammerge.methods.contracts import Values, merge_method
from streammerge.tensors.spec import GRAIN

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch

Variance = Callable[[Chunk], "torch.Tensor"]
Mask = Callable[[Chunk, "Sequence[torch.Tensor]"], "torch.Tensor | None"]
Kept = dict[str, "torch.Tensor"]


def _check_topk(values: Values) -> None:
    if not 0 <= values["select_topk"] <= 1:
        raise RecipeError(f"select_topk is the share of elements that is kept, from 0 to 1, not {values['select_topk']:g}")


def _in_batch(batch: Batch, values: Values) -> torch.Tensor | None:
    """Returns the result for all tensors of a batch, None where a delta is not finite."""
    import torch

    if not batch.models:
        return None
    chunk, share, mask = batch.chunk, values["select_topk"], None
    deltas = [chunk.delta(model, f"delta {model}") for model in range(batch.models)]
    if share < 1:
        variance = _variance(chunk, deltas, batch.models)
        ranks = [(int(count * share), 0) for count in _varying(batch, variance)]
        if not batch.keep_largest(variance, ranks):
            return None
        mask = torch.ne(variance, 0, out=variance)
    energies = []
    for delta in deltas:
        delta = delta if mask is None else delta.mul_(mask)
        energies.append(batch.sums(torch.mul(delta, delta, out=chunk.empty(OPERAND))))
        if not all(map(math.isfinite, energies[-1])):
            return None
    each = [_shares(of_models, batch.elems, values["uniform_below"]) for of_models in zip(*energies, strict=True)]
    columns = [batch.column(of_tensors) for of_tensors in zip(*each, strict=True)]
    return _mixed(chunk, deltas, lambda values, model: batch.rows(values).mul_(columns[model]))


def _varying(batch: Batch, variance: torch.Tensor) -> list[int]:
    """Returns the number of elements of each tensor that vary. A comparison with NaN is false."""
    import numpy as np

    flags = batch.chunk.empty(OPERAND).numpy().view("?")[: len(variance)]
    rows = np.greater(variance.numpy(), 0, out=flags).reshape(len(batch.names), -1)
    return [int(np.count_nonzero(row)) for row in rows]


@merge_method(
    "sce",
    models=(0, None),
    base="required",
    buffers=11,
    buffers_per_model=1,
    kept_bits=32,
    searches=1,
    batch=_in_batch,
    check=_check_topk,
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
    mask_of: Mask = (lambda chunk, deltas: None) if cut is None else _masks(group, cut, kept)
    weights = _weights(group, mask_of, uniform_below)

    def kernel(chunk: Chunk) -> torch.Tensor:
        deltas = _selected(chunk, group.models, mask_of)
        return _mixed(chunk, deltas, lambda values, model: values.mul_(weights[model]))

    return kernel


def _mixed(chunk: Chunk, deltas: list[torch.Tensor], weigh: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
    """Returns the base with the mean of the deltas that have the sign of their sum.

    ``weigh(values, model)`` multiplies by the weight of a model, in place.
    """
    import torch

    total = torch.add(deltas[0], deltas[1] if len(deltas) > 1 else 0, out=chunk.empty("sum"))
    for delta in deltas[2:]:
        total.add_(delta)
    sign = torch.ge(total, 0, out=total).mul_(2).sub_(1)
    mixed, divisor = chunk.zeros("mixed"), chunk.empty("divisor")
    for model, delta in enumerate(deltas):
        share = chunk.empty("spare") if model else divisor
        torch.gt(torch.mul(delta, sign, out=share), 0, out=share)
        weigh(share, model)
        mixed.add_(delta.mul_(share))
        if model:
            divisor.add_(share)
    return mixed.div_(divisor.clamp_(min=1e-6)).add_(chunk.base)


def _selected(chunk: Chunk, models: int, mask_of: Mask) -> list[torch.Tensor]:
    """Returns the deltas of a chunk, with zeros where an element is not selected."""
    deltas = [chunk.delta(model, f"delta {model}") for model in range(models)]
    mask = mask_of(chunk, deltas)
    return deltas if mask is None else [delta.mul_(mask) for delta in deltas]


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
            return _variance(chunk, _one_by_one(chunk, group.models), group.models)
        if "variance" not in kept:
            kept["variance"] = _variance(chunk, _one_by_one(chunk, group.models), group.models).clone()
        return kept["variance"]

    return variance


def _masks(group: TensorGroup, cut: Cut, kept: Kept) -> Mask:
    """Returns the function that gives 1 where an element is selected, 0 elsewhere, from the deltas of a chunk. Keeps the
    mask of a tensor of up to a grain in place of its variances."""

    def mask(chunk: Chunk, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        keeps = chunk.elems == group.elems <= GRAIN and not chunk.hides
        if keeps and "mask" in kept:
            return kept["mask"]
        known = kept.pop("variance", None) if keeps else None  # nobody asks for the variances any more
        found = cut.keep(_variance(chunk, deltas, group.models) if known is None else known, chunk.start)
        made = torch.ne(found, 0, out=found)
        if keeps:
            kept["mask"] = made if known is not None else made.clone()
        return made

    return mask


def _variance(chunk: Chunk, deltas: Iterable[torch.Tensor], models: int) -> torch.Tensor:
    """Returns the variance of the deltas over the models, by Welford's method; exactly zero where all deltas are equal. The
    first delta may be in the slot of the mean. Each is used before the next one is asked for, and stays as it is."""
    import torch

    rest = iter(deltas)
    mean, variance, share = next(rest), chunk.empty("variance"), chunk.empty("share")
    if models == 1:
        torch.sub(mean, mean, out=variance)  # NaN where it is not finite
    for number, delta in enumerate(rest, 1):
        apart = torch.sub(delta, mean, out=chunk.empty("apart"))
        mean = torch.add(mean, torch.div(apart, number + 1, out=share), out=chunk.empty("mean"))
        other = torch.sub(delta, mean, out=share)
        if number == 1:  # the first is the mean so far, and adds nothing to the variance
            torch.mul(apart, other, out=variance)
        else:
            variance.add_(apart.mul_(other))
    return variance.div_(models).abs_()  # clears the sign of NaN


def _one_by_one(chunk: Chunk, models: int) -> Iterator[torch.Tensor]:
    yield chunk.delta(0, "mean")
    for model in range(1, models):
        yield chunk.delta(model)


def _weights(group: TensorGroup, mask_of: Mask, uniform_below: float) -> list[float]:
    def squares(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        for delta in _selected(chunk, group.models, mask_of):
            yield torch.mul(delta, delta, out=delta)

    return _shares([float(total) for total in group.reduce(squares)], group.elems, uniform_below)


def _shares(squares: Sequence[float], elems: int, uniform_below: float) -> list[float]:
    """Returns the weight of each model from the sums of its squares."""
    energies = [of_model / max(elems, 1) for of_model in squares]
    total = sum(energies)
    if total == 0 or total < uniform_below:
        return [1 / len(energies)] * len(energies)
    return [energy / total for energy in energies]
