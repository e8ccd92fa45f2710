"""``streammerge sweep``; more in tests/sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

from streammerge.cli.arguments import lists_of_numbers, values_of_parameters


def test_parameters_of_a_sweep() -> None:
    assert values_of_parameters(["t=0.2:0.8:0.1", "k=1", "d=0.5", "d=0.7", "e=1,2"]) == {
        "t": "0.2:0.8:0.1",
        "k": "1",
        "d": ["0.5", "0.7"],
        "e": [["1", "2"]],
    }
    assert lists_of_numbers(["0.6,0.4", "50%,50%"]) == [[0.6, 0.4], [0.5, 0.5]]


def test_a_template_names_the_outputs(tmp_path: Path, cli: Cli) -> None:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    cli("sweep", "a.safetensors", "b.safetensors", "--weights", "1,0", "--weights", "0,1", "-o", "out/voice-{}.pth")
    assert sorted(each.name for each in (tmp_path / "out").glob("*.pth")) == [
        "voice-weight_0_1.pth",
        "voice-weight_1_0.pth",
    ]


@pytest.mark.parametrize(("words", "said"), [((), "-o DIR"), (("-o", "out", "-p", "t"), "NAME=VALUE")])
def test_what_is_wrong_is_said(tmp_path: Path, cli: Cli, words: tuple[str, ...], said: str) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    assert said in cli("sweep", "a.safetensors", *words, code=2).stderr
