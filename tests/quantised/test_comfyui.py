"""Layers that ComfyUI has quantised, with the format in a tensor or in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors import safe_open
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import E2M1, FP8, Tensors, swizzled

MAKE = torch.Generator().manual_seed(1)
CODES = torch.randn(200, 96, generator=MAKE).to(FP8)
SCALE = torch.tensor(0.37)
INTEGERS = torch.randint(-127, 128, (200, 96), generator=MAKE).char()
FIELDS = torch.randint(0, 16, (200, 96), generator=MAKE)
NIBBLES = (FIELDS[:, ::2] << 4 | FIELDS[:, 1::2]).to(torch.uint8)
BLOCKS = torch.rand(200, 6, generator=MAKE).to(FP8)
EXPONENTS = torch.randint(120, 130, (200, 3), generator=MAKE, dtype=torch.uint8)
CASES: dict[str, tuple[Tensors, torch.Tensor]] = {
    "float8_e4m3fn": ({"weight": CODES, "weight_scale": SCALE}, CODES.float() * SCALE),
    "float8_e5m2": (
        {"weight": CODES.float().to(torch.float8_e5m2), "weight_scale": SCALE},
        CODES.float().to(torch.float8_e5m2).float() * SCALE,
    ),
    "int8_tensorwise": ({"weight": INTEGERS, "weight_scale": SCALE}, INTEGERS.float() * SCALE),
    "mxfp8": (
        {"weight": CODES, "weight_scale": swizzled(EXPONENTS)},
        CODES.float() * torch.exp2(EXPONENTS.float() - 127).repeat_interleave(32, 1),
    ),
    "nvfp4": (
        {"weight": NIBBLES, "weight_scale": swizzled(BLOCKS), "weight_scale_2": SCALE},
        E2M1[FIELDS] * (BLOCKS.float() * SCALE).repeat_interleave(16, 1),
    ),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(tensors: Tensors, said: dict[str, Any], place: str, file: str = "a.safetensors") -> None:
    """Writes a layer, and its format in a tensor or in the metadata."""
    prefix = "model.diffusion_model.blocks.0."
    stored = {prefix + name: tensor for name, tensor in tensors.items()} | {
        "model.diffusion_model.norm.weight": torch.ones(1)
    }
    metadata = {"modelspec.title": "x"}
    if place == "tensor":
        stored[f"{prefix}comfy_quant"] = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
    else:
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": {"blocks.0": said}})
    save_file(stored, file, metadata)


@pytest.mark.parametrize("place", ["tensor", "metadata"])
@pytest.mark.parametrize("form", CASES)
def test_its_numbers(form: str, place: str) -> None:
    tensors, expected = CASES[form]
    write(tensors | {"input_scale": torch.ones(1)}, {"format": form}, place)
    sm.convert("a.safetensors", "b.safetensors", dtype="float32")
    made = load_safetensors(Path("b.safetensors"))
    assert made.keys() == {"model.diffusion_model.blocks.0.weight", "model.diffusion_model.norm.weight"}
    assert torch.equal(made["model.diffusion_model.blocks.0.weight"], expected)
    with safe_open("b.safetensors", "pt") as file:
        assert "_quantization_metadata" not in file.metadata()
        assert file.metadata()["modelspec.title"] == "x"
    shown = {weight.scheme for weight in sm.inspect("a.safetensors").quantised.values()}
    assert shown == {f"{form} of ComfyUI"}


@pytest.mark.parametrize(
    ("said", "change", "told"),
    [
        ({"format": "svdquant_w4a4"}, {}, r'has the format "svdquant_w4a4" of ComfyUI, which is not read'),
        ({}, {}, r"has the format null of ComfyUI"),
        ({"format": "int8_tensorwise", "convrot": True}, {}, r"is rotated \(convrot\)"),
        ({"format": "float8_e4m3fn"}, {"pre_quant_scale": torch.ones(96)}, "follows scaled activations"),
        ({"format": "mxfp8"}, {"weight_scale": torch.zeros(128, 4).byte()}, "are no tiles of a grid of 200 x 3 scales"),
        ({"format": "float8_e4m3fn"}, {"weight_scale": torch.ones(3)}, "are no scales of F8_E4M3"),
    ],
    ids=str,
)
def test_what_is_not_read_is_refused(said: dict[str, Any], change: Tensors, told: str) -> None:
    write({"weight": CODES, "weight_scale": SCALE} | change, said, "tensor")
    with pytest.raises(sm.MismatchError, match=told):
        sm.convert("a.safetensors", "b.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": 3}', '{"layers": {"blocks.0": 3}}'])
def test_broken_metadata_is_told(text: str) -> None:
    save_file({"blocks.0.weight": CODES, "blocks.0.weight_scale": SCALE}, "a.safetensors", {"_quantization_metadata": text})
    with pytest.raises(sm.MismatchError, match="the quantised weight"):
        sm.plan(["a.safetensors", "a.safetensors"])
    save_file({"x.weight": CODES, "x.weight_scale": SCALE, "x.comfy_quant": torch.tensor([1, 2]).byte()}, "b.safetensors")
    with pytest.raises(sm.MismatchError, match="has a comfy_quant that is no JSON"):
        sm.plan(["b.safetensors", "b.safetensors"])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_older_form_and_its_quantised_merge(kind: torch.dtype) -> None:
    """A merge that is quantised like the base has the marker, its scales, and the first's scales of activations."""
    numbers = []
    for seed, name in enumerate(("a", "b")):
        weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(seed))
        scale = weight.abs().max() / torch.finfo(kind).max
        codes = (weight / scale).to(kind)
        numbers.append(codes.float() * scale)
        stored = {
            "x.weight": codes,
            "x.scale_weight": scale,
            "x.scale_input": torch.ones(()),
            "scaled_fp8": torch.zeros(2).to(kind),
        }
        save_file(stored | {"x.bias": torch.ones(3)}, f"{name}.safetensors")
    sm.merge(["a.safetensors", "b.safetensors"], "plain.safetensors")
    plain = load_safetensors(Path("plain.safetensors"))
    mean = (numbers[0].double() + numbers[1].double()) / 2
    assert plain.keys() == {"x.weight", "x.bias"}
    assert torch.equal(plain["x.weight"], mean.bfloat16())
    sm.merge(["a.safetensors", "b.safetensors"], "like.safetensors", quantise="like-base")
    like, first = (load_safetensors(Path(name)) for name in ("like.safetensors", "a.safetensors"))
    assert like.keys() == first.keys()
    assert torch.equal(like["x.scale_weight"], mean.float().abs().max() / torch.finfo(kind).max)
    again = like["x.weight"].float() * like["x.scale_weight"]
    step = torch.maximum(mean.abs() * 2.0 ** -(3 if kind == FP8 else 2), like["x.scale_weight"].double() * 2.0**-9)
    assert bool(((again - mean).abs() <= step / 2 * 1.0001).all())
    sm.merge(["a.safetensors", "a.safetensors"], "self.safetensors", quantise="like-base")
    for name, tensor in load_safetensors(Path("self.safetensors")).items():
        assert torch.equal(tensor.view(-1).view(torch.uint8), first[name].view(-1).view(torch.uint8)), name


def test_the_format_stays_where_the_output_is_quantised() -> None:
    for place in ("tensor", "metadata"):
        tensors, _ = CASES["float8_e4m3fn"]
        write(tensors, {"format": "float8_e4m3fn"}, place)
        sm.merge(["a.safetensors", "a.safetensors"], "b.safetensors", quantise="like-base", overwrite=True)
        one, two = load_safetensors(Path("a.safetensors")), load_safetensors(Path("b.safetensors"))
        assert one.keys() == two.keys()
        with safe_open("b.safetensors", "pt") as file:
            assert ("_quantization_metadata" in file.metadata()) is (place == "metadata")
