"""nearswap against its oracle: the other model's numbers where both are near."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import Case, MethodSuite

Tensor = torch.Tensor


def nearswap(x: list[Tensor], b: Tensor, draws: Any, t: float) -> Tensor:
    w = (t / (b - x[0]).abs().clamp(min=1e-6)).clamp(0, 1)
    return w * x[0] + (1 - w) * b


class TestNearswap(MethodSuite):
    ORACLES = {"nearswap": nearswap}
    CASES = [Case("nearswap", 1, {"t": 0.02})]
