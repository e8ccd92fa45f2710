"""Medians of numbers and of whole tensors, and the clamp to the range of the other models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from methods.suite import Case, MethodSuite
from streammerge.methods.registry import merge_tensors

Tensor = torch.Tensor


def median(x: list[Tensor], b: Any, draws: Any) -> Tensor:
    return torch.stack(x).quantile(0.5, dim=0) if x[0].numel() else x[0]


def geometric_median(x: list[Tensor], b: Any, draws: Any, tol: float) -> Tensor:
    z = sum(x) / len(x)
    for _ in range(100):
        pull = [1 / max((z - t).norm().item(), 1e-6) for t in x]
        z = sum(p * t for p, t in zip(pull, x, strict=True)) / sum(pull)
    return z


def clamp(x: list[Tensor], b: Any, draws: Any) -> Tensor:
    rest = torch.stack(x[1:])
    return x[0].clamp(rest.amin(0), rest.amax(0))


class TestMedian(MethodSuite):
    ORACLES = {
        "median": median,
        "geometric_median": geometric_median,
        "clamp": clamp,
    }
    CASES = [
        Case("median", 4),
        Case("median", 3),
        Case("geometric_median", 4, {"tol": 0.0}),
        Case("clamp", 3),
    ]
    REFUSED = [("geometric_median", 2, {"eps": 0}, "eps above 0")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sign_of_a_clamped_zero_does_not_depend_on_its_place(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1001, dtype=dtype)
    made = merge_tensors("clamp", -zeros, zeros, -zeros)
    assert not made.signbit().any()
