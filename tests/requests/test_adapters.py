"""Adapters among the inputs of a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from adapters.arithmetic import Q, adapter_of, base_of, base_tensors, drawn, factors
from streammerge.requests.adapters import adapters_of, float_dtype, on_base, refuse_others
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
    assert [each.index.path.name for each in adapters_of(names, held)] == ["folder", "file.safetensors"]
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
