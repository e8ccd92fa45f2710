"""Tensors in compressed records are inflated into a temporary file first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors

import streammerge as sm


def strided() -> dict[str, torch.Tensor]:
    base = torch.arange(7 * 11 * 13, dtype=torch.float32)
    return {
        "transposed": base.view(7, 143).t(),
        "permuted": base.view(7, 11, 13).permute(2, 0, 1),
        "every_other": base[::2],
        "expanded": torch.tensor([1.0, 2.0]).unsqueeze(1).expand(2, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": base[5:9],
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "large": torch.randn(1500, 1301).t(),
    }


@pytest.mark.parametrize("out", ["out.safetensors", "out.pth"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_strided_tensors_come_out_contiguous(tmp_path: Path, legacy: bool, out: str) -> None:
    content = strided()
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=not legacy)
    sm.convert(tmp_path / "in.pth", tmp_path / out)
    made = load_safetensors(tmp_path / out) if out.endswith("s") else torch.load(tmp_path / out)
    assert_same(made, content)
    assert all(tensor.is_contiguous() for tensor in made.values())


def test_empty_lazy_tensors(tmp_path: Path) -> None:
    torch.save(
        {"z": torch.empty(0, 3, dtype=torch.complex64).conj(), "t": torch.empty(3, 0).t(), "w": torch.ones(2)},
        tmp_path / "in.pth",
    )
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert load_safetensors(tmp_path / "out.safetensors")["z"].shape == (0, 3)
