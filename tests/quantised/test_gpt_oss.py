"""Experts of gpt-oss: blocks and scales in two tensors, and the parameter that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import load_safetensors

import streammerge as sm
from quantised.samples import Tensors, mxfp4_experts, write_folder


def model(folder: str, seed: int) -> Tensors:
    torch.manual_seed(seed)
    stored: Tensors = {"model.layers.0.mlp.experts.gate_up_proj_bias": torch.randn(2, 6).bfloat16()}
    numbers = dict(stored)
    for name, sizes in (("gate_up_proj", (2, 6, 3)), ("down_proj", (2, 96, 1))):
        blocks, scales, made = mxfp4_experts(*sizes)
        key = f"model.layers.0.mlp.experts.{name}"
        scales = scales + seed
        stored |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        numbers[key] = made * 2**seed
    write_folder(Path(folder), [stored], {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return numbers


def test_experts_are_merged_as_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = model("a", 0), model("b", 1)
    sm.merge(["a", "b"], "out/")
    made = load_safetensors(Path("out/model-00001-of-00001.safetensors"))
    assert made.keys() == a.keys()
    for name, tensor in made.items():
        assert torch.equal(tensor, ((a[name].double() + b[name].double()) / 2).bfloat16()), name
    assert "quantization_config" not in Path("out/config.json").read_text()
    assert sm.verify("out", sample="100%").equal_elems
    with pytest.raises(sm.RecipeError, match="mxfp4, a scale for each 32 numbers, which is read and not written"):
        sm.plan(["a", "b"], quantise="like-base")
