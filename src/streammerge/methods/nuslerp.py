"""Spherical interpolation by weights: of whole tensors, rows or columns, optionally of differences from a base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import PerModel, Values, merge_method
from streammerge.methods.inner_products import Products, solved
from streammerge.methods.linear import Combination, combination

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch


def _row(shape: tuple[int, ...], values: Values) -> int:
    if values["nuslerp_flatten"] or not shape:
        return 1
    # Vectors along the first dimension are columns: a row of the tensor has one element of each.
    return math.prod(shape[1:]) if values["nuslerp_row_wise"] and len(shape) > 1 else shape[-1]


def _flat(products: Products, name: str, based: bool, values: Values) -> Combination:
    """Returns the kernel of a tensor that is one vector."""
    p, q = _of_numbers(products[0][0], products[0][1], products[1][1], _share(values["weight"]))
    return combination([p, q], of_base=1 - p - q if based else 0.0)


def _share(weight: Sequence[float]) -> float:
    total = sum(weight)
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def _in_batch(batch: Batch, values: Values) -> torch.Tensor | None:
    return solved(_flat, deltas=None)(batch, values) if values["nuslerp_flatten"] or not batch.shape else None


@merge_method(
    "nuslerp",
    models=(2, 2),
    base="optional",
    row=_row,
    buffers=8,
    row_buffers=16,
    batch=_in_batch,
    compute="float64",
)
def nuslerp(
    group: TensorGroup, *, weight: PerModel = (1.0,), nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Kernel:
    r"""Spherical interpolation by weights, of each tensor as one vector, or of its rows or columns.

    .. math:: y = \frac{\sin((1-t)\,\theta)}{\sin\theta}\, v_0 + \frac{\sin(t\,\theta)}{\sin\theta}\, v_1 \; (+\, b),
              \qquad v_m = x_m \;(-\, b), \quad t = \frac{w_1}{w_0 + w_1}

    mergekit's NuSLERP; Shoemake, *Animating rotation with quaternion curves*, 1985. With a base, the models'
    differences from it are interpolated. ``nuslerp_flatten`` (the default): each tensor is one vector. Without it,
    vectors lie along the last dimension, or along the first with ``nuslerp_row_wise``.

    Edge cases: t is 0.5 where the weights sum to less than 1e-6. The interpolation is a straight line where :math:`1 -
    \cos^2\theta \le 10^{-16}`. Norms below 1e-7 count as 1e-7.
    """
    if nuslerp_flatten or len(group.shape) == 0:
        return _flat(group.gram(deltas=group.based).tolist(), group.name, group.based, {"weight": weight})
    t = _share(weight)
    along_first = nuslerp_row_wise and len(group.shape) > 1

    def vectors(chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        load = chunk.delta if group.based else chunk.load
        return load(0, "v0").view(-1, group.row), load(1, "v1").view(-1, group.row)

    def products(chunk: Chunk) -> Iterator[torch.Tensor]:
        import torch

        v0, v1 = vectors(chunk)
        for x, y in ((v0, v0), (v0, v1), (v1, v1)):
            yield torch.mul(x, y, out=chunk.empty("product").view_as(x))

    columns = _coefficients(group.reduce(products), t) if along_first else None

    def kernel(chunk: Chunk) -> torch.Tensor:
        v0, v1 = vectors(chunk)
        p, q = columns or _coefficients([part.sum(1, keepdim=True) for part in products(chunk)], t)
        mixed = v0.mul_(p).add_(v1.mul_(q)).view(-1)
        return mixed.add_(chunk.base) if group.based else mixed

    return kernel


def _of_numbers(of_0: float, of_both: float, of_1: float, t: float) -> tuple[float, float]:
    """Returns the same numbers as :func:`_coefficients`, faster: an operation of torch on one number takes longer than one
    of Python. Roots and functions of angles are torch's, whose last bits are its own."""
    import torch

    if not (math.isfinite(of_0) and math.isfinite(of_both) and math.isfinite(of_1)):
        p, q = _coefficients(torch.tensor([of_0, of_both, of_1], dtype=torch.float64), t)
        return p.item(), q.item()
    squared = torch.tensor([of_0, of_1], dtype=torch.float64)
    cos = of_both / (max(squared[0].sqrt().item(), 1e-7) * max(squared[1].sqrt().item(), 1e-7))
    cos = max(-1.0, min(cos, 1.0))
    if 1 - cos * cos <= 1e-16:
        return 1 - t, t
    theta = torch.acos(torch.tensor(cos, dtype=torch.float64))
    whole = torch.sin(theta).item()
    return torch.sin((1 - t) * theta).item() / whole, torch.sin(t * theta).item() / whole


def _coefficients(products: list[torch.Tensor] | torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the coefficients of the two vectors, from the inner products (00, 01, 11) of each pair."""
    import torch

    n0, n1 = (products[i].sqrt().clamp(min=1e-7) for i in (0, 2))
    cos = (products[1] / (n0 * n1)).clamp(-1, 1)
    line = 1 - cos.square() <= 1e-16
    theta = torch.acos(cos)
    p, q = (torch.sin(part * theta) / torch.sin(theta) for part in (1 - t, t))
    return p.masked_fill(line, 1 - t), q.masked_fill(line, t)
