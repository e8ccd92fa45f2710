"""Small models with names as real ones have them, and merges of them in the working directory."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int, prefix: str = "", layers: int = 3) -> Tensors:
    made = {f"{prefix}layers.{n}.attn.q_proj.weight": draw(seed + n, 4, 4) for n in range(layers)}
    return made | {f"{prefix}embed.weight": draw(seed + 90, 9, 4), f"{prefix}norm.weight": draw(seed + 91, 4)}


def saved(**states: Tensors) -> None:
    for name, tensors in states.items():
        save_file(tensors, f"{name}.safetensors")


def merged(*names: str, **options: object) -> tuple[Tensors, sm.Result]:
    result = sm.merge([f"{n}.safetensors" for n in names], "out.safetensors", overwrite=True, **options)  # type: ignore[arg-type]
    return load_safetensors(Path("out.safetensors")), result


def mean(*tensors: torch.Tensor) -> torch.Tensor:
    return (sum(t.double() for t in tensors) / len(tensors)).to(tensors[0].dtype)  # type: ignore[union-attr]
