"""Tensors in the container of another checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm


@pytest.fixture
def original(tmp_path: Path) -> Path:
    content = {
        "config": {"dims": [3, 4]},
        "model": trained(1),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
        "step": 7,
    }
    torch.save(content, tmp_path / "original.pth")
    return tmp_path / "original.pth"


def test_a_pth_finds_its_container_again(tmp_path: Path, original: Path) -> None:
    sm.convert(original, tmp_path / "a.safetensors")
    changed = {
        name: t + 1 if t.is_floating_point() else t for name, t in load_safetensors(tmp_path / "a.safetensors").items()
    }
    save_file(changed, tmp_path / "b.safetensors")
    result = sm.convert(tmp_path / "b.safetensors", tmp_path / "out.pth", like=original)
    made = torch.load(tmp_path / "out.pth")
    assert_same(dict(made["model"]), changed)
    assert list(made["model"]) == list(trained(1))
    assert made["model"]._metadata == trained(1)._metadata  # type: ignore[attr-defined]
    assert (made["config"], made["step"], "optimizer" in made) == ({"dims": [3, 4]}, 7, False)
    assert any("optimizer" in note for note in result.notes)
    assert sm.verify(tmp_path / "out.pth", sample=1.0).recomputed


def test_a_state_dict_in_memory_takes_the_container_too(tmp_path: Path, original: Path) -> None:
    changed = {f"module.{name}": tensor.clone() for name, tensor in trained(2).items()}
    sm.convert(changed, tmp_path / "out.pth", like=original)
    assert_same(dict(torch.load(tmp_path / "out.pth")["model"]), trained(2))


@pytest.mark.parametrize("out", ["out.safetensors", "out/"])
def test_names_order_dtypes_and_side_files_are_the_others(tmp_path: Path, out: str) -> None:
    (tmp_path / "like").mkdir()
    save_file({"b": torch.ones(2).half(), "a": torch.ones(3).half()}, tmp_path / "like/model.safetensors", {"by": "me"})
    (tmp_path / "like/tokenizer.json").write_text("{}")
    torch.save({"a": torch.full((3,), 2.0), "b": torch.full((2,), 3.0)}, tmp_path / "in.pth")
    result = sm.convert(tmp_path / "in.pth", tmp_path / out, like=tmp_path / "like")
    file = tmp_path / out / "model.safetensors" if out.endswith("/") else tmp_path / out
    assert_same(load_safetensors(file), {"a": torch.full((3,), 2.0).half(), "b": torch.full((2,), 3.0).half()})
    assert sm.inspect(file).metadata["by"] == "me"
    assert (tmp_path / out / "tokenizer.json").exists() == out.endswith("/")
    assert any("2 tensors (a, b) are rounded" in note or "2 tensors (b, a) are rounded" in note for note in result.notes)
    sm.convert(tmp_path / "in.pth", tmp_path / "wide.pth", like=tmp_path / "like", dtype="float32")
    assert torch.load(tmp_path / "wide.pth")["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer.bias": None}, r"lacks layer\.bias; leave out with `drop` what it lacks"),
        ({"more": torch.ones(2)}, r"has more besides"),
        ({"layer.bias": torch.ones(30)}, r"has other shapes of layer\.bias"),
        ({"layer.bias": None, "more": torch.ones(2)}, r"lacks layer\.bias and has more besides"),
    ],
)
def test_what_does_not_fit_is_one_sentence(tmp_path: Path, original: Path, change: dict[str, Any], said: str) -> None:
    content = {name: tensor.clone() for name, tensor in {**trained(1), **change}.items() if tensor is not None}
    save_file(content, tmp_path / "in.safetensors")
    with pytest.raises(sm.MismatchError, match=f"does not fit into .*original.pth: it {said}") as error:
        sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=original)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.pth").exists()


def test_what_is_left_out_may_be_missing(tmp_path: Path, original: Path) -> None:
    save_file({"layer.weight": torch.zeros(17, 31)}, tmp_path / "in.safetensors")
    sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=original, keep="layer.weight")
    assert_same(dict(torch.load(tmp_path / "out.pth")["model"]), {"layer.weight": torch.zeros(17, 31)})
    content = {name: tensor for name, tensor in trained(2).items() if name != "mask"}
    save_file(content, tmp_path / "in.safetensors")
    sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=original, drop="mask", overwrite=True)
    assert_same(dict(torch.load(tmp_path / "out.pth")["model"]), content)


def test_the_state_dict_of_the_other_is_chosen(tmp_path: Path) -> None:
    torch.save(
        {"model": {"w": torch.ones(2)}, "ema": {"module.w": torch.ones(2), "n": torch.ones(1)}}, tmp_path / "like.pth"
    )
    save_file({"module.w": torch.zeros(2), "n": torch.zeros(1)}, tmp_path / "in.safetensors")
    with pytest.raises(sm.MismatchError, match=r"holds model, ema, of which model was taken \(`state_dict`"):
        sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=tmp_path / "like.pth")
    sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=tmp_path / "like.pth", state_dict="ema")
    assert torch.load(tmp_path / "out.pth")["ema"]["module.w"].tolist() == [0, 0]


def test_the_input_is_renamed_and_not_the_other(tmp_path: Path) -> None:
    torch.save({"net": {"a": torch.ones(2), "b": torch.ones(2)}}, tmp_path / "like.pth")
    save_file({"one": torch.zeros(2), "two": torch.ones(2)}, tmp_path / "in.safetensors")
    sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=tmp_path / "like.pth", rename=["one=b", "two=a"])
    assert_same(torch.load(tmp_path / "out.pth")["net"], {"a": torch.ones(2), "b": torch.zeros(2)})


def test_the_input_itself_is_no_container_for_it(original: Path, tmp_path: Path) -> None:
    with pytest.raises(sm.RecipeError, match="`like` names the input itself"):
        sm.convert(original, tmp_path / "out.pth", like=str(original))


def test_the_copies_of_the_other_get_the_tensors_too(tmp_path: Path) -> None:
    """Its average would be that of other weights. What the input lacks is kept, and said."""
    weights = {"a.w": torch.ones(3, 2), "b.w": torch.ones(5)}
    content = {
        "ema": {"step": torch.tensor(3), **{f"ema_model.{name}": tensor * 2 for name, tensor in weights.items()}},
        "list": {"shadow_params": [tensor * 3 for tensor in weights.values()], "decay": 0.9},
        "model": weights,
        "latent_avg": torch.ones(4),
    }
    torch.save(content, tmp_path / "like.pth")
    save_file({name: tensor * 7 for name, tensor in weights.items()}, tmp_path / "in.safetensors")
    result = sm.convert(tmp_path / "in.safetensors", tmp_path / "out.pth", like=tmp_path / "like.pth")
    made = torch.load(tmp_path / "out.pth")
    assert set(made) == set(content)
    copies = [made["model"]["a.w"], made["ema"]["ema_model.a.w"], made["list"]["shadow_params"][0]]
    assert all(tensor.tolist() == [[7.0] * 2] * 3 for tensor in copies)
    assert (made["ema"]["step"].item(), made["latent_avg"].tolist()) == (3, [1.0] * 4)
    assert any("ema.step, latent_avg (the input has none)" in note for note in result.notes)
    assert sm.verify(tmp_path / "out.pth", sample=1.0).recomputed
