"""Writes GGUF files for tests, from the description of the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
TYPES |= {
    "Q5_K": 13,
    "Q6_K": 14,
    "IQ4_NL": 20,
    "IQ4_XS": 23,
    "I8": 24,
    "I16": 25,
    "I32": 26,
    "I64": 27,
    "F64": 28,
    "BF16": 30,
}
TYPES |= {"MXFP4": 39, "NVFP4": 40}
TORCH = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
TORCH |= {"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64"}
Tensor = tuple[str, tuple[int, ...], bytes]
"""Type, shape as torch counts it, and bytes."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(given: Any) -> bytes:
    """Returns a value of the metadata with its type before it."""
    if isinstance(given, bool):
        return struct.pack("<I?", 7, given)
    if isinstance(given, int):
        return struct.pack("<II", 4, given)
    if isinstance(given, float):
        return struct.pack("<If", 6, given)
    if isinstance(given, str):
        return struct.pack("<I", 8) + text(given)
    parts = [value(each) for each in given]
    kind = parts[0][:4] if parts else struct.pack("<I", 4)
    return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], alignment: int = 32, version: int = 3) -> bytes:
    """Returns a file of these tensors."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + value(given) for key, given in metadata.items())
    data = b""
    for name, (kind, shape, octets) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[kind], len(data))
        data += octets
    return head + b"\0" * (-len(head) % alignment) + data


def plain(tensor: torch.Tensor) -> Tensor:
    import torch

    octets = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return TORCH[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), octets


def q8_0(numbers: torch.Tensor) -> tuple[Tensor, torch.Tensor]:
    """Returns numbers in blocks of 32 with a scale, and the numbers that these stand for."""
    import torch

    blocks = numbers.reshape(-1, 32)
    scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
    codes = (blocks / scales.float()).round().nan_to_num().to(torch.int8)
    octets = torch.cat((scales.view(torch.uint8), codes.view(torch.uint8)), 1)
    return ("Q8_0", tuple(numbers.shape), octets.numpy().tobytes()), (scales.float() * codes.float()).reshape(numbers.shape)


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], **more: Any) -> None:
    path.write_bytes(gguf(metadata, tensors, **more))
