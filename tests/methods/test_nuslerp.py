"""Spherical interpolation by weights: of tensors, rows, columns, and of differences from a base."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import W2, Case, MethodSuite
from streammerge.methods.nuslerp import _coefficients, _of_numbers

Tensor = torch.Tensor


def nuslerp(
    x: list[Tensor],
    b: Any,
    draws: Any,
    weight: list[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    v = [t if b is None else t - b for t in x]
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    if nuslerp_flatten or v[0].dim() == 0:
        v = [a.reshape(1, -1) for a in v]
    elif nuslerp_row_wise and v[0].dim() > 1:
        v = [a.reshape(a.shape[0], -1).T for a in v]
    else:
        v = [a.reshape(-1, a.shape[-1]) for a in v]
    p, q = v
    lengths = [a.norm(dim=1, keepdim=True).clamp(min=1e-7) for a in v]
    cos = (p / lengths[0] * q / lengths[1]).sum(1, keepdim=True).clamp(-1, 1)
    angle, line = cos.acos(), 1 - cos * cos <= 1e-16
    arc = (torch.sin((1 - t) * angle) * p + torch.sin(t * angle) * q) / angle.sin()
    mixed = torch.where(line, (1 - t) * p + t * q, arc)
    if not nuslerp_flatten and nuslerp_row_wise and x[0].dim() > 1:
        mixed = mixed.T
    return mixed.reshape(x[0].shape) + (0 if b is None else b)


class TestNuslerp(MethodSuite):
    ORACLES = {"nuslerp": nuslerp}
    CASES = [
        Case("nuslerp", 2, W2),
        Case("nuslerp", 2, W2, base=True),
        Case("nuslerp", 2, W2 | {"nuslerp_flatten": False}, tolerance=1e-7),
        Case("nuslerp", 2, W2 | {"nuslerp_flatten": False, "nuslerp_row_wise": True}, base=True, tolerance=1e-7),
    ]


def test_one_tensor_has_the_coefficients_that_many_rows_have() -> None:
    """To the last bit, also where the line takes the place of the arc, and for NaN."""
    make = torch.Generator().manual_seed(1)
    for _ in range(500):
        a, b = torch.randn(2, 3, generator=make, dtype=torch.float64)
        t = float(torch.rand((), generator=make))
        for v, w in ((a, b), (a, a), (a, -a), (a, a * 0), (a * 1e200, b), (a * torch.nan, b)):
            products = torch.stack([v @ v, v @ w, w @ w])
            told = [each.item() for each in _coefficients(products, t)]
            assert repr(_of_numbers(*products.tolist(), t)) == repr(tuple(told))
