"""Adapters among the inputs of a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm
from adapters.arithmetic import Q, adapter_of, base_of, base_tensors, drawn, factors
from loopback_hub import Hub
from streammerge.requests.adapters import are_adapters, float_dtype, on_base, refuse_others
from streammerge.tensors.dtypes import DType


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_adapters_are_told_from_models() -> None:
    adapter_of(factors(Q, 24, 16), "folder", {"r": 4, "lora_alpha": 4})
    adapter_of(factors(Q, 24, 16), "file")
    base_of(base_tensors())
    save_file({"explorations.weight": drawn(1, 3)}, "model.safetensors")
    names = ["folder", "file.safetensors", "base", "model.safetensors", "base+folder", "absent", "held"]
    held = {"held": {"w": torch.zeros(1)}}
    assert [name for name in names if are_adapters([name], held)] == ["folder", "file.safetensors"]
    assert are_adapters(names[:2])
    assert not are_adapters(names)
    assert not are_adapters([])
    assert on_base(["folder", "base"], "base", held) == ["base + folder", "base"]
    assert on_base(["base", "folder"], "base", held) == ["base", "folder"]
    assert on_base(["folder"], None, held) == ["folder"]


def test_options_without_a_meaning_are_named() -> None:
    refuse_others({"rename": None, "hash": False})
    with pytest.raises(sm.RecipeError, match="`rename`"):
        refuse_others({"rename": ("a=b",)})


def test_dtypes_of_factors_are_floating_point_numbers() -> None:
    assert float_dtype("bfloat16") is DType.BF16
    for wrong in ("int8", "float8_e4m3fn", "x", 3):
        with pytest.raises(sm.RecipeError):
            float_dtype(wrong)


def test_adapters_and_revisions_of_the_hub(hub: Hub) -> None:
    """`org/base@main+org/lora@v2`: each name is read where the hub has it at that revision."""
    base = base_tensors()
    base_of(base)
    for name, seed in (("one", 3), ("two", 20)):
        adapter_of(factors(Q, 24, 16, seed=seed), name, {"r": 4, "lora_alpha": 4})
    folders = {name: {file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("base", "one", "two")}
    hub.add("org/base", folders["base"])
    hub.add("org/lora", folders["one"])
    hub.repos["org/lora"].commit(folders["two"], branch="v2")
    sm.convert("base+two", "here.safetensors")
    text = "org/base@main+org/lora@v2"
    sm.merge(recipe={"merge_method": "passthrough", "models": [text]}, out="hub.safetensors")
    sm.convert(text, "converted.safetensors")
    for made in ("hub", "converted"):
        for name, tensor in load_file("here.safetensors").items():
            assert torch.equal(load_file(f"{made}.safetensors")[name], tensor)
    sm.merge(["one", "two"], "local/")
    sm.merge(["org/lora", "org/lora@v2"], "remote/")
    sm.merge(recipe={"merge_method": "linear", "models": ["org/lora", "org/lora@v2"]}, out="read/")
    wanted = Path("local/adapter_model.safetensors").read_bytes()
    for made in ("remote", "read"):
        assert Path(made, "adapter_model.safetensors").read_bytes() == wanted
    assert "were not computed again" in sm.verify("remote/").notes[0]  # a name in a receipt asks no hub
