r"""Task arithmetic, TIES, DARE, Breadcrumbs and DELLA: one formula with two choices.

.. math:: y = b + \lambda\, \frac{\sum_m c_m\, w_m\, \delta'_m}{\sum_m c_m\, w_m},
          \qquad \delta_m = x_m - b, \quad \delta'_m = \mathrm{sparsify}(\delta_m)

*sparsify* keeps a share of each delta (:mod:`streammerge.methods.sparsify`). The *consensus* :math:`c_m` is 1 without
election of the sign. With election, it is 1 where :math:`w_m \delta'_m` has the sign of :math:`\sum_m w_m \delta'_m`,
and 0 elsewhere, also where :math:`w_m \delta'_m` is zero; a zero sum counts as positive. The division is done only with
``normalize``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from streammerge.compiled.differences import Differences
from streammerge.compiled.numbers import known
from streammerge.kernels.chunk import OPERAND, Chunk, Kernel, Slot
from streammerge.kernels.group import TensorGroup
from streammerge.kernels.places import dtype_of, single_places
from streammerge.methods.contracts import PerModel, Values, merge_method
from streammerge.methods.linear import scaled
from streammerge.methods.sparsify import (
    Keep,
    MaskOf,
    Sparsify,
    bernoulli,
    bernoulli_in,
    check_density,
    everything,
    fibre_row,
    magnitude,
    magnitude_in,
    magnitude_outliers,
    magnitude_outliers_in,
    magprune,
    magprune_in,
    rescaled,
    rescaled_in,
    table_of,
)
from streammerge.tensors.dtypes import DType

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch


_MOST_AT_ONCE = 16
"""Models that compiled functions merge. Their masks are held together. More would be worth a term in the budget."""


def _merge(
    group: TensorGroup, sparsify: Sparsify, weight: Sequence[float], *, elect: bool, normalize: bool, scale: float
) -> Kernel:
    """Returns the kernel of the formula above; ``elect``: with election of the sign."""
    if not group.models:
        return lambda chunk: chunk.base
    return _Mixed(sparsify, tuple(weight), elect, normalize, scale)


class _Mixed:
    """The kernel of :func:`_merge`."""

    def __init__(self, sparsify: Sparsify, weight: Sequence[float], elect: bool, normalize: bool, scale: float) -> None:
        self._sparsify, self._weight, self._scale = sparsify, weight, scale
        self._mask_of: MaskOf | None = getattr(sparsify, "mask", None)
        self._elect, self._normalize = elect, normalize
        self._divisor = _divisor(weight, normalize)
        self._compiled: tuple[list[float], Differences] | None = None

    def __call__(self, chunk: Chunk) -> torch.Tensor:
        models = range(len(self._weight))
        if self._elect:
            deltas = [self._weighted(chunk, model, f"delta {model}") for model in models]
            return self._applied(chunk, winners(chunk, deltas, self._weight, self._normalize))
        mixed = self._weighted(chunk, 0, "mixed")
        for model in models[1:]:
            mixed.add_(self._weighted(chunk, model, OPERAND))
        return self._applied(chunk, mixed.div_(self._divisor) if self._divisor != 1 else mixed)

    def _weighted(self, chunk: Chunk, model: int, slot: Slot) -> torch.Tensor:
        return scaled(self._sparsify(chunk, model, chunk.delta(model, slot)), self._weight[model])

    def _applied(self, chunk: Chunk, mixed: torch.Tensor) -> torch.Tensor:
        return scaled(mixed, self._scale).add_(chunk.base)

    def put_compiled(self, chunk: Chunk, out: torch.Tensor) -> bool:
        """Writes the rounded result by compiled functions. Returns whether it is done, and all of it is finite."""
        if self._mask_of is None:
            return False
        out_dtype, count = dtype_of(out), len(self._weight)
        if count > _MOST_AT_ONCE or out_dtype == DType.F64 or not known([out_dtype]):
            return False
        held = single_places(chunk)
        if held is None:
            return False
        masks = [mask for model in range(count) if (mask := self._mask_of(chunk, model)) is not None]
        if len(masks) < count:
            return False
        base, models = held[0], held[1:]
        compiled = self._differences([mask.factor for mask in masks])
        places, dtypes = [place for place, _ in models], [dtype for _, dtype in models]
        bits = [mask.bits for mask in masks]
        return compiled.put(places, dtypes, *base, bits, out.data_ptr(), out_dtype, chunk.elems)

    def _differences(self, factors: list[float]) -> Differences:
        """Returns the compiled functions for these factors, which are those of a tensor."""
        import torch

        if self._compiled is None or self._compiled[0] != factors:
            made = Differences(
                self._weight,
                list(map(table_of, factors)),
                factors,
                self._scale,
                divisor=self._divisor,
                elects=self._elect,
                normalizes=self._normalize,
                least=_least(self._weight, torch.float32),
            )
            self._compiled = factors, made
        return self._compiled[1]


def _in_batch(batch: Batch, keep: Keep, values: Values, *, elect: bool) -> torch.Tensor | None:
    """Returns the result of :func:`_merge` for all tensors of a batch, None where a delta is not finite."""
    chunk, weight = batch.chunk, values["weight"]
    if not batch.models:
        return None
    if values["rescale"] and any(d < 1 for d in values["density"]):
        keep = rescaled_in(keep)

    def weighted(model: int, slot: Slot) -> torch.Tensor | None:
        delta = chunk.delta(model, slot)
        return scaled(delta, weight[model]) if keep(batch, model, delta, chunk.empty(OPERAND)) else None

    deltas: list[torch.Tensor] = []
    for model in range(batch.models):
        delta = weighted(model, f"delta {model}" if elect else "delta" if model else "mixed")
        if delta is None:
            return None
        if elect or not deltas:
            deltas.append(delta)
        else:
            deltas[0].add_(delta)
    if elect:
        mixed = winners(chunk, deltas, weight, values["normalize"])
    else:
        divisor = _divisor(weight, values["normalize"])
        mixed = deltas[0].div_(divisor) if divisor != 1 else deltas[0]
    return scaled(mixed, values["lambda"]).add_(chunk.base)


def _divisor(weight: Sequence[float], normalize: bool) -> float:
    total = sum(weight)
    return total if normalize and abs(total) >= 1e-8 else 1.0


def _batched(keep: Callable[..., Keep], *names: str, elect: bool) -> Callable[[Batch, Values], torch.Tensor | None]:
    """Returns what merges a batch. ``names``: the parameters that ``keep`` takes."""

    def run(batch: Batch, values: Values) -> torch.Tensor | None:
        return _in_batch(batch, keep(*[values[name] for name in names]), values, elect=elect)

    return run


def winners(chunk: Chunk, deltas: list[torch.Tensor], weight: Sequence[float], normalize: bool) -> torch.Tensor:
    """Returns the sum of the weighted deltas that have the elected sign, divided by the sum of their weights (if not
    zero)."""
    import torch

    sign, agrees, divisor = (chunk.empty(slot) for slot in ("sign", "agrees", "divisor"))
    torch.add(deltas[0], deltas[1] if len(deltas) > 1 else 0, out=sign)
    for delta in deltas[2:]:
        sign.add_(delta)
    _to_signs(sign)
    for number, (delta, w) in enumerate(zip(deltas, weight, strict=True)):
        delta.mul_(sign).clamp_(min=0)  # agreeing elements are positive now, all others zero
        if number:
            deltas[0].add_(delta)
        if normalize:
            torch.gt(delta, 0, out=agrees)
            divisor = divisor.add_(scaled(agrees, w)) if number else torch.mul(agrees, w, out=divisor)
    mixed = deltas[0].mul_(sign)
    if not normalize:
        return mixed
    least = _least(weight, chunk.compute)
    if not least:
        return mixed.div_(divisor.add_(torch.eq(divisor, 0, out=agrees)))
    return mixed.div_(divisor.clamp_(min=least))  # 0 / w is 0


def _least(weight: Sequence[float], compute: torch.dtype) -> float:
    """Returns the least that a sum of agreeing weights is, but for 0. 0 if weights may cancel each other out."""
    import torch

    rounded = torch.tensor(weight, dtype=compute).tolist()  # a tiny one may be 0 there
    return 0.0 if min(rounded) < 0 else min([w for w in rounded if w], default=1.0)


def _to_signs(values: torch.Tensor) -> None:
    """Makes 1 of each number with the sign of plus, -1 of each other. A sum of numbers is -0 if all are -0: no sign of such
    an element agrees with anything."""
    import numpy as np

    size = values.itemsize
    bits = values.numpy().view(f"i{size}")
    np.bitwise_and(bits, np.array(-1 << 8 * size - 1, bits.dtype), out=bits)
    np.bitwise_or(bits, np.array(1, f"f{size}").view(bits.dtype), out=bits)


def _prune(group: TensorGroup, sparsify: Sparsify, density: Sequence[float], rescale: bool) -> Sparsify:
    """Adds rescaling to the sparsifier if it is requested and anything is dropped."""
    return rescaled(group, sparsify) if rescale and any(d < 1 for d in density) else sparsify


@merge_method("task_arithmetic", models=(0, None), base="required", passes=False, pointwise=True, buffers=4)
def task_arithmetic(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Adds the weighted deltas of the models to the base.

    .. math:: y = b + \lambda \sum_m w_m (x_m - b) \quad (\text{divided by } \sum_m w_m \text{ when } normalize)

    Ilharco et al., *Editing models with task arithmetic*, 2023 (arXiv:2212.04089). Any shape, any number of models.
    ``weight`` per model, negative ones too. ``density``, ``rescale`` and ``int8_mask`` are accepted, as in mergekit,
    and change nothing.

    Edge cases: there is no division if the weights sum to less than 1e-8; without models the result is the base.
    """
    return _merge(group, everything, weight, elect=False, normalize=normalize, scale=lambda_)


@merge_method(
    "ties",
    models=(0, None),
    base="required",
    buffers=10,
    buffers_per_model=1,
    searches=1,
    batch=_batched(magnitude_in, "density", elect=True),
    check=check_density,
)
def ties(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Trim, elect sign, merge: the largest elements of each delta that agree in sign.

    .. math:: y = b + \lambda\, \frac{\sum_m c_m w_m \delta'_m}{\sum_m c_m w_m}, \qquad
              c_m = \big[\operatorname{sign}(w_m \delta'_m) = \operatorname{sign}(\textstyle\sum_k w_k \delta'_k)\big]

    :math:`\delta'_m` has the :math:`\lfloor density \cdot n \rfloor` elements of the largest magnitude, at least one.
    Yadav et al., *TIES-merging*, 2023 (arXiv:2306.01708). Any shape; ``weight`` and ``density`` per model. There is no
    division without ``normalize``. ``rescale`` restores the sum of magnitudes. ``int8_mask`` is accepted and changes
    nothing.

    Edge cases: a zero sum elects plus. Zeros never vote. There is no division where no element agrees, or where the
    weights sum to zero. Deviations from mergekit: exactly this many elements are kept; among equal magnitudes, those
    with the lowest index.
    """
    sparsify = _prune(group, magnitude(group, density), density, rescale)
    return _merge(group, sparsify, weight, elect=True, normalize=normalize, scale=lambda_)


@merge_method(
    "dare_linear",
    models=(0, None),
    base="required",
    buffers=8,
    kept_bits=1,
    batch=_batched(bernoulli_in, "density", elect=False),
    check=check_density,
)
def dare_linear(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Drop and rescale: a random share of each delta, restored in size and added up.

    .. math:: y = b + \lambda \sum_m w_m\, \frac{\sum |\delta_m|}{\sum |\delta'_m|}\, \delta'_m, \qquad
              \delta'_m = \delta_m \odot \mathrm{Bernoulli}(density)

    Yu et al., *Language models are super Mario*, 2023 (arXiv:2311.03099). Any shape. The factor restores the sum of
    magnitudes, as in mergekit, instead of dividing by the density.

    Edge cases: a density of 1 drops nothing and needs no random numbers; sums below 1e-7 are not rescaled. Deviation
    from mergekit: the random numbers depend only on seed, tensor name, model and element.
    """
    sparsify = _prune(group, bernoulli(group, density), density, rescale)
    return _merge(group, sparsify, weight, elect=False, normalize=normalize, scale=lambda_)


@merge_method(
    "dare_ties",
    models=(0, None),
    base="required",
    buffers=12,
    buffers_per_model=1,
    kept_bits=1,
    batch=_batched(bernoulli_in, "density", elect=True),
    check=check_density,
)
def dare_ties(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""DARE's random dropping with TIES' election of the sign.

    .. math:: y = b + \lambda \sum_m c_m w_m \delta'_m, \qquad
              c_m = \big[\operatorname{sign}(w_m \delta'_m) = \operatorname{sign}(\textstyle\sum_k w_k \delta'_k)\big]

    Yu et al., 2023 (arXiv:2311.03099) and Yadav et al., 2023 (arXiv:2306.01708). Drops as ``dare_linear``; elects as
    ``ties``, with the same edge cases. With ``normalize``, the sum is divided by :math:`\sum_m c_m w_m`.
    """
    sparsify = _prune(group, bernoulli(group, density), density, rescale)
    return _merge(group, sparsify, weight, elect=True, normalize=normalize, scale=lambda_)


@merge_method(
    "breadcrumbs",
    models=(0, None),
    base="required",
    buffers=9,
    searches=2,
    batch=_batched(magnitude_outliers_in, "density", "gamma", elect=False),
    check=check_density,
)
def breadcrumbs(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    gamma: PerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Drops outliers and small elements of each delta, adds up the rest.

    .. math:: y = b + \lambda \sum_m w_m \delta'_m

    :math:`\delta'_m` lacks the :math:`\lfloor \gamma n \rfloor` elements of the largest magnitude, and has the
    :math:`\lfloor density \cdot n \rfloor` largest after them. Davari and Belilovsky, *Model breadcrumbs*, 2023
    (arXiv:2312.06795). Any shape; ``gamma`` per model.

    Edge cases: if density and gamma sum to more than all elements, fewer outliers are dropped. A density of 1 keeps
    all. A tensor with density * n below 1 keeps nothing. Deviation from mergekit: among equal magnitudes, those with
    the lowest index count as the larger.
    """
    sparsify = _prune(group, magnitude_outliers(group, density, gamma), density, rescale)
    return _merge(group, sparsify, weight, elect=False, normalize=normalize, scale=lambda_)


@merge_method(
    "breadcrumbs_ties",
    models=(0, None),
    base="required",
    buffers=12,
    buffers_per_model=1,
    searches=2,
    batch=_batched(magnitude_outliers_in, "density", "gamma", elect=True),
    check=check_density,
)
def breadcrumbs_ties(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    gamma: PerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Breadcrumbs' dropping of outliers and small elements with TIES' election of the sign.

    .. math:: y = b + \lambda \sum_m c_m w_m \delta'_m, \qquad
              c_m = \big[\operatorname{sign}(w_m \delta'_m) = \operatorname{sign}(\textstyle\sum_k w_k \delta'_k)\big]

    Davari and Belilovsky, 2023 (arXiv:2312.06795) and Yadav et al., 2023 (arXiv:2306.01708). Drops as ``breadcrumbs``;
    elects as ``ties``, with the same edge cases. With ``normalize``, the sum is divided by :math:`\sum_m c_m w_m`.
    """
    sparsify = _prune(group, magnitude_outliers(group, density, gamma), density, rescale)
    return _merge(group, sparsify, weight, elect=True, normalize=normalize, scale=lambda_)


@merge_method(
    "della",
    models=(0, None),
    base="required",
    row=fibre_row,
    buffers=16,
    buffers_per_model=1,
    kept_bits=1,
    batch=_batched(magprune_in, "density", "epsilon", elect=True),
    check=check_density,
)
def della(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    epsilon: PerModel = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""Drops elements at random, small ones more often, then elects the sign.

    .. math:: y = b + \lambda\, \frac{\sum_m c_m w_m \delta'_m}{\sum_m c_m w_m}, \qquad
              P(\delta'_{m,i} \ne 0) = density - \epsilon + 2\,\epsilon\, \frac{r_i}{n - 1}

    :math:`r_i` is the rank of the magnitude among the n along the second dimension (the only one of a vector). Deep et
    al., *DELLA-merging*, 2024 (arXiv:2406.11617). ``epsilon`` per model; density - epsilon and density + epsilon lie
    between 0 and 1. The sums of magnitudes are restored, unless ``rescale`` is false.

    One row (all elements with the same first index) is held at a time. Edge cases: a density of 1 drops nothing and
    needs no random numbers. A single element, as in a 0-d tensor or a row of length one, is kept; mergekit fails there.
    The election is as in ``ties``. Deviations from mergekit: ranks are exact for every dtype; the random numbers
    differ.
    """
    sparsify = _prune(group, magprune(group, density, epsilon), density, rescale)
    return _merge(group, sparsify, weight, elect=True, normalize=normalize, scale=lambda_)


@merge_method(
    "della_linear",
    models=(0, None),
    base="required",
    row=fibre_row,
    buffers=17,
    kept_bits=1,
    batch=_batched(magprune_in, "density", "epsilon", elect=False),
    check=check_density,
)
def della_linear(
    group: TensorGroup,
    *,
    weight: PerModel = (1.0,),
    density: PerModel = (1.0,),
    epsilon: PerModel = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Kernel:
    r"""DELLA's dropping by rank, without an election: adds the deltas up.

    .. math:: y = b + \lambda \sum_m w_m \delta'_m, \qquad
              P(\delta'_{m,i} \ne 0) = density - \epsilon + 2\,\epsilon\, \frac{r_i}{n - 1}

    Deep et al., 2024 (arXiv:2406.11617). As ``della``, without the election.
    """
    sparsify = _prune(group, magprune(group, density, epsilon), density, rescale)
    return _merge(group, sparsify, weight, elect=False, normalize=normalize, scale=lambda_)
