"""Bases and adapters, written as files, and the arithmetic of adapters in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import streammerge as sm

Tensor = torch.Tensor
Tensors = dict[str, Tensor]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def base_of(tensors: Tensors, name: str = "base", **config: Any) -> str:
    folder = Path(name)
    folder.mkdir()
    save_file({key: each.contiguous() for key, each in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return name


def adapter_of(tensors: Tensors, name: str = "lora", config: Mapping[str, Any] | None = None) -> str:
    """Writes an adapter: a PEFT folder if there is a configuration, else one file."""
    if config is None:
        save_file({key: each.contiguous() for key, each in tensors.items()}, f"{name}.safetensors")
        return f"{name}.safetensors"
    folder = Path(name)
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": each.contiguous() for key, each in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | dict(config)))
    return name


def baked(model: str, **options: Any) -> Tensors:
    """Returns the tensors of a model with its adapters, as a conversion writes them."""
    sm.convert(model, "out.safetensors", overwrite=True, **options)
    return load_file("out.safetensors")


def same(made: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Checks that tensors are the float64 results, rounded once to the dtype of each."""
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        rounded = tensor.to(made[name].dtype)
        assert made[name].shape == tensor.shape, name
        differing = (made[name] != rounded).sum().item()
        assert differing <= tensor.numel() * 1e-4, f"{name}: {differing} of {tensor.numel()}"
        torch.testing.assert_close(made[name].double(), rounded.double(), rtol=2**-7, atol=1e-6)


def base_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    return {
        f"{Q}.weight": drawn(1, 24, 16, dtype=dtype),
        f"{V}.weight": drawn(2, 12, 16, dtype=dtype),
        "model.embed_tokens.weight": drawn(3, 30, 16, dtype=dtype),
        "lm_head.weight": drawn(4, 30, 16, dtype=dtype),
        f"{Q}.bias": drawn(5, 24, dtype=dtype),
    }


def factors(module: str, out: int, inner: int, rank: int = 4, seed: int = 10) -> Tensors:
    return {
        f"{module}.lora_A.weight": drawn(seed, rank, inner),
        f"{module}.lora_B.weight": drawn(seed + 1, out, rank),
    }


def change(tensors: Tensors, module: str, scale: float) -> torch.Tensor:
    return scale * (tensors[f"{module}.lora_B.weight"].double() @ tensors[f"{module}.lora_A.weight"].double())
