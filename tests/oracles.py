"""Every merge method again, from its paper: whole tensors, float64, sorts and norms, no code of the package.

``ORACLES[name](models, base, draws, **parameters)``; ``draws`` are the uniform numbers of each model, for random ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


def linear(x: list[Tensor], b: Any, draws: Any, weight: list[float], normalize: bool = True) -> Tensor:
    return sum(w * t for w, t in zip(weight, x, strict=True)) / (sum(weight) if normalize else 1)


def ema(x: list[Tensor], b: Any, draws: Any, decay: float = 0.9) -> Tensor:
    mean = x[0]
    for t in x[1:]:
        mean = decay * mean + (1 - decay) * t
    return mean


def slerp(x: list[Tensor], b: Any, draws: Any, t: float) -> Tensor:
    v0, v1 = x
    cos = (unit(v0) * unit(v1)).sum().item()
    if abs(cos) > 0.9995:
        return (1 - t) * v0 + t * v1
    angle = math.acos(cos)
    return (math.sin((1 - t) * angle) * v0 + math.sin(t * angle) * v1) / math.sin(angle)


def unit(v: Tensor) -> Tensor:
    return v / v.norm() if v.norm() > 1e-8 else v


def nuslerp(
    x: list[Tensor],
    b: Any,
    draws: Any,
    weight: list[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    v = [t if b is None else t - b for t in x]
    t = 0.5 if abs(sum(weight)) < 1e-6 else weight[1] / sum(weight)
    if nuslerp_flatten or v[0].dim() == 0:
        v = [a.reshape(1, -1) for a in v]
    elif nuslerp_row_wise and v[0].dim() > 1:
        v = [a.reshape(a.shape[0], -1).T for a in v]
    else:
        v = [a.reshape(-1, a.shape[-1]) for a in v]
    p, q = v
    lengths = [a.norm(dim=1, keepdim=True).clamp(min=1e-7) for a in v]
    cos = (p / lengths[0] * q / lengths[1]).sum(1, keepdim=True).clamp(-1, 1)
    angle, line = cos.acos(), 1 - cos * cos <= 1e-16
    arc = (torch.sin((1 - t) * angle) * p + torch.sin(t * angle) * q) / angle.sin()
    mixed = torch.where(line, (1 - t) * p + t * q, arc)
    if not nuslerp_flatten and nuslerp_row_wise and x[0].dim() > 1:
        mixed = mixed.T
    return mixed.reshape(x[0].shape) + (0 if b is None else b)


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


def top(values: Tensor, k: int) -> Tensor:
    """1 for the k largest, the first of equal ones; 0 elsewhere."""
    mask = torch.zeros(values.numel(), dtype=torch.float64)
    mask[values.reshape(-1).argsort(descending=True, stable=True)[:k]] = 1
    return mask.reshape(values.shape)


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
    """Task arithmetic with that pruning, with or without the election of signs, and these defaults."""
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
            agree = d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0)
            mixed, divisor = (d * agree).sum(0), (w * agree).sum(0)
            divisor = torch.where(divisor == 0, 1.0, divisor)
        else:
            mixed, divisor = d.sum(0), w.sum(0)
            divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        if p["normalize"]:
            mixed = mixed / divisor
        return b + p.get("lambda_", 1.0) * mixed

    return merged


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


def sce(x: list[Tensor], b: Tensor, draws: Any, select_topk: float = 1.0) -> Tensor:
    if not x:
        return b
    d = torch.stack([t - b for t in x])
    if select_topk < 1:
        variance = d.var(0, unbiased=False)
        d = d * top(variance, int(int(variance.count_nonzero()) * select_topk))
    agree = d.sign() == torch.where(d.sum(0) >= 0, 1.0, -1.0)
    energy = d.square().reshape(len(x), -1).mean(1)
    share = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(x))
    w = share.reshape(-1, *[1] * b.dim()) * agree
    return b + (d * w).sum(0) / w.sum(0).clamp(min=1e-6)


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


def nearswap(x: list[Tensor], b: Tensor, draws: Any, t: float) -> Tensor:
    w = (t / (b - x[0]).abs().clamp(min=1e-6)).clamp(0, 1)
    return w * x[0] + (1 - w) * b


def arcee_fusion(x: list[Tensor], b: Tensor, draws: Any) -> Tensor:
    p, q = (torch.softmax(t, -1) + 1e-8 for t in (x[0], b))
    importance = (x[0] - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True).reshape((*b.shape[:-1], 1) if b.dim() else ())
    ordered, n = importance.reshape(-1).sort().values, b.numel()
    first, middle, third = (ordered[int(s * (n - 1))] for s in (0.25, 0.5, 0.75))
    return b + (x[0] - b) * (importance >= middle + 1.5 * (third - first))


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


def perpendicular(a: Tensor, b: Tensor) -> Tensor:
    return b - a * (a * b).sum() / (a * a).sum() if a.norm() > 0 else torch.zeros_like(b)


def train_difference(x: list[Tensor], b: Tensor, draws: Any, alpha: float = 1.0) -> Tensor:
    apart, learned = (x[1] - x[0]).abs(), x[1] - b
    return x[0] + 1.8 * alpha * torch.nan_to_num(apart / (apart + learned.abs()), nan=0.0) * learned


ORACLES: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "n_average": lambda x, b, draws: sum(x) / len(x),
    "weighted_sum": lambda x, b, draws, alpha=0.5: torch.lerp(x[0], x[1], alpha),
    "ema": ema,
    "copy": lambda x, b, draws: x[0],
    "passthrough": lambda x, b, draws, scale=(1.0,): x[0] * scale[0],
    "slerp": slerp,
    "nuslerp": nuslerp,
    "multislerp": multislerp,
    "karcher": karcher,
    "task_arithmetic": arithmetic(None, elect=False, normalize=False, rescale=False),
    "ties": arithmetic(trimmed, elect=True, normalize=True, rescale=False),
    "dare_linear": arithmetic(dropped, elect=False, normalize=False, rescale=True),
    "dare_ties": arithmetic(dropped, elect=True, normalize=False, rescale=True),
    "breadcrumbs": arithmetic(without_outliers, elect=False, normalize=False, rescale=False),
    "breadcrumbs_ties": arithmetic(without_outliers, elect=True, normalize=False, rescale=False),
    "della": arithmetic(dropped_by_rank, elect=True, normalize=True, rescale=True),
    "della_linear": arithmetic(dropped_by_rank, elect=False, normalize=False, rescale=True),
    "model_stock": model_stock,
    "sce": sce,
    "ram": ram,
    "ramplus_tl": ramplus,
    "nearswap": nearswap,
    "arcee_fusion": arcee_fusion,
    "median": median,
    "geometric_median": geometric_median,
    "clamp": clamp,
    "add_difference": lambda x, b, draws, alpha=1.0: x[0] + alpha * (x[1] - b),
    "train_difference": train_difference,
    "perpendicular_component": lambda x, b, draws: perpendicular(x[0], x[1]),
    "add_perpendicular": lambda x, b, draws, alpha=1.0: x[0] + alpha * perpendicular(x[0] - b, x[1] - b),
}
