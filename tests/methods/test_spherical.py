"""Means along arcs: of two models, of many in a tangent plane, of many by iteration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import streammerge as sm
from methods.suite import W3, Case, MethodSuite
from streammerge.methods.registry import merge_tensors

Tensor = torch.Tensor


def slerp(x: list[Tensor], b: Any, draws: Any, t: float) -> Tensor:
    v0, v1 = x
    cos = (unit(v0) * unit(v1)).sum().item()
    if abs(cos) > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = math.acos(cos)
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)


def unit(v: Tensor) -> Tensor:
    return v / v.norm() if v.norm() > 1e-8 else v


def multislerp(
    x: list[Tensor], b: Any, draws: Any, weight: list[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Tensor:
    if len(x) == 1:
        return x[0]
    s = [t if b is None else t - b for t in x]
    w = [v / sum(weight) if normalize_weights else v for v in weight]
    u = [v / (v.norm() + eps) for v in s]
    mean = sum(a * v for a, v in zip(w, u, strict=True))
    if mean.norm() < eps:
        assert len(x) == 2 or not any(v.any() for v in s)
        return sum(a * v for a, v in zip(w, s, strict=True)) + (0 if b is None else b)
    centre = mean / mean.norm()
    tangent = sum(a * (v - (v * centre).sum() * centre) for a, v in zip(w, u, strict=True))
    tau = tangent.norm() + eps
    moved = centre * tau.cos() + tangent * tau.sin() / tau
    return moved * sum(a * v.norm() for a, v in zip(w, s, strict=True)) + (0 if b is None else b)


def karcher(x: list[Tensor], b: Any, draws: Any, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    if len(x) == 1:
        return x[0]
    units = [t / t.norm() for t in x if t.norm() > tol]
    if not units:
        return torch.zeros_like(x[0])
    u = sum(units) / len(units)
    u = units[0] if u.norm() < tol else u / u.norm()
    for _ in range(max_iter):
        step = torch.zeros_like(u)
        for v in units:
            angle = math.acos(max(-1.0, min(1.0, (u * v).sum().item())))
            if tol <= angle <= math.pi - tol:
                step = step + angle / math.sin(angle) * (v - math.cos(angle) * u) / len(units)
        if step.norm() < tol:
            break
        u = step.norm().cos() * u + step.norm().sin() * step / step.norm()
        u = u / u.norm()
    return u * sum(t.norm() for t in x) / len(x)


class TestSpherical(MethodSuite):
    ORACLES = {
        "slerp": slerp,
        "multislerp": multislerp,
        "karcher": karcher,
    }
    CASES = [
        Case("slerp", 2, {"t": 0.3}),
        Case("multislerp", 3, W3),
        Case("multislerp", 3, W3 | {"normalize_weights": False}, base=True, keeps_equals=False),
        Case("karcher", 3),
        Case("karcher", 5, {"max_iter": 3}),
    ]
    REFUSED = [
        ("multislerp", 2, {"weight": [1, -1]}, "sum to zero"),
        ("karcher", 2, {"max_iter": -1}, "max_iter of 0 or more"),
        ("multislerp", 2, {"eps": 0}, "eps above 0"),
    ]


def test_directions_that_cancel_out_are_named() -> None:
    a = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0]), torch.tensor([0.0, 0.0])
    with pytest.raises(sm.TaskError, match="cancel out"):
        merge_tensors("multislerp", *a)
