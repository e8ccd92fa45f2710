"""Sums of deltas with each way of pruning, with and without election of signs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from methods.oracles import elected, top
from methods.suite import W2, W3, Case, MethodSuite
from streammerge.methods.registry import merge_tensors

Tensor = torch.Tensor


def trimmed(delta: Tensor, density: float) -> Tensor:
    if density >= 1:
        return delta
    return delta * top(delta.abs(), max(1, int(density * delta.numel())))


def without_outliers(delta: Tensor, density: float, gamma: float) -> Tensor:
    if density >= 1:
        return delta
    n = delta.numel()
    keep, outliers = int(density * n), int(gamma * n)
    outliers = min(outliers, n - keep)
    return delta * (top(delta.abs(), outliers + keep) - top(delta.abs(), outliers))


def dropped(delta: Tensor, density: float, draw: Tensor) -> Tensor:
    return delta if density >= 1 else delta * (draw < density)


def dropped_by_rank(delta: Tensor, density: float, epsilon: float, draw: Tensor) -> Tensor:
    if density >= 1:
        return delta
    table = delta.reshape(1, -1) if delta.dim() < 2 else delta
    n = table.shape[1]
    if n == 1:
        return delta
    ranks = torch.empty_like(table)
    for fibre in itertools.product(*(range(s) for i, s in enumerate(table.shape) if i != 1)):
        where = (fibre[0], slice(None), *fibre[1:])
        order = table[where].abs().argsort(descending=True, stable=True)
        ranks[where] = ranks[where].scatter(0, order, torch.arange(n - 1, -1, -1, dtype=ranks.dtype))
    chance = density - epsilon + 2 * epsilon * ranks / (n - 1)
    return delta * (draw < chance.reshape(delta.shape))


def rescale_to(sparse: Tensor, delta: Tensor) -> Tensor:
    before, after = delta.abs().sum(), sparse.abs().sum()
    return sparse if before < 1e-7 or after < 1e-7 else sparse * before / after


def arithmetic(prune: Callable[..., Tensor] | None, elect: bool, normalize: bool, rescale: bool) -> Callable[..., Tensor]:
    """Returns task arithmetic with this pruning, with or without election of signs, and with these defaults."""
    defaults = {"normalize": normalize, "rescale": rescale}

    def merged(x: list[Tensor], b: Tensor, draws: list[Tensor], weight: list[float], **given: Any) -> Tensor:
        p = defaults | given
        if not x:
            return b
        sparse = []
        for m, t in enumerate(x):
            delta = t - b
            density = p.get("density", [1.0] * len(x))[m]
            if prune is None or density >= 1:
                sparse.append(delta)
                continue
            own = [p[name][m] for name in ("gamma", "epsilon") if name in p]
            kept = prune(delta, density, *own, *([draws[m]] if prune in (dropped, dropped_by_rank) else []))
            sparse.append(rescale_to(kept, delta) if p["rescale"] else kept)
        d = torch.stack([w * s for w, s in zip(weight, sparse, strict=True)])
        w = torch.tensor(weight, dtype=torch.float64).reshape(-1, *[1] * b.dim())
        if elect:
            agree = elected(d)
            mixed, divisor = (d * agree).sum(0), (w * agree).sum(0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        else:
            mixed, divisor = d.sum(0), w.sum(0)
            divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        if p["normalize"]:
            mixed = mixed / divisor
        return b + p.get("lambda_", 1.0) * mixed

    return merged


class TestTaskArithmetic(MethodSuite):
    ORACLES = {
        "task_arithmetic": arithmetic(None, elect=False, normalize=False, rescale=False),
        "ties": arithmetic(trimmed, elect=True, normalize=True, rescale=False),
        "breadcrumbs": arithmetic(without_outliers, elect=False, normalize=False, rescale=False),
        "breadcrumbs_ties": arithmetic(without_outliers, elect=True, normalize=False, rescale=False),
        "dare_linear": arithmetic(dropped, elect=False, normalize=False, rescale=True),
        "dare_ties": arithmetic(dropped, elect=True, normalize=False, rescale=True),
        "della": arithmetic(dropped_by_rank, elect=True, normalize=True, rescale=True),
        "della_linear": arithmetic(dropped_by_rank, elect=False, normalize=False, rescale=True),
    }
    CASES = [
        Case("task_arithmetic", 2, W2 | {"lambda_": 0.6}),
        Case("task_arithmetic", 3, W3 | {"normalize": True}),
        Case("ties", 2, W2 | {"density": [0.5, 0.5]}),
        Case("ties", 3, W3 | {"density": [0.2, 1.0, 0.01], "rescale": True, "lambda_": 1.3}),
        Case("ties", 2, W2 | {"density": [0.999, 0.3], "normalize": False}),
        Case("breadcrumbs", 2, W2 | {"density": [0.5, 0.9], "gamma": [0.01, 0.3]}),
        Case("breadcrumbs_ties", 3, W3 | {"density": [0.5, 0.05, 1.0], "gamma": [0.01, 0.0, 0.1], "normalize": True}),
        Case("dare_linear", 2, W2 | {"density": [0.5, 0.9]}),
        Case("dare_linear", 2, W2 | {"density": [0.3, 1.0], "rescale": False}),
        Case("dare_ties", 3, W3 | {"density": [0.3, 0.5, 0.7], "normalize": True}),
        Case("della", 2, W2 | {"density": [0.5, 0.3], "epsilon": [0.15, 0.1]}),
        Case("della_linear", 2, W2 | {"density": [0.5, 0.3], "epsilon": [0.2, 0.0]}),
    ]
    REFUSED = [
        ("ties", 2, {"density": -0.5}, "from 0 (none) to 1 (all), not -0.5"),
        ("ties", 2, {"density": math.nan}, "not nan"),
        ("breadcrumbs", 2, {"gamma": 1}, "gamma is the share"),
        ("della", 2, {"density": 0.9}, "choose a smaller epsilon"),
        ("della", 2, {"density": 0.5, "epsilon": -0.1}, "choose a smaller epsilon"),
    ]


def test_as_many_nan_as_are_kept() -> None:
    values = torch.arange(1.0, 11.0)
    values[[2, 5]] = math.nan
    result = merge_tensors("ties", values, base=torch.zeros(10), density=0.1, normalize=False)
    assert result.isnan().nonzero()[:, 0].tolist() == [2, 5]
    assert float(result.nansum()) == 0


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_kept_share_mean_and_factor(method: str) -> None:
    """Over many draws: the kept share, the unbiased mean, and the factor that restores the sum of magnitudes."""
    base, delta = torch.zeros(64, 512), torch.randn(64, 512, generator=torch.Generator().manual_seed(2))
    density, total, shares = 0.4, torch.zeros(64, 512), []
    for seed in range(200):
        result = merge_tensors(method, base + delta, base=base, seed=seed, density=density, rescale=False)
        kept = result != 0
        assert torch.equal(result[kept], delta[kept])
        shares.append(float(kept.float().mean()))
        total += kept
    spread = math.sqrt(density * (1 - density) / delta.numel() / len(shares))
    assert abs(sum(shares) / len(shares) - density) < 5 * spread
    if method == "dare_linear":
        assert float((total / 200 - density).abs().max()) < 5 * math.sqrt(0.24 / 200)
    else:  # larger elements of a row are kept more often, from 0.25 to 0.55
        order = delta.abs().argsort(dim=1)
        often = (total / 200).gather(1, order).mean(0)
        assert abs(float(often[:50].mean()) - 0.265) < 0.02
        assert abs(float(often[-50:].mean()) - 0.535) < 0.02
    scaled = merge_tensors(method, base + delta, base=base, seed=1, density=density)
    assert float(scaled.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
