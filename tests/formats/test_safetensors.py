"""The safetensors format."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import streammerge as sm
from formats.suite import FormatSuite, Tensors


def test_packed_fp4_doubles_its_last_dimension(tmp_path: Path) -> None:
    value = torch.arange(12, dtype=torch.uint8).view(3, 4).view(torch.float4_e2m1fn_x2)
    torch.save({"w": value}, tmp_path / "in.pth")
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    header = (tmp_path / "out.safetensors").read_bytes()[8:]
    assert b'"dtype":"F4","shape":[3,8]' in header
    sm.convert(tmp_path / "out.safetensors", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["w"]
    assert back.shape == (3, 4)
    assert back.view(torch.uint8).tolist() == value.view(torch.uint8).tolist()


class TestSafetensors(FormatSuite):
    DTYPES = (*FormatSuite.DTYPES, torch.float8_e4m3fn, torch.float8_e5m2)

    def write(self, path: Path, tensors: Tensors) -> None:
        save_file(tensors, path)
