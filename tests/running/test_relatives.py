"""Checkpoints of one training are distinguished from unrelated ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_trainings_are_told_from_fine_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = {name: {f"l{i}.weight": draw(s + i, 64, 64) for i in range(3)} for name, s in (("a", 0), ("b", 50))}
    tuned = {name: t + 0.1 * draw(99, 64, 64) for name, t in made["a"].items()}
    for tensors in (*made.values(), tuned):
        tensors["norm.weight"] = torch.ones(512)
    for name, tensors in (*made.items(), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    related = sm.merge(["a.safetensors", "tuned.safetensors"], "one.safetensors")
    assert related.warnings == ()
    apart = sm.merge(["a.safetensors", "tuned.safetensors", "b.safetensors"], "two.safetensors")
    assert len(apart.warnings) == 1
    assert "b.safetensors has the names and shapes of a.safetensors but seems to come from another" in apart.warnings[0]
    u, v = (torch.stack([made[n][f"l{i}.weight"].flatten() for i in range(3)]).double() for n in "ab")
    median = torch.nn.functional.cosine_similarity(u, v).median().item()
    assert f"median cosine of 3 sampled tensors is {median:.3f}" in apart.warnings[0]
