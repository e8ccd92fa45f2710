"""ram against its oracle: shared changes are averaged, unique changes are kept or amplified."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import Case, MethodSuite

Tensor = torch.Tensor


def ram(x: list[Tensor], b: Tensor, draws: Any, epsilon: float = 1e-5) -> Tensor:
    return ramplus(x, b, draws, r=0.0, epsilon=epsilon)


def ramplus(x: list[Tensor], b: Tensor, draws: Any, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Tensor:
    if not x:
        return b
    d = torch.stack([t - b for t in x])
    active = d.abs() > epsilon
    count = active.sum(0).double()
    total = b.clone()
    for m in range(len(x)):
        shared, unique = int((active[m] & (count > 1)).sum()), int((active[m] & (count == 1)).sum())
        factor = 1 + r * min(shared / max(unique, epsilon), alpha)
        share = torch.where(count == 1, factor, 1 / count.clamp(min=1))
        total = total + torch.where(active[m], d[m] * share, 0.0)
    return total


class TestRam(MethodSuite):
    ORACLES = {
        "ram": ram,
        "ramplus_tl": ramplus,
    }
    CASES = [
        Case("ram", 3, {"epsilon": 0.05}),
        Case("ramplus_tl", 3, {"epsilon": 0.05, "r": 0.3, "alpha": 0.5}),
    ]
    REFUSED = [("ramplus_tl", 2, {"epsilon": 0}, "epsilon above 0")]
