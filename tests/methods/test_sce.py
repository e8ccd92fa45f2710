"""sce against its oracle: select by variance, weigh by energy, erase by sign."""

from __future__ import annotations

from typing import Any

import torch

from methods.oracles import elected, top
from methods.suite import Case, MethodSuite

Tensor = torch.Tensor


def sce(x: list[Tensor], b: Tensor, draws: Any, select_topk: float = 1.0) -> Tensor:
    if not x:
        return b
    d = torch.stack([t - b for t in x])
    if select_topk < 1:
        variance = d.var(0, unbiased=False)
        d = d * top(variance, int(int(variance.count_nonzero()) * select_topk))
    agree = elected(d)
    energy = d.square().reshape(len(x), -1).mean(1)
    share = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(x))
    w = share.reshape(-1, *[1] * b.dim()) * agree
    return b + (d * w).sum(0) / w.sum(0).clamp(min=1e-6)


class TestSce(MethodSuite):
    ORACLES = {"sce": sce}
    CASES = [
        Case("sce", 3),
        Case("sce", 3, {"select_topk": 0.3}, undecided=1e-3),
    ]
    REFUSED = [("sce", 2, {"select_topk": 2}, "select_topk is the share")]
