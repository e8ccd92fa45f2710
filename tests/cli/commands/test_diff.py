"""``streammerge diff``: what it says of two checkpoints, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    a = {"layers.0.w": torch.ones(3), "layers.1.w": torch.ones(3)}
    save_file(a, tmp_path / "a.safetensors")
    torch.save(a, tmp_path / "a.pth")
    save_file(a | {"layers.1.w": torch.tensor([1.0, 1.0, 2.0])}, tmp_path / "b.safetensors")
    return tmp_path


def test_equal_checkpoints_exit_with_0(models: Path, cli: Cli) -> None:
    assert "all 2 are equal" in cli("diff", "a.pth", "a.safetensors").stdout
    assert cli("diff", "a.pth", "a.safetensors", "-q").stdout == ""


def test_different_checkpoints_exit_with_1_and_a_report(models: Path, cli: Cli) -> None:
    done = cli("diff", "a.pth", "b.safetensors", code=1)
    assert "1 of 2 differ" in done.stdout
    assert "error" not in done.stderr
    assert "layers.0.w" not in done.stdout
    assert "layers.0.w" in cli("diff", "a.pth", "b.safetensors", "--tensors", code=1).stdout
    assert cli("diff", "a.pth", "b.safetensors", "--format", "quiet", code=1).stdout == ""


def test_json_is_one_object(models: Path, cli: Cli) -> None:
    told = json.loads(cli("diff", "a.pth", "b.safetensors", "--format", "json", code=1).stdout)
    assert (told["equal"], told["largest"], [each["layer"] for each in told["layers"]]) == (
        False,
        1.0,
        ["layers.0", "layers.1"],
    )
    told = json.loads(cli("diff", "a.pth", "b.safetensors", "--base", "a.safetensors", "--format", "json", code=1).stdout)
    assert told["agreement"]["relative_a"] == 0
    assert told["advice"].startswith("A equals the base")


def test_errors_keep_their_codes(models: Path, cli: Cli) -> None:
    (models / "broken.safetensors").write_bytes(b"\xff" * 20)
    assert "error" in cli("diff", "a.pth", "absent.safetensors", code=2).stderr
    assert json.loads(cli("diff", "a.pth", "broken.safetensors", "--format", "json", code=4).stdout)["error"]
    assert "memory" in cli("diff", "a.pth", "a.safetensors", "--memory", "2MiB", code=5).stderr
