"""What is replaced, added and left out in the first input's tree."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors, mean, octets, trained

import streammerge as sm


def test_ema_weights_are_named_and_not_left_stale(tmp_path: Path) -> None:
    for number in (1, 2):
        torch.save({"model": trained(number), "ema": trained(10 + number), "epoch": 1}, tmp_path / f"{number}.pt")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    result = sm.merge(paths, tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert list(merged) == ["model", "ema", "epoch"]
    both = [trained(11)["layer.bias"], trained(12)["layer.bias"]]
    assert octets(merged["ema"]["layer.bias"]) == octets(mean(both, [1, 1]))
    assert not any("left out" in note for note in result.notes)
    sm.merge(paths, tmp_path / "ema.pt", ema="only")
    merged = torch.load(tmp_path / "ema.pt")
    assert list(merged) == ["model", "ema", "epoch"], "what a loader reads is there, and is the average"
    assert merged["model"]["layer.bias"].data_ptr() == merged["ema"]["layer.bias"].data_ptr()
    assert octets(merged["ema"]["layer.bias"]) == octets(
        mean([trained(11)["layer.bias"], trained(12)["layer.bias"]], [1, 1])
    )
    sm.merge(paths, tmp_path / "named.safetensors", state_dict="ema")
    assert octets(load_safetensors(tmp_path / "named.safetensors")["layer.bias"]) == octets(merged["ema"]["layer.bias"])
    with pytest.raises(sm.RecipeError, match=r"there is no state dict nothing in it; it has model, ema"):
        sm.inspect(paths[0], state_dict="nothing")


def test_several_state_dicts_are_merged_together(tmp_path: Path) -> None:
    for number in (1, 2):
        content = {
            "model": trained(number),
            "generator": {"0.weight": torch.full((2,), float(number))},
            "opt": argparse.Namespace(a=1),
        }
        torch.save(content, tmp_path / f"{number}.pt")
    paths = [tmp_path / "1.pt", tmp_path / "2.pt"]
    sm.merge(paths, tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt", weights_only=False)
    assert merged["generator"]["0.weight"].tolist() == [1.5, 1.5]
    assert merged["opt"] == argparse.Namespace(a=1)
    sm.merge(paths, tmp_path / "out.safetensors")
    assert {"model.layer.bias", "generator.0.weight"} <= set(load_safetensors(tmp_path / "out.safetensors"))


def test_litema_weights_stand_in_when_asked(tmp_path: Path) -> None:
    state = {
        "model.a.b": torch.zeros(2),
        "model.c": torch.zeros(2),
        "model_ema.ab": torch.ones(2),
        "model_ema.c": torch.ones(2),
    }
    torch.save(
        {"state_dict": state | {"model_ema.decay": torch.tensor(0.9), "first.w": torch.full((1,), 5.0)}},
        tmp_path / "sd.ckpt",
    )
    sm.merge([tmp_path / "sd.ckpt"], tmp_path / "out.ckpt", ema="prefer")
    expected = {"model.a.b": torch.ones(2), "model.c": torch.ones(2), "first.w": torch.full((1,), 5.0)}
    averages = {"model_ema.ab": torch.ones(2), "model_ema.c": torch.ones(2), "model_ema.decay": torch.tensor(0.9)}
    assert_same(torch.load(tmp_path / "out.ckpt")["state_dict"], expected | averages)
    sm.merge([tmp_path / "sd.ckpt"], tmp_path / "out.safetensors", ema="prefer")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), expected)


def test_a_merged_tensor_is_merged_wherever_it_stands(tmp_path: Path) -> None:
    for number in (1.0, 3.0):
        weight = torch.full((3,), number)
        torch.save({"model": {"w": weight}, "best": [weight, "x"]}, tmp_path / f"{number}.pt")
    sm.merge([tmp_path / "1.0.pt", tmp_path / "3.0.pt"], tmp_path / "out.pt")
    merged = torch.load(tmp_path / "out.pt")
    assert merged["best"][0].tolist() == [2.0, 2.0, 2.0]
    assert merged["best"][0].data_ptr() == merged["model"]["w"].data_ptr()


def test_only_training_state_is_left_out(tmp_path: Path) -> None:
    optimizer = {"state": {}, "param_groups": [{"lr": 1.0}]}
    stale = {"optimizer": [optimizer], "optimizer_d": optimizer, "last_optimizer_state": {"a": 1}, "opt": optimizer}
    stale |= {"lr_schedulers": [{"last_epoch": 1}], "scheduler_disc": {"a": 1}, "scaler": {"scale": 2.0}, "grad_scaler": {}}
    needed = {"optimizer_history": [{"best_loss": 1.0}], "data_scaler": {"means": [1.0]}, "noise_scheduler": {"steps": 10}}
    needed |= {"hyper_parameters": {"lr": 1.0}, "epoch": 1}
    torch.save({"model": {"w": torch.ones(2)}, **stale, **needed}, tmp_path / "in.pt")
    sm.merge([tmp_path / "in.pt"], tmp_path / "out.pt")
    assert set(torch.load(tmp_path / "out.pt")) == {"model", *needed}
    torch.save({"model": {"w": torch.ones(2)}, "scaler": {"mean": 1.0}}, tmp_path / "in.pt")
    sm.merge([tmp_path / "in.pt"], tmp_path / "out.pt", overwrite=True)
    assert set(torch.load(tmp_path / "out.pt")) == {"model", "scaler"}


def test_facts_a_loader_needs_are_compared(tmp_path: Path) -> None:
    for rate in ("40k", "48k"):
        torch.save(
            {"weight": {"w": torch.ones(2)}, "config": [1], "info": "", "sr": rate, "f0": 1, "version": "v2"},
            tmp_path / f"{rate}.pth",
        )
    result = sm.merge([tmp_path / "40k.pth", tmp_path / "48k.pth"], tmp_path / "out.pth")
    assert [w for w in result.warnings if "'sr' differs" in w]
    assert not [w for w in result.warnings if "'f0'" in w]
