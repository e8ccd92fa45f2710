"""``streammerge convert``: its options reach the conversion."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from conftest import Cli, assert_same, load_safetensors, trained


def test_the_same_tensors_come_out(cli: Cli, voices: tuple[Path, Path], tmp_path: Path) -> None:
    done = cli("convert", "news.pth", "-o", "out.safetensors")
    assert done.stdout.startswith("wrote out.safetensors (9 tensors, ")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), {f"xtts.{n}": t for n, t in trained(1).items()})


def test_options_reach_the_conversion(cli: Cli, voices: tuple[Path, Path], tmp_path: Path) -> None:
    words = [
        "--drop",
        "*.bias",
        "--drop",
        "*mask",
        "--strip-prefix",
        "xtts.",
        "--dtype",
        "float16",
        "--extras",
        "more.json",
    ]
    done = cli("convert", "news.pth", "-o", "out.safetensors", *words, "--format", "json")
    kept = {n: t for n, t in trained(1).items() if not n.endswith((".bias", "mask"))}
    assert_same(
        load_safetensors(tmp_path / "out.safetensors"),
        {n: t.half() if t.is_floating_point() else t for n, t in kept.items()},
    )
    assert json.loads(done.stdout)["tensors"] == len(kept)
    assert json.loads((tmp_path / "more.json").read_text())["data"]["step"] == 10


def test_an_output_is_needed_and_not_replaced(cli: Cli, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pth")
    assert "-o OUT" in cli("convert", "a.pth", code=2).stderr
    cli("convert", "a.pth", "-o", "b.pth")
    assert "pass --overwrite" in cli("convert", "a.pth", "-o", "b.pth", code=2).stderr
    assert cli("convert", "a.pth", "-o", "b.pth", "--overwrite", "--format", "quiet").stdout == ""


def test_a_pickle_is_pruned_and_found_again(cli: Cli, voices: tuple[Path, Path], tmp_path: Path) -> None:
    cli("convert", "news.pth", "-o", "small.pth", "--only", "model")
    made = torch.load(tmp_path / "small.pth")
    assert "optimizer" not in made
    cli("convert", "small.pth", "-o", "a.safetensors")
    cli("convert", "a.safetensors", "-o", "b.pth", "--like", "small.pth")
    assert_same(dict(torch.load(tmp_path / "b.pth")["model"]), dict(made["model"]))
    said = cli("convert", "news.pth", "-o", "c.pth", "--only", "model", "--state-dict", "ema", code=2).stderr
    assert "--only names the state dict; leave --state-dict out" in said
