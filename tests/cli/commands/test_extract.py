"""``streammerge extract``: its options reach the extraction, and its report tells the error of each layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import Cli
from safetensors.torch import load_file, save_file


def models(folder: Path) -> None:
    base = {f"layers.{n}.proj.weight": torch.randn(12, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)}
    save_file(base | {"norm.weight": torch.ones(8)}, folder / "base.safetensors")
    save_file(
        {name: 1.5 * each for name, each in base.items()} | {"norm.weight": torch.zeros(8)}, folder / "tuned.safetensors"
    )


def test_the_report_begins_with_a_summary_and_json_has_each_layer(cli: Cli, tmp_path: Path) -> None:
    models(tmp_path)
    words = ("extract", "tuned.safetensors", "--base", "base.safetensors", "-o", "adapter/")
    done = cli(*words, "--rank", "2")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("3 modules of rank 2, error ")
    assert "wrote adapter/ (3 modules, " in done.stdout
    assert "--save-modules stores their modules whole" in done.stderr
    assert "pass --overwrite" in cli(*words, code=2).stderr
    told = json.loads(cli(*words, "--energy", "80%", "--save-modules", "--overwrite", "--format", "json").stdout)
    assert [each["stored"] for each in told["layers"]] == ["factors"] * 3 + ["whole"]
    assert 0 < told["error"] < 0.2**0.5
    assert cli(*words, "--overwrite", "--format", "quiet").stdout == ""
    assert "norm.weight" in next(iter(load_file(tmp_path / "adapter/adapter_model.safetensors"))) or told["rank"] > 2


def test_what_is_missing_is_said(cli: Cli, tmp_path: Path) -> None:
    models(tmp_path)
    assert "pass --base" in cli("extract", "tuned.safetensors", "-o", "adapter/", code=2).stderr
    assert "-o OUT" in cli("extract", "tuned.safetensors", "--base", "base.safetensors", code=2).stderr
    assert cli("extract", "base.safetensors", "--base", "base.safetensors", "-o", "adapter/", code=4).stderr
    assert not (tmp_path / "adapter").exists()
