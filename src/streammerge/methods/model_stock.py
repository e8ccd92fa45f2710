"""Model Stock: a point between the base and the models' mean, chosen by the angles between the models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from streammerge.kernels.chunk import Chunk, Kernel
from streammerge.kernels.group import TensorGroup
from streammerge.methods.contracts import Values, merge_method
from streammerge.methods.inner_products import Products, solved
from streammerge.methods.linear import Combination, combination

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.batch import Batch


def _row(shape: tuple[int, ...], values: Values) -> int:
    return shape[-1] if values["filter_wise"] and shape else 1


def _flat(products: Products, name: str, based: bool, values: Values) -> Combination:
    """Returns the kernel of a tensor that is one vector."""
    n = len(products)
    t = _of_numbers(products, n)
    return combination([t / n] * n, of_base=1 - t)


def _in_batch(batch: Batch, values: Values) -> torch.Tensor | None:
    return None if values["filter_wise"] else solved(_flat, deltas=True)(batch, values)


@merge_method(
    "model_stock",
    models=(2, None),
    base="required",
    row=_row,
    buffers=8,
    buffers_per_model=1,
    batch=_in_batch,
    compute="float64",
)
def model_stock(group: TensorGroup, *, filter_wise: bool = False) -> Kernel:
    r"""Moves from the base towards the mean of the models, as far as their angles suggest.

    .. math:: y = t\, \bar x + (1 - t)\, b, \qquad t = \frac{N c}{1 + (N - 1)\, c}

    Here c is the mean over all pairs of :math:`\cos\theta_{ij} = \langle \delta_i, \delta_j \rangle / \max(\|\delta_i\|
    \|\delta_j\|, 10^{-6})`, clamped to [-1, 1], and :math:`\delta_i = x_i - b`. Jang et al., *Model Stock: all we need
    is just a few fine-tuned models*, 2024 (arXiv:2403.19522).

    At least two models beside the base. Each tensor is one vector. With ``filter_wise``, each row along the last
    dimension is one vector; a 1-d tensor is one row.

    Edge cases: t may leave [0, 1]. Where the denominator is smaller than 1e-6, as with opposite models, the result is
    the base. Models equal to the base have cosine 0 and give the base.
    """
    n = group.models
    if not filter_wise:
        return _flat(group.gram(deltas=True).tolist(), group.name, group.based, {})

    def kernel(chunk: Chunk) -> torch.Tensor:
        deltas = [chunk.delta(i, f"delta {i}").view(-1, group.row) for i in range(n)]
        t = _ratio([[(x * y).sum(-1) for y in deltas[: i + 1]] for i, x in enumerate(deltas)], n)
        mixed = chunk.zeros("mixed").view(-1, group.row)
        for delta in deltas:
            mixed.add_(delta)
        return mixed.mul_(t.div_(n).unsqueeze(-1)).view(-1).add_(chunk.base)

    return kernel


def _of_numbers(products: Products, n: int) -> float:
    """Returns the same number as :func:`_ratio`, faster: an operation of torch on one number takes longer than one of
    Python. Roots and the mean are torch's, whose last bits are its own."""
    import torch

    gram = torch.tensor(products, dtype=torch.float64)
    if not all(math.isfinite(each) for row in products for each in row):
        return _ratio(gram.unbind(), n).item()
    norms = [gram[i, i].sqrt().item() for i in range(n)]
    cosines = [products[j][i] / max(norms[i] * norms[j], 1e-6) for i, j in combinations(range(n), 2)]
    cosines = [max(-1.0, min(cos, 1.0)) for cos in cosines]
    c = torch.tensor(cosines, dtype=torch.float64).mean(0).item() if n > 2 else cosines[0]
    denominator = 1 + (n - 1) * c
    return 0.0 if abs(denominator) < 1e-6 else n * c / denominator


def _ratio(gram: Sequence[Sequence[torch.Tensor] | torch.Tensor], n: int) -> torch.Tensor:
    """Returns t from the inner products ``gram[i][j]`` of the deltas, j <= i; one t per row if they are vectors over
    rows."""
    import torch

    norms = [gram[i][i].sqrt() for i in range(n)]
    cosines = [(gram[j][i] / (norms[i] * norms[j]).clamp(min=1e-6)).clamp(-1, 1) for i, j in combinations(range(n), 2)]
    c = torch.stack(cosines).mean(0)
    denominator = 1 + (n - 1) * c
    singular = denominator.abs() < 1e-6
    return (n * c / denominator.masked_fill(singular, 1)).masked_fill(singular, 0)
