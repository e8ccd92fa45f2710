"""A run leaves torch's settings as they were."""

from __future__ import annotations

from pathlib import Path

import torch

import streammerge as sm


def test_the_callers_torch_threads_are_left_alone(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pth")
    before = torch.get_num_threads()
    sm.merge([tmp_path / "in.pth"], tmp_path / "out.pth")
    assert torch.get_num_threads() == before
