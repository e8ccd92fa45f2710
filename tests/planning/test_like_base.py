"""Outputs that are quantised as the first input is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_safetensors
from safetensors.torch import save_file

import streammerge as sm
from quantised.samples import FP8, Tensors, fp8_blocks, fp8_model, load_folder, numbers_of


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def same(one: Tensors, two: Tensors) -> bool:
    return one.keys() == two.keys() and all(
        tensor.dtype == two[name].dtype and torch.equal(tensor.view(torch.uint8), two[name].view(torch.uint8))
        for name, tensor in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_is_quantised_once(dtype: torch.dtype) -> None:
    a, b = fp8_model(Path("a"), 1, dtype), fp8_model(Path("b"), 2)
    result = sm.merge(["a", "b"], "out/", weights=[0.6, 0.4], quantise="like-base")
    assert any("quantised again, as in a: 6 weights" in note for note in result.notes)
    made = load_folder(Path("out"))
    assert made.keys() == load_folder(Path("a")).keys()
    for name in a:
        merged = (0.6 * a[name].double() + 0.4 * b[name].double()).float()
        if f"{name}_scale_inv" in made:
            codes, scales = fp8_blocks(merged, dtype)
            assert torch.equal(made[f"{name}_scale_inv"], scales), name
            assert torch.equal(made[name].view(torch.uint8), codes.view(torch.uint8)), name
        else:
            assert torch.equal(made[name], (0.6 * a[name].double() + 0.4 * b[name].double()).bfloat16()), name
    assert Path("out/config.json").read_text() == Path("a/config.json").read_text()
    assert sm.verify("out", sample="100%").equal_elems


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {"weights": [0.3, 0.7]}), ("slerp", {"parameters": {"t": 0.4}}), ("n_average", {})],
)
def test_a_model_merged_with_itself_comes_back_in_its_bytes(method: str, options: dict[str, Any]) -> None:
    fp8_model(Path("a"), 1)
    sm.merge(["a", "a"], "out/", method=method, quantise="like-base", **options)
    for file in Path("a").glob("*.safetensors"):
        assert same(load_safetensors(file), load_safetensors(Path("out", file.name))), file


def test_copied_tensors_keep_their_bytes() -> None:
    """Also with scales that no rule would give."""
    make = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        codes = torch.randint(0, 0x70, (130, 140), dtype=torch.uint8, generator=make).view(FP8)
        tensors = {
            "x.weight": codes,
            "x.weight_scale_inv": torch.rand(2, 2, generator=make),
            "x.input_scale": torch.ones(1),
        }
        save_file(tensors, f"{name}.safetensors")
    recipe = {"merge_method": "n_average", "models": [{"model": "a.safetensors"}, {"model": "b.safetensors"}]}
    recipe |= {"rules": [{"match": "x.*", "copy": "b.safetensors"}], "quantise": "like-base"}  # type: ignore[dict-item]
    sm.merge(recipe=recipe, out="out.safetensors")
    made, b = load_safetensors(Path("out.safetensors")), load_safetensors(Path("b.safetensors"))
    assert same(made, b)
    sm.convert("b.safetensors", "again/", quantise="like-base")
    assert same(load_folder(Path("again")), b)


def test_a_plain_tensor_is_quantised_where_it_is_copied() -> None:
    a = fp8_model(Path("a"), 1)
    save_file({name: torch.randn(tensor.shape).bfloat16() for name, tensor in a.items()}, "plain.safetensors")
    rules = [{"match": "*q_proj*", "copy": "plain.safetensors"}]
    recipe = {"merge_method": "passthrough", "models": [{"model": "a"}], "rules": rules, "quantise": "like-base"}
    sm.merge(recipe=recipe, out="out.safetensors")
    made, name = load_safetensors(Path("out.safetensors")), "model.layers.0.q_proj.weight"
    codes, scales = fp8_blocks(load_safetensors(Path("plain.safetensors"))[name].float())
    assert torch.equal(made[f"{name}_scale_inv"], scales)
    assert torch.equal(numbers_of(made[name], made[f"{name}_scale_inv"]), numbers_of(codes, scales))


@pytest.mark.parametrize("ways", [{"workers": 1}, {"io": "pread"}, {"memory": "60MiB"}, {"executor": "processes"}])
def test_no_byte_depends_on_how_it_is_made(ways: dict[str, Any]) -> None:
    fp8_model(Path("a"), 1)
    fp8_model(Path("b"), 2)
    sm.merge(["a", "b"], "one/", quantise="like-base")
    sm.merge(["a", "b"], "two/", quantise="like-base", **ways)
    for file in Path("one").iterdir():
        assert file.read_bytes() == Path("two", file.name).read_bytes(), file


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bfloat16"}, "`quantise` writes the dtypes of the first input; leave `dtype` out"),
        ({"rename": "model.*=m.*"}, "`quantise` keeps the names, layers and tokens"),
        ({"recipe": {"rules": [{"match": "*", "dtype": "float32"}]}}, "leave `dtype` out"),
        ({"recipe": {"slices": True}}, "`quantise` keeps the names, layers and tokens"),
        ({"inputs": ["plain.safetensors"]}, r"plain\.safetensors holds no quantised weights that are read"),
        ({"inputs": ["rows.safetensors"]}, "is stored as int8, a scale for each row, which is read and not written"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_told(options: dict[str, Any], said: str) -> None:
    a = fp8_model(Path("a"), 1)
    save_file({name: tensor.float() for name, tensor in a.items()}, "plain.safetensors")
    zeros = {"x.weight_zero_point": torch.ones(3, 1, dtype=torch.int8)}
    save_file({"x.weight": torch.ones(3, 4).char(), "x.weight_scale": torch.ones(3, 1)} | zeros, "rows.safetensors")
    recipe = options.pop("recipe", None)
    if recipe and "slices" in recipe:
        recipe = {"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}
    elif recipe:
        recipe |= {"models": [{"model": "a"}]}
    with pytest.raises(sm.RecipeError, match=said):
        if recipe:
            sm.plan(recipe={"merge_method": "passthrough", **recipe}, quantise="like-base")
        else:
            sm.plan(options.pop("inputs", ["a", "a"]), quantise="like-base", **options)


def test_a_stage_is_not_quantised() -> None:
    fp8_model(Path("a"), 1)
    stage = {"merge_method": "passthrough", "models": [{"model": "a"}], "quantise": "like-base"}
    recipe = {"merge_method": "passthrough", "models": [{"model": "s"}], "stages": {"s": stage}}
    with pytest.raises(sm.RecipeError, match="stage s: `quantise` is about the output"):
        sm.plan(recipe=recipe)


@pytest.mark.parametrize("kind", ["fp8 rows", "fp8 tensor", "int8 rows", "int8 tensor"])
def test_scales_of_rows_and_tensors_as_compressed_tensors_makes_them(kind: str) -> None:
    """The scale is the largest magnitude by half the range of the codes, and every number is within half a step."""
    half = 448.0 if kind.startswith("fp8") else 127.5
    numbers: list[torch.Tensor] = []
    for name in ("a", "b"):
        weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(ord(name)))
        scales = (weight.abs().amax(1, keepdim=True) if kind.endswith("rows") else weight.abs().max().view(1)) / half
        codes = (weight / scales).clamp(-448, 448).to(FP8)
        if kind.startswith("int8"):
            codes = (weight / scales).round().clamp(-128, 127).to(torch.int8)
        save_file({"x.weight": codes, "x.weight_scale": scales, "y.weight": weight[:2].bfloat16()}, f"{name}.safetensors")
        numbers.append(codes.float() * scales)
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors", quantise="like-base")
    made, stored = load_safetensors(Path("out.safetensors")), load_safetensors(Path("a.safetensors"))
    assert {n: t.dtype for n, t in made.items()} == {n: t.dtype for n, t in stored.items()}
    merged = ((numbers[0].double() + numbers[1].double()) / 2).float()
    most = merged.abs().amax(1, keepdim=True) if kind.endswith("rows") else merged.abs().max().view(1)
    assert torch.equal(made["x.weight_scale"], most / half)
    step = made["x.weight_scale"] if half < 128 else (merged.abs() / 8).clamp_min(most / 448 / 512)
    assert bool(((made["x.weight"].float() * made["x.weight_scale"] - merged).abs() <= step / 2 * 1.0001).all())
    sm.merge(["a.safetensors", "a.safetensors"], "self.safetensors", quantise="like-base")
    assert same(load_safetensors(Path("self.safetensors")), stored)
    assert sm.verify("out.safetensors", sample="100%").equal_elems
