"""The format of torch.save before 1.6."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import assert_same, load_safetensors

import streammerge as sm
from formats.suite import FormatSuite, Tensors


def test_legacy_storage_views(tmp_path: Path) -> None:
    base = torch.randn(40)
    content = {"a": base[:10].view(2, 5), "b": base[10:], "whole": base}
    torch.save(content, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), content)


class TestTorchLegacy(FormatSuite):
    def write(self, path: Path, tensors: Tensors) -> None:
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
