"""model_stock against its oracle: a point between base and mean, by the angle between the models."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from methods.suite import Case, MethodSuite
from streammerge.methods.model_stock import _of_numbers, _ratio

Tensor = torch.Tensor


def model_stock(x: list[Tensor], b: Tensor, draws: Any, filter_wise: bool = False) -> Tensor:
    n = len(x)
    if filter_wise and b.dim() > 1:
        tables = [t.reshape(-1, b.shape[-1]) for t in (b, *x)]
        rows = [model_stock(models, base, None) for base, *models in zip(*tables, strict=True)]
        return torch.stack(rows).reshape(b.shape)
    d = [t - b for t in x]
    pairs = [
        ((p * q).sum() / max((p.norm() * q.norm()).item(), 1e-6)).clamp(-1, 1) for p, q in itertools.combinations(d, 2)
    ]
    c = sum(pairs) / len(pairs)
    t = 0 if abs(1 + (n - 1) * c) < 1e-6 else n * c / (1 + (n - 1) * c)
    return t * sum(x) / n + (1 - t) * b


class TestModelStock(MethodSuite):
    ORACLES = {"model_stock": model_stock}
    CASES = [
        Case("model_stock", 3),
        Case("model_stock", 2, {"filter_wise": True}),
    ]


@pytest.mark.parametrize("models", [2, 3, 9])
def test_one_tensor_has_the_ratio_that_many_rows_have(models: int) -> None:
    """To the last bit, also for opposite models and for NaN."""
    make = torch.Generator().manual_seed(1)
    for _ in range(200):
        deltas = torch.randn(models, 3, generator=make, dtype=torch.float64)
        for own in (deltas, deltas[:1] * torch.tensor([[1.0]] + [[-1.0]] * (models - 1)), deltas * 0, deltas * torch.nan):
            gram = own.double() @ own.double().T
            assert repr(_of_numbers(gram.tolist(), models)) == repr(_ratio(gram.unbind(), models).item())
