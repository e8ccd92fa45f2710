"""Greedy soups; more in test_sweeping.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm


def test_the_soup_is_the_mean_of_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", 0.5), ("b", 1.3), ("c", 4.0)):
        save_file({"w": torch.full((9,), value)}, f"{name}.safetensors")

    def loss(path: str) -> float:
        return abs(float(load_file(path)["w"][0]) - 1)

    result = sm.sweep(["a.safetensors", "b.safetensors", "c.safetensors"], "out", soup="greedy", score=loss, lowest=True)
    assert [each.settings["models"] for each in result.outputs[3:]] == ["2+1", "2+1+3"]
    (kept,) = result.kept
    assert torch.equal(load_file(kept.out)["w"], torch.full((9,), 0.9))
    again = sm.sweep(["a.safetensors", "b.safetensors", "c.safetensors"], "out", soup="greedy", score=loss, lowest=True)
    assert [each.out for each in again.kept] == [kept.out]
