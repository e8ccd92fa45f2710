"""Weighted means, running ones included."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import W3, Case, MethodSuite

Tensor = torch.Tensor


def linear(x: list[Tensor], b: Any, draws: Any, weight: list[float], normalize: bool = True) -> Tensor:
    return sum(w * t for w, t in zip(weight, x, strict=True)) / (sum(weight) if normalize else 1)


def ema(x: list[Tensor], b: Any, draws: Any, decay: float = 0.9) -> Tensor:
    mean = x[0]
    for t in x[1:]:
        mean = decay * mean + (1 - decay) * t
    return mean


class TestLinear(MethodSuite):
    ORACLES = {
        "linear": linear,
        "n_average": lambda x, b, draws: sum(x) / len(x),
        "weighted_sum": lambda x, b, draws, alpha=0.5: torch.lerp(x[0], x[1], alpha),
        "ema": ema,
    }
    CASES = [
        Case("linear", 3, W3),
        Case("linear", 3, W3 | {"normalize": False}, keeps_equals=False),
        Case("n_average", 3),
        Case("weighted_sum", 2, {"alpha": 0.3}),
        Case("ema", 4, {"decay": 0.7}),
    ]
    REFUSED = [
        ("linear", 2, {"weight": [1, -1]}, "sum to zero"),
        ("ema", 2, {"decay": 1}, "from 0 to below 1"),
    ]
