"""Quantised models for tests, made from the descriptions of their schemes with plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def in_blocks(numbers: torch.Tensor, rows: int, columns: int, height: int = 128, width: int = 128) -> torch.Tensor:
    """Returns one number for each element of a matrix, from a grid of numbers for its blocks."""
    wide = numbers.float().repeat_interleave(height, -2).repeat_interleave(width, -1)
    return wide[..., :rows, :columns]


def largest(weight: torch.Tensor, height: int = 128, width: int = 128) -> torch.Tensor:
    """Returns the largest magnitude of each block."""
    rows, columns = weight.shape[-2:]
    padded = torch.nn.functional.pad(weight.abs(), (0, -columns % width, 0, -rows % height))
    return padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height)).amax((-1, -3))


def fp8_blocks(weight: torch.Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes and scales of a weight: the scale of a block is its largest magnitude by 448."""
    scales = (largest(weight) / 448).to(scale_dtype)
    scales = torch.where(scales.float() == 0, torch.ones_like(scales.float()), scales.float()).to(scale_dtype)
    codes = (weight / in_blocks(scales, *weight.shape[-2:])).clamp(-448, 448).to(FP8)
    return codes, scales


def numbers_of(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.float() * in_blocks(scales, *codes.shape[-2:])


def fp8_model(folder: Path, seed: int, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """Writes a folder with weights in one shard and their scales in another. Returns the numbers of its tensors."""
    make = torch.Generator().manual_seed(seed)
    stored: Tensors = {"model.embed_tokens.weight": torch.randn(40, 200, generator=make).bfloat16()}
    numbers = dict(stored)
    for layer in range(2):
        for name, shape in (("q_proj", (200, 200)), ("up_proj", (300, 200)), ("down_proj", (200, 300))):
            key = f"model.layers.{layer}.{name}.weight"
            stored[key], stored[f"{key}_scale_inv"] = fp8_blocks(torch.randn(shape, generator=make), scale_dtype)
            numbers[key] = numbers_of(stored[key], stored[f"{key}_scale_inv"])
        key = f"model.layers.{layer}.norm.weight"
        stored[key] = numbers[key] = torch.randn(200, generator=make).bfloat16()
    write_folder(folder, [{n: t for n, t in stored.items() if n.endswith("scale_inv") is last} for last in (False, True)])
    return numbers


def write_folder(folder: Path, shards: list[Tensors], quantisation: dict[str, Any] | None = None) -> None:
    """Writes shards with their index, and a configuration."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "qwen3", "quantization_config": quantisation or FP8_CONFIG, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def load_folder(folder: Path) -> Tensors:
    from conftest import load_safetensors

    return {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_safetensors(file).items()
    }


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def packed(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns rows of non-negative integers as dense streams of bits in int32 words."""
    rows, columns = fields.reshape(-1, fields.shape[-1]), fields.shape[-1]
    count = -(-columns * bits // 32)
    stream = torch.zeros(len(rows), count * 32, dtype=torch.int64)
    for bit in range(bits):
        stream[:, bit : columns * bits : bits] = rows >> bit & 1
    words = (stream.view(len(rows), count, 32) << torch.arange(32)).sum(-1)
    return words.to(torch.int32).view(*fields.shape[:-1], count)


def swizzled(grid: torch.Tensor) -> torch.Tensor:
    """Returns a grid of bytes in tiles of 128 x 4, padded with zeros: each byte is put to its place."""
    octets, (rows, columns) = grid.view(torch.uint8), grid.shape
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = row // 128 * (wide // 4) + column // 4
    made = torch.zeros(high * wide, dtype=torch.uint8)
    made[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = octets
    return made.view(grid.dtype).view(high, wide)


def mxfp4_experts(experts: int, outputs: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns blocks and scales of experts, and their numbers: rows and columns are swapped."""
    make = torch.Generator().manual_seed(experts)
    codes = torch.randint(0, 16, (experts, outputs, groups, 32), generator=make)
    scales = torch.randint(110, 135, (experts, outputs, groups), generator=make, dtype=torch.uint8)
    blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
    numbers = E2M1[codes] * torch.exp2(scales.float() - 127).unsqueeze(-1)
    return blocks, scales, numbers.reshape(experts, outputs, -1).transpose(1, 2).contiguous()
