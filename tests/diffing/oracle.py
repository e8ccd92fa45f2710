"""What a comparison must find, computed by numpy over whole arrays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm

GRAIN, PIECE = 1 << 16, 1 << 22
Tensors = dict[str, torch.Tensor]


def wide(tensor: torch.Tensor) -> numpy.ndarray[Any, Any]:
    """Returns numbers as float64, with the parts of a complex number side by side."""
    flat = torch.view_as_real(tensor.contiguous()) if tensor.is_complex() else tensor
    return flat.reshape(-1).double().numpy()


def bits(tensor: torch.Tensor) -> numpy.ndarray[Any, Any]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().reshape(tensor.numel(), tensor.element_size())


def ratio(one: float, two: float) -> float | None:
    return one / two if two else math.inf if one else 0.0


def cosine(x: numpy.ndarray[Any, Any], y: numpy.ndarray[Any, Any]) -> float | None:
    length = float(numpy.linalg.norm(x)) * float(numpy.linalg.norm(y))
    return float(x @ y) / length if length else None


def expected(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None = None) -> dict[str, Any]:
    """Returns the measures of two tensors, and of the changes of their base."""
    x, y = wide(a), wide(b)
    other_values = (x != y) & ~(numpy.isnan(x) & numpy.isnan(y))
    differ = (bits(a) != bits(b)).any(axis=1) if a.dtype == b.dtype else other_values
    kept = numpy.isfinite(x) & numpy.isfinite(y)
    if base is not None:
        kept &= numpy.isfinite(z := wide(base))
    x, y = numpy.where(kept, x, 0), numpy.where(kept, y, 0)
    change = y - x
    pairs = change.reshape(-1, 2) if a.is_complex() else change.reshape(-1, 1)
    found = {
        "elems": a.numel(),
        "differing": int(differ.sum()),
        "nonfinite": int((~kept).sum()),
        "relative": ratio(float(numpy.linalg.norm(change)), float(numpy.linalg.norm(x))),
        "cosine": cosine(x, y),
        "largest": float(numpy.linalg.norm(pairs, axis=1).max(initial=0)),
    }
    if base is None:
        return found
    z = numpy.where(kept, z, 0)
    p, q = x - z, y - z
    both = (p != 0) & (q != 0)
    tops = [top(each, "float64" if torch.float64 in (a.dtype, b.dtype, base.dtype) else "float32") for each in (p, q)]
    fewer = min(map(len, tops))
    return found | {
        "relative_a": ratio(float(numpy.linalg.norm(p)), float(numpy.linalg.norm(z))),
        "relative_b": ratio(float(numpy.linalg.norm(q)), float(numpy.linalg.norm(z))),
        "changes": cosine(p, q),
        "equal_signs": float((p * q > 0)[both].mean()) if both.any() else None,
        "overlap": len(tops[0] & tops[1]) / fewer if fewer else None,
    }


def top(change: numpy.ndarray[Any, Any], dtype: str) -> set[int]:
    """Returns the places of the largest tenth of a change by magnitude, the first of equal ones, without zeros."""
    sizes = numpy.abs(change.astype(dtype))
    order = numpy.argsort(-sizes, kind="stable")[: max(len(sizes) // 10, 1)]
    return {int(place) for place in order if sizes[place]}


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.complex(*(draw(shape, torch.float32, seed + 50 * part, scale) for part in range(2))).to(dtype)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def near(tensor: torch.Tensor, seed: int, share: float = 0.7) -> torch.Tensor:
    """Returns a tensor that differs in a share of its elements."""
    generator = torch.Generator().manual_seed(seed)
    moved = tensor.float() + 0.1 * torch.randn(tensor.shape, generator=generator)
    return torch.where(torch.rand(tensor.shape, generator=generator) < share, moved.to(tensor.dtype), tensor)


def check(found: Any, want: dict[str, Any]) -> None:
    measured = {"elems": found.elems, "differing": found.sums.differing, "nonfinite": found.nonfinite}
    measured |= {"relative": found.relative, "cosine": found.cosine, "largest": found.largest}
    if "changes" in want:
        agreement = found.agreement
        measured |= {name: getattr(agreement, name) for name in ("relative_a", "relative_b", "equal_signs", "overlap")}
        measured["changes"] = agreement.cosine
    for name, value in want.items():
        if isinstance(value, float):
            assert measured[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        else:
            assert measured[name] == value, name
    assert found.equal == (not want["differing"])


def compared(folder: Path, a: Tensors, b: Tensors, base: Tensors | None = None, **options: Any) -> dict[str, Any]:
    for name, tensors in (("a", a), ("b", b), ("c", base)):
        if tensors is not None:
            save_file(tensors, folder / f"{name}.safetensors")
    names = [folder / f"{name}.safetensors" for name in ("a", "b", "c")[: 2 + (base is not None)]]
    return {each.name: each for each in sm.diff(*names, **options).tensors}
