"""Differences of one model added to another."""

from __future__ import annotations

from typing import Any

import torch

from methods.suite import Case, MethodSuite

Tensor = torch.Tensor


def perpendicular(a: Tensor, b: Tensor) -> Tensor:
    return b - a * (a * b).sum() / (a * a).sum() if a.norm() > 0 else torch.zeros_like(b)


def train_difference(x: list[Tensor], b: Tensor, draws: Any, alpha: float = 1.0) -> Tensor:
    apart, learned = (x[1] - x[0]).abs(), x[1] - b
    return x[0] + 1.8 * alpha * torch.nan_to_num(apart / (apart + learned.abs()), nan=0.0) * learned


class TestDifference(MethodSuite):
    ORACLES = {
        "add_difference": lambda x, b, draws, alpha=1.0: x[0] + alpha * (x[1] - b),
        "train_difference": train_difference,
        "perpendicular_component": lambda x, b, draws: perpendicular(x[0], x[1]),
        "add_perpendicular": lambda x, b, draws, alpha=1.0: x[0] + alpha * perpendicular(x[0] - b, x[1] - b),
    }
    CASES = [
        Case("add_difference", 2, {"alpha": 0.8}),
        Case("train_difference", 2, {"alpha": 0.8}),
        Case("perpendicular_component", 2, keeps_equals=False),
        Case("add_perpendicular", 2, {"alpha": 0.8}),
    ]
