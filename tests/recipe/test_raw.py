"""Configurations of mergekit-pytorch: files instead of folders, any names of tensors, no architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge as sm

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensors]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    made = {}
    for name in ("a", "b", "base"):
        made[name] = {f"layers.{n}.w": torch.randn(6, 5) for n in range(3)} | {
            "head.w": torch.randn(3, 5),
            "scale": torch.tensor(0.5),
            "empty": torch.zeros(0, 4),
            "num_batches_tracked": torch.tensor(7),
            "flag": torch.tensor([True, False]),
        }
        save_file(made[name], f"{name}.safetensors")
        torch.save(made[name], f"{name}.bin")
    return made


def merged(text: str, **options: object) -> Tensors:
    Path("raw.yml").write_text(text)
    sm.merge(recipe="raw.yml", out="out/", overwrite=True, **options)  # type: ignore[arg-type]
    return load_file(next(Path("out").glob("*.safetensors")))


def floats(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_weight_of_zero_is_a_weight(files: dict[str, Tensors], ending: str) -> None:
    models = f"[{{model: a.{ending}, parameters: {{weight: 0.0}}}}, {{model: b.{ending}, parameters: {{weight: 1.0}}}}]"
    Path("raw.yml").write_text(f"merge_method: linear\nmodels: {models}\n")
    sm.merge(recipe="raw.yml", out="out.safetensors")
    found = load_file("out.safetensors")
    assert found.keys() == files["b"].keys()
    for name, tensor in files["b"].items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_base_outside_of_the_models(files: dict[str, Tensors]) -> None:
    models = "[{model: a.safetensors, parameters: {weight: 0.3}}, {model: b.safetensors, parameters: {weight: 0.7}}]"
    found = merged(f"merge_method: task_arithmetic\nbase_model: base.safetensors\nmodels: {models}\n")
    a, b, base = (floats(files[name]) for name in ("a", "b", "base"))
    for name, start in base.items():
        expected = start.double() + 0.3 * (a[name].double() - start) + 0.7 * (b[name].double() - start)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found["num_batches_tracked"], torch.tensor(7))
    assert torch.equal(found["flag"], torch.tensor([True, False]))


def test_tensors_that_not_all_have(files: dict[str, Tensors]) -> None:
    """mergekit-pytorch stops, skips them (`-i`), or merges what there is (`-u`)."""
    save_file(files["b"] | {"only_b": torch.ones(2)}, "more.safetensors")
    text = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: more.safetensors}]\nparameters: {weight: 0.5}\n"
    with pytest.raises(sm.MismatchError, match="only_b"):
        merged(text)
    assert merged(text, on_missing="drop").keys() == files["a"].keys()
    assert torch.equal(merged(text, on_missing="union")["only_b"], torch.ones(2))


def test_the_dtype_is_that_of_floating_point_numbers(files: dict[str, Tensors]) -> None:
    text = "merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nparameters: {weight: 0.5}\n"
    found = merged(text + "dtype: bfloat16\n")
    a, b = floats(files["a"]), floats(files["b"])
    for name, tensor in a.items():
        assert torch.equal(found[name], ((tensor.double() + b[name].double()) / 2).bfloat16())
    assert found["num_batches_tracked"].dtype == torch.int64
    with pytest.raises(sm.RecipeError, match="floating-point"):
        merged(text + "dtype: int64\n")


def test_a_gradient_follows_the_layers_in_the_names(files: dict[str, Tensors]) -> None:
    """mergekit-pytorch takes its first value everywhere. README says so."""
    models = "[{model: a.safetensors, parameters: {weight: [0, 1]}}, {model: b.safetensors, parameters: {weight: [1, 0]}}]"
    found = merged(f"merge_method: linear\nmodels: {models}\n")
    a, b = files["a"], files["b"]
    assert torch.equal(found["head.w"], b["head.w"])
    assert torch.equal(found["layers.0.w"], b["layers.0.w"])
    assert torch.equal(found["layers.1.w"], ((a["layers.1.w"].double() + b["layers.1.w"].double()) / 2).float())
    assert torch.equal(found["layers.2.w"], a["layers.2.w"])


def test_keys_that_it_lacks_are_told(files: dict[str, Tensors]) -> None:
    Path("raw.yml").write_text("merge_method: linear\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\nfoo: 1\n")
    assert any("no key foo" in warning for warning in sm.plan(recipe="raw.yml", out="x/").warnings)
