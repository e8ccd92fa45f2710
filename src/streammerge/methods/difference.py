"""Methods that add to a model the difference between other models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import Values, merge_method
from streammerge.methods.inner_products import Products, solved
from streammerge.methods.linear import Combination, combination

if TYPE_CHECKING:
    import torch


@merge_method("add_difference", models=(2, 2), base="required", passes=False, pointwise=True, buffers=3, compute="float64")
def add_difference(group: TensorGroup, *, alpha: float = 1.0) -> Kernel:
    r"""Adds to the first model what the second learned from the base.

    .. math:: y = x_0 + \alpha\, (x_1 - b)

    The "add difference" of the image-model mergers; as sd-mecha's ``add_difference``. Any shape.
    """
    return combination([1.0, alpha], of_base=-alpha)


@merge_method(
    "train_difference", models=(2, 2), base="required", passes=False, pointwise=True, buffers=6, compute="float64"
)
def train_difference(group: TensorGroup, *, alpha: float = 1.0) -> Kernel:
    r"""Adds to the first model what the second learned, most where the first lacks it.

    .. math:: y = x_0 + 1.8\,\alpha\, \frac{|x_1 - x_0|}{|x_1 - x_0| + |x_1 - b|}\, (x_1 - b)

    SuperMerger's "train difference", with sd-mecha's ``train_difference_mask``: the share is largest where the second
    model differs most from the first. Any shape. Edge case: where all three are equal (0 / 0), nothing is added.
    """

    def kernel(chunk: Chunk) -> torch.Tensor:
        import torch

        first, second = chunk.load(0, "first"), chunk.load(1, "second")
        apart = torch.sub(second, first, out=chunk.empty("apart")).abs_()
        learned = second.sub_(chunk.base)
        both = torch.abs(learned, out=chunk.empty("both")).add_(apart)
        both.add_(torch.eq(both, 0, out=chunk.empty("zero")))
        return first.add_(learned.mul_(apart.div_(both)).mul_(1.8 * alpha))

    return kernel


def _perpendicular(products: Products, name: str, based: bool, values: Values) -> Combination:
    (aa, _), (ab, _) = products
    return combination([-ab / aa, 1.0] if aa != 0 else [0.0, 0.0])


@merge_method(
    "perpendicular_component", models=(2, 2), base="unused", buffers=4, batch=solved(_perpendicular), compute="float64"
)
def perpendicular_component(group: TensorGroup) -> Kernel:
    r"""Returns the part of the second model that is perpendicular to the first.

    .. math:: y = x_1 - \frac{\langle x_0, x_1 \rangle}{\|x_0\|^2}\, x_0

    Each tensor is one vector. As sd-mecha's ``perpendicular_component``. Edge case: zeros where the first model's
    tensor is zero, as in sd-mecha.
    """
    return _perpendicular(group.gram().tolist(), group.name, group.based, {})


def _with_perpendicular(products: Products, name: str, based: bool, values: Values) -> Combination:
    alpha = values["alpha"]
    (aa, _), (ab, _) = products
    if aa == 0:
        return combination([1.0, 0.0])
    share = ab / aa
    return combination([1 - alpha * share, alpha], of_base=alpha * (share - 1))


@merge_method(
    "add_perpendicular",
    models=(2, 2),
    base="required",
    buffers=5,
    batch=solved(_with_perpendicular, deltas=True),
    compute="float64",
)
def add_perpendicular(group: TensorGroup, *, alpha: float = 1.0) -> Kernel:
    r"""Adds to the first model the part of the second's change perpendicular to its own.

    .. math:: y = x_0 + \alpha \Big(\delta_1 - \frac{\langle \delta_0, \delta_1 \rangle}{\|\delta_0\|^2}\,
    \delta_0\Big),
              \qquad \delta_i = x_i - b

    As sd-mecha's ``add_perpendicular``. Each tensor is one vector. Edge case: where the first model equals the base,
    nothing is added, as in sd-mecha.
    """
    return _with_perpendicular(group.gram(deltas=True).tolist(), group.name, group.based, {"alpha": alpha})
