"""Adapters from the difference of two models, against numpy's decomposition of whole matrices."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

import streammerge as sm
from adapters.arithmetic import Tensors, base_of, drawn

Q, DOWN, CONV = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.conv"
NORM, TABLE, HEAD = "model.norm", "model.embed_tokens", "lm_head"
START = "base_model.model."


def before(dtype: torch.dtype = torch.float32) -> Tensors:
    shapes = {
        f"{TABLE}.weight": (30, 16),
        f"{Q}.weight": (24, 16),
        f"{Q}.bias": (24,),
        f"{DOWN}.weight": (16, 40),
        f"{CONV}.weight": (6, 5, 3, 3),
        "model.one.weight": (1, 1),
        "model.same.weight": (7, 7),
        f"{NORM}.weight": (16,),
        f"{HEAD}.weight": (30, 16),
    }
    return {name: drawn(number, *shape, dtype=dtype) for number, (name, shape) in enumerate(shapes.items())}


def after(base: Tensors) -> Tensors:
    changed = {name: tensor + 0.1 * drawn(99, *tensor.shape).to(tensor.dtype) for name, tensor in base.items()}
    return changed | {"model.same.weight": base["model.same.weight"]}


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    base = before(dtype)
    tuned = after(base)
    base_of(base, "base", architectures=["LlamaForCausalLM"])
    base_of(tuned, "tuned")
    return base, tuned


def config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("adapter/adapter_config.json").read_text())
    return found


def digest() -> str:
    names = ("adapter_model.safetensors", "adapter_config.json")
    return "".join(hashlib.sha256((Path("adapter") / name).read_bytes()).hexdigest() for name in names)


def extracted(**options: Any) -> sm.AdapterResult:
    return sm.extract("tuned", "adapter/", **{"base": "base", "overwrite": True, **options})


def product(made: Tensors, module: str, settings: dict[str, Any]) -> torch.Tensor:
    """Returns the update that PEFT adds for a module."""
    rank = settings["rank_pattern"].get(module, settings["r"])
    scale = settings["alpha_pattern"].get(module, settings["lora_alpha"]) / rank
    up, down = made[f"{START}{module}.lora_B.weight"], made[f"{START}{module}.lora_A.weight"]
    assert up.shape[1] == down.shape[0] == rank
    return scale * up.double().flatten(1) @ down.double().flatten(1)


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_factors_are_those_of_the_whole_matrix(alpha: float | None) -> None:
    base, tuned = pair()
    result = extracted(rank=3, alpha=alpha)
    made, settings = load_file("adapter/adapter_model.safetensors"), config()
    assert sorted(settings["target_modules"]) == [CONV, DOWN, Q, "model.one"]
    total = lacking = 0.0
    for name, tensor in tuned.items():
        change = (tensor.double() - base[name].double()).flatten(1) if tensor.ndim > 1 else None
        total += float((tensor.double() - base[name].double()).square().sum())
        module = name.removesuffix(".weight")
        if change is None or module in (TABLE, HEAD, "model.same"):
            lacking += float((tensor.double() - base[name].double()).square().sum())
            continue
        u, s, v = numpy.linalg.svd(change.numpy(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        numpy.testing.assert_allclose(product(made, module, settings).numpy(), best, atol=1e-6)
        report = next(each for each in result.layers if each.name == name)
        assert report.error == pytest.approx(numpy.sqrt((s[3:] ** 2).sum() / (s**2).sum()), abs=1e-6)
        lacking += (s[3:] ** 2).sum()
    assert result.error == pytest.approx((lacking / total) ** 0.5, rel=1e-6)
    assert made[f"{START}{CONV}.lora_A.weight"].shape == (3, 5, 3, 3)
    assert made[f"{START}{CONV}.lora_B.weight"].shape == (6, 3, 1, 1)
    assert {each.stored for each in result.layers if each.name in (f"{NORM}.weight", f"{TABLE}.weight")} == {"absent"}
    assert any("save_modules" in warning for warning in result.warnings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_with_a_full_adapter_is_the_tuned_model(dtype: torch.dtype) -> None:
    _, tuned = pair(dtype)
    result = extracted(rank=1000, save_modules=True)
    assert result.error < 1e-6
    assert sorted(config()["modules_to_save"]) == [HEAD, TABLE, NORM]
    assert config()["bias"] == "lora_only"
    sm.convert("base+adapter", "back/")
    back = load_file("back/model.safetensors")
    for name, tensor in tuned.items():
        torch.testing.assert_close(back[name], tensor, rtol=2**-8 if dtype is torch.bfloat16 else 1e-6, atol=1e-6)


def test_one_digest_over_workers_budgets_and_containers() -> None:
    _, tuned = pair()
    extracted(energy=0.9, save_modules=True)
    first = digest()
    torch.save(tuned, "tuned.pth")
    zipped(Path("tuned.pth"), Path("packed.pth"))
    for number, options in enumerate(
        ({"workers": 1, "memory": "64MiB"}, {"workers": 7, "memory": "2GiB"}, {"io": "pread"})
    ):
        extracted(energy=0.9, save_modules=True, **options)
        assert digest() == first, number
    for other in ("tuned.pth", "packed.pth", tuned):
        sm.extract(other, "adapter/", base="base", energy=0.9, save_modules=True, overwrite=True)
        assert digest() == first


def zipped(source: Path, target: Path) -> None:
    """Packs the records of a torch file."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_conv1d_layers_are_stored_transposed() -> None:
    shapes = {"c_attn": (16, 48), "c_proj": (16, 16)}
    base = {f"h.0.attn.{name}.weight": drawn(1, *shape) for name, shape in shapes.items()}
    base |= {f"h.0.attn.{name}.bias": drawn(2, shape[1]) for name, shape in shapes.items()}
    base |= {"h.0.mlp.c_proj.weight": drawn(3, 64, 16), "h.0.mlp.c_proj.bias": drawn(4, 16)}
    tuned = {name: tensor + 0.1 * drawn(5, *tensor.shape) for name, tensor in base.items()}
    base_of(base, "base"), base_of(tuned, "tuned")
    extracted(rank=99)
    made, settings = load_file("adapter/adapter_model.safetensors"), config()
    assert settings["fan_in_fan_out"] is True
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"):
        change = tuned[f"{name}.weight"] - base[f"{name}.weight"]
        torch.testing.assert_close(product(made, name, settings).T.float(), change, rtol=0, atol=1e-6)


def test_patterns_choose_modules_and_embeddings_that_are_named() -> None:
    base, tuned = pair()
    extracted(target=["embed_tokens", "*.q_proj", "lm_head"], exclude="lm_head", rank=99)
    made = load_file("adapter/adapter_model.safetensors")
    assert {name.removeprefix(START) for name in made} == {
        *(f"{TABLE}.lora_embedding_{part}" for part in "AB"),
        *(f"{Q}.lora_{part}.weight" for part in "AB"),
    }
    down, up = (made[f"{START}{TABLE}.lora_embedding_{part}"] for part in "AB")
    change = tuned[f"{TABLE}.weight"] - base[f"{TABLE}.weight"]
    torch.testing.assert_close((up @ down).T, change, rtol=0, atol=1e-6)
    with pytest.raises(sm.RecipeError, match="leave no module"):
        extracted(target="nothing")


def test_models_that_give_no_adapter_are_refused_before_a_byte_is_written() -> None:
    base, tuned = pair()
    for other, match in (
        (base, "no tensor differs"),
        (base | {f"{NORM}.weight": base[f"{NORM}.weight"] + 1}, "only tensors that have no factors"),
        ({"other.weight": drawn(1, 3, 3)}, "no tensor of equal name and shape"),
        (tuned | {f"{Q}.weight": torch.full((24, 16), torch.nan)}, "NaN or infinity"),
    ):
        with pytest.raises(sm.MismatchError, match=match):
            sm.extract(other, "adapter/", base="base")
    with pytest.raises(sm.BudgetError, match=r"give more `memory`"):
        extracted(memory="9MiB")
    with pytest.raises(sm.RecipeError, match="name of a folder"):
        sm.extract("tuned", "adapter.safetensors", base="base")
    with pytest.raises(sm.FormatError, match="folder of an input"):
        sm.extract("tuned", "base/adapter/", base="base")
    with pytest.raises(sm.RecipeError, match="pass `base`"):
        sm.extract("tuned", "adapter/")
    assert not [path for path in Path().iterdir() if "adapter" in path.name]


def test_an_adapter_is_replaced_only_if_that_is_asked_for() -> None:
    pair()
    sm.extract("tuned", "new/folder/adapter", base="base", rank=2)
    with pytest.raises(sm.RecipeError, match="overwrite"):
        sm.extract("tuned", "new/folder/adapter", base="base", rank=2)
    (Path("new/folder/adapter") / "notes.txt").write_text("mine")
    with pytest.raises(sm.RecipeError, match=r"notes\.txt"):
        sm.extract("tuned", "new/folder/adapter", base="base", rank=2, overwrite=True)


def test_tensors_without_a_partner_are_told() -> None:
    _, tuned = pair()
    longer = tuned | {f"{TABLE}.weight": drawn(1, 33, 16), "extra.weight": drawn(2, 3, 3)}
    result = sm.extract(longer, "adapter/", base="base", rank=2)
    (told,) = [warning for warning in result.warnings if "cannot be compared" in warning]
    assert "[30, 16] and [33, 16]" in told
    assert "extra.weight (the base lacks it)" in told


def test_ends_of_names_that_would_find_more_modules_become_a_pattern() -> None:
    base = {"q.weight": drawn(1, 4, 4), "encoder.q.weight": drawn(2, 4, 4)}
    base_of(base, "base"), base_of(base | {"q.weight": drawn(3, 4, 4)}, "tuned")
    extracted(rank=2)
    assert config()["target_modules"] == "q"
    base_of(base | {"q.weight": drawn(3, 4, 4), "encoder.q.weight": base["encoder.q.weight"] * 1.5}, "both")
    sm.extract("both", "adapter/", base="base", rank=9, overwrite=True)
    sm.convert("base+adapter", "back.safetensors")
    torch.testing.assert_close(load_file("back.safetensors")["q.weight"], drawn(3, 4, 4))
