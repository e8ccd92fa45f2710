"""Inputs of which some hold the weights and their average, and some only one of the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same, load_safetensors, mean
from safetensors.torch import save_file

import streammerge as sm


def weights(seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=make) for name, size in {"a.w": 3, "b.w": 4, "c.w": 5}.items()}


def average(seed: int) -> dict[str, torch.Tensor]:
    """Returns what ema-pytorch writes of a model."""
    return {f"ema_model.{name}": value for name, value in weights(seed + 10).items()} | {"step": torch.tensor(7)}


def full(seed: int) -> dict[str, Any]:
    return {"model_state_dict": weights(seed), "ema_model_state_dict": average(seed), "update": seed}


def means(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: mean([one[name], two[name]], [1, 1]) if one[name].is_floating_point() else one[name] for name in one}


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
@pytest.mark.parametrize("kind", ["wrapped", "safetensors"])
def test_the_copy_that_all_have_is_merged(tmp_path: Path, order: tuple[int, int], kind: str) -> None:
    """One F5-TTS checkpoint is whole, the other one was pruned to its average."""
    torch.save(full(1), tmp_path / "1.pt")
    if kind == "wrapped":
        torch.save({"ema_model_state_dict": average(2)}, tmp_path / "2.pt")
    else:
        save_file(average(2), tmp_path / "2.pt")
    result = sm.merge([tmp_path / f"{number}.pt" for number in order], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    flat = order == (2, 1) and kind == "safetensors"
    assert_same(made if flat else made["ema_model_state_dict"], means(average(order[0]), average(order[1])))
    assert "model_state_dict" not in made
    assert any("'ema_model_state_dict' was taken" in note for note in result.notes)
    assert flat or any("left out of the output: model_state_dict (" in note for note in result.notes)
    sm.merge([tmp_path / f"{number}.pt" for number in order], tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), means(average(1), average(2)))


def test_a_whole_checkpoint_gives_what_the_others_have(tmp_path: Path) -> None:
    torch.save(full(1), tmp_path / "1.pt")
    torch.save({"model_state_dict": weights(2)}, tmp_path / "2.pt")
    result = sm.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    assert_same(made.pop("model_state_dict"), means(weights(1), weights(2)))
    assert made == {"update": 1}
    assert any("left out of the output: ema_model_state_dict (" in note for note in result.notes)
    result = sm.merge([tmp_path / "2.pt", tmp_path / "1.pt"], tmp_path / "2nd.pt")
    assert any("left out of the output: ema_model_state_dict (the first input lacks it)" in n for n in result.notes)


def test_what_the_user_chose_stays(tmp_path: Path) -> None:
    torch.save({"model": weights(1), "ema": weights(11)}, tmp_path / "1.pt")
    torch.save({"ema": weights(12)}, tmp_path / "2.pt")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: linear\nmodels: [{model: 1.pt, state_dict: model}, {model: 2.pt}]\n")
    sm.merge(recipe, out=tmp_path / "chosen.safetensors")
    assert_same(load_safetensors(tmp_path / "chosen.safetensors"), means(weights(1), weights(12)))
    sm.merge(paths, tmp_path / "agreed.safetensors")
    assert_same(load_safetensors(tmp_path / "agreed.safetensors"), means(weights(11), weights(12)))


def test_a_pruned_generator(tmp_path: Path) -> None:
    """Files of rosinality's stylegan2: the whole one has three networks, the pruned one only the average."""
    discriminator = {"final.w": torch.ones(2)}
    torch.save({"g": weights(1), "d": discriminator, "g_ema": weights(11), "latent_avg": torch.ones(4)}, tmp_path / "1.pt")
    torch.save({"g_ema": weights(12), "latent_avg": torch.zeros(4)}, tmp_path / "2.pt")
    result = sm.merge([tmp_path / "2.pt", tmp_path / "1.pt"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")
    assert_same(made["g_ema"], means(weights(11), weights(12)))
    assert made["latent_avg"].tolist() == [0.5] * 4
    assert any("left out of the output: g (" in note for note in result.notes)
    sm.merge([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "whole.pt")
    made = torch.load(tmp_path / "whole.pt")
    assert_same(made["g_ema"], means(weights(11), weights(12)))
    assert "g" not in made


def test_counters_and_computed_buffers_are_no_names_of_a_copy(tmp_path: Path) -> None:
    """F5-TTS publishes averages without their counters; older ones have the filters of the spectrogram."""
    old = {"initted": torch.tensor(True), "step": torch.tensor(9), **average(1)}
    old["ema_model.mel_spec.mel_stft.mel_scale.fb"] = torch.rand(2, 2)
    torch.save({"model_state_dict": weights(1), "ema_model_state_dict": old, "update": 7}, tmp_path / "1.pt")
    published = {name: value for name, value in average(2).items() if value.shape}
    save_file(published, tmp_path / "2.safetensors")
    sm.merge([tmp_path / "1.pt", tmp_path / "2.safetensors"], tmp_path / "out.pt")
    made = torch.load(tmp_path / "out.pt")["ema_model_state_dict"]
    assert made.keys() == old.keys()
    for name, value in published.items():
        assert torch.equal(made[name], mean([average(1)[name], value], [1, 1]))
    result = sm.merge([tmp_path / "2.safetensors", tmp_path / "1.pt"], tmp_path / "out.safetensors")
    assert load_safetensors(tmp_path / "out.safetensors").keys() == published.keys()
    assert any("filters and windows of a spectrogram" in note for note in result.notes)
