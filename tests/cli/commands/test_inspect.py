"""``streammerge inspect``: what it prints of a file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from conftest import Cli
from safetensors.torch import save_file


def test_inspect_tells_what_is_inside(cli: Cli, voices: tuple[Path, Path]) -> None:
    shown = cli("inspect", "news.pth").stdout
    for text in ("PyTorch zip", "model: 9 tensors", "training   optimizer", "step: 10", "epoch: 3", "nothing was executed"):
        assert text in shown
    table = cli("inspect", "news.pth", "--tensors").stdout
    assert re.search(r"^xtts\.embed\.weight +float32 +301x433 +@\d+", table, re.MULTILINE)
    data = json.loads(cli("inspect", "news.pth", "--format", "json", "--tensors").stdout)
    assert data["executed"] is False
    assert data["data"]["model_loss"] == {"train_loss": 2.0, "eval_loss": None}
    assert data["entries"]["xtts.layer.bias"]["shape"] == [31]


def test_several_files_are_shown_in_numeric_order(cli: Cli, tmp_path: Path) -> None:
    for number in (10, 9):
        torch.save({"w": torch.ones(number)}, tmp_path / f"epoch-{number}.pth")
    shown = json.loads(cli("inspect", "epoch-*.pth", "--format", "json").stdout)
    assert [each["parameters"] for each in shown] == [9, 10]
    assert [line for line in cli("inspect", "epoch-*.pth").stdout.splitlines() if line.startswith("epoch")] == [
        "epoch-9.pth",
        "epoch-10.pth",
    ]
    assert cli("inspect", "epoch-9.pth", "--format", "quiet").stdout == ""


def test_the_state_dict_is_chosen(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(3)}, "other": {"w": torch.ones(5)}}, tmp_path / "x.pth")
    shown = json.loads(cli("inspect", "x.pth", "--state-dict", "other", "--format", "json").stdout)
    assert (shown["state_dict"], shown["parameters"]) == (["other"], 5)
    assert "absent" in cli("inspect", "x.pth", "--state-dict", "absent", code=2).stderr


def test_a_base_with_an_adapter_has_the_name_of_both(cli: Cli, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(8, 6), "b": torch.ones(2)}, tmp_path / "base.safetensors")
    save_file({"a.lora_up.weight": torch.ones(8, 2), "a.lora_down.weight": torch.ones(2, 6)}, tmp_path / "lora.safetensors")
    text = "base.safetensors+0.5*lora.safetensors"
    assert cli("inspect", text, "--tensors").stdout.startswith("base.safetensors + 0.5*lora.safetensors")
    shown = json.loads(cli("inspect", text, "--format", "json", "--tensors").stdout)
    assert shown["path"] == "base.safetensors + 0.5*lora.safetensors"
    assert shown["entries"]["a.weight"]["shape"] == [8, 6]
