"""arcee_fusion against its oracle: important changes of one model, by divergence and difference."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import Case, MethodSuite

Tensor = torch.Tensor


def arcee_fusion(x: list[Tensor], b: Tensor, draws: Any) -> Tensor:
    p, q = (torch.softmax(t, -1) + 1e-8 for t in (x[0], b))
    importance = (x[0] - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True).reshape((*b.shape[:-1], 1) if b.dim() else ())
    ordered, n = importance.reshape(-1).sort().values, b.numel()
    first, middle, third = (ordered[int(s * (n - 1))] for s in (0.25, 0.5, 0.75))
    return b + (x[0] - b) * (importance >= middle + 1.5 * (third - first))


class TestArceeFusion(MethodSuite):
    ORACLES = {"arcee_fusion": arcee_fusion}
    CASES = [Case("arcee_fusion", 1, undecided=1e-3)]
