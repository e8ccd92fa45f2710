"""Folders as outputs: shards, index, side files. The oracles are json and safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from safetensors.torch import load_file, save_file

import streammerge as sm

TENSORS = {f"layers.{n}.w": torch.full((25,), float(n)) for n in range(5)} | {"e": torch.empty(0), "s": torch.tensor(1.0)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "in.safetensors", {"mine": "kept", "sshs_model_hash": "old", "format": "tf"})
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize(("largest", "files"), [(None, 1), (504, 1), (503, 2), (200, 3), (199, 5), (100, 6), (1, 7)])
def test_shards_are_filled_in_order_up_to_the_largest_size(single: Path, largest: int | None, files: int) -> None:
    out = single.parent / "out"
    made = sm.convert(single, out, max_shard_size=largest)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == files
    assert len({p.name for p in shards}) == len(made.plan.layout.receipt.checksums) - (files > 1)
    held = [load_file(path) for path in shards]
    assert_same({name: tensor for each in held for name, tensor in each.items()}, TENSORS)
    assert all(sum(t.nbytes for t in each.values()) <= max(largest or 1 << 30, 100) for each in held)
    index = out / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert content["weight_map"] == {n: p.name for p, each in zip(shards, held, strict=True) for n in each}


def test_a_folder_stores_tied_tensors_once_and_a_file_twice(tmp_path: Path) -> None:
    shared = torch.ones(3)
    torch.save({"model": {"a": shared, "b": shared}, "step": 3}, tmp_path / "in.pth")
    folder = sm.convert(tmp_path / "in.pth", tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["a"]
    assert any("without b" in note for note in folder.notes)
    file = sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), {"a": shared, "b": shared})
    for made in (folder, file):
        assert "left out of the output: step (a safetensors file holds tensors only)" in made.notes
