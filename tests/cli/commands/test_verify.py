"""``streammerge verify``: what it says of an output, and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Cli

import streammerge as sm


@pytest.fixture
def merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.pth", "b.pth")):
        torch.save({"w": torch.full((5,), float(number)), "e": torch.empty(0)}, name)
    sm.merge(["a.pth", "b.pth"], "out.safetensors")
    return tmp_path / "out.safetensors"


def test_it_reports_as_text_as_json_or_not_at_all(merged: Path, cli: Cli) -> None:
    digest = sm.verify(merged).digest
    shown = cli("verify", "out.safetensors", "--sample", "100%").stdout
    assert shown.startswith("verified out.safetensors\n")
    assert digest in shown
    assert "5 numbers of 1 tensor computed again" in shown
    told = json.loads(cli("verify", "out.safetensors", "--sample", "100%", "--format", "json").stdout)
    assert (told["digest"], told["sampled_elems"], told["recomputed"], told["out"]) == (digest, 5, True, "out.safetensors")
    assert cli("verify", "out.safetensors", "--format", "quiet").stdout == ""


def test_options_reach_the_verification(merged: Path, cli: Cli, tmp_path: Path) -> None:
    told = json.loads(cli("verify", "out.safetensors", "--sample", "0", "--format", "json").stdout)
    assert (told["sampled_elems"], told["recomputed"], told["notes"]) == (0, False, [])
    (tmp_path / "in").mkdir()
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).rename(tmp_path / "in" / name)
    assert "were not computed again" in cli("verify", "out.safetensors").stdout
    assert cli("verify", "out.safetensors", "--sample", "100%", code=3).stdout == ""
    assert "5 numbers" in cli("verify", "out.safetensors", "--sample", "100%", "--inputs", "in").stdout


def test_damage_exits_3(merged: Path, cli: Cli) -> None:
    content = bytearray(merged.read_bytes())
    content[-1] ^= 1
    merged.write_bytes(content)
    done = cli("verify", "out.safetensors", "--sample", "0", code=3)
    assert (done.stdout, done.stderr) == ("", "error: out.safetensors is not as it was written: tensor w\n")
