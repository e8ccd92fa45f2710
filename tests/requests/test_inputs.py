"""The inputs of a call: paths, state dicts, indexes, weights behind them or in a dict."""

from __future__ import annotations

import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

import streammerge as sm
from streammerge.requests.inputs import Held, named, names_and_weights, path_of


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.ones(2)}, name)
    save_file({"w": torch.ones(2)}, "c.safetensors:0.5")
    return tmp_path


STATE = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("given", "names", "weights"),
    [
        ("a.pt", ["a.pt"], None),
        (Path("a.pt"), ["a.pt"], None),
        (["a.pt", Path("b.pt")], ["a.pt", "b.pt"], None),
        (["a.pt:0.6", "b.pt:40%"], ["a.pt", "b.pt"], [0.6, 0.4]),
        ("?.pt:-2", ["a.pt", "b.pt"], [-2, -2]),
        ({"a.pt": 1, Path("b.pt"): numpy.float32(0.5)}, ["a.pt", "b.pt"], [1, 0.5]),
        ({"a.pt": torch.tensor(0.5), "b.pt": numpy.array(2)}, ["a.pt", "b.pt"], [0.5, 2]),
        ({"a.pt": Decimal("0.5"), "b.pt": Fraction(1, 2)}, ["a.pt", "b.pt"], [0.5, 0.5]),
        ({"?.pt": 0.5}, ["a.pt", "b.pt"], [0.5, 0.5]),
        ({"w": torch.tensor(0.5)}, ["memory/1"], None),
        (["c.safetensors:0.5"], ["c.safetensors:0.5"], None),
        ([STATE, "a.pt"], ["memory/1", "a.pt"], None),
        (STATE, ["memory/1"], None),
    ],
    ids=str,
)
def test_names_and_weights(given: Any, names: list[str], weights: list[float] | None, world: Path) -> None:
    held = Held()
    found, theirs = names_and_weights(given, held)
    assert [name if name not in held else f"memory/{[*held].index(name) + 1}" for name in found] == names
    assert theirs == weights


def test_an_index_stands_for_its_file(world: Path) -> None:
    index, held = sm.inspect("a.pt"), Held()
    assert names_and_weights(index, held) == (["a.pt"], None)
    assert names_and_weights([index, "b.pt"], held) == (["a.pt", "b.pt"], None)
    assert names_and_weights({index.path: 1}, held) == (["a.pt"], [1])
    assert sm.merge([index, "b.pt"], "out.pt", base=index, method="ties").out.name == "out.pt"
    with pytest.raises(sm.RecipeError, match="`inputs` takes a state dict, not its index"):
        named("inputs", sm.inspect(STATE), held)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a.pt:0.6", "b.pt"], "b.pt has no weight behind it"),
        ({"a.pt": "much"}, "a.pt has no number"),
        ([None], "`inputs` takes a path, not None"),
        (torch.tensor(1), r"`inputs` takes a path, not tensor\(1\)"),
        (["a\0b"], "`inputs` takes a path, not a"),
        ({"a.pt", "b.pt"}, "`inputs` are in an order, which a set has not"),
        (["", "a.pt"], "an input is an empty text, where a path is needed"),
    ],
)
def test_what_is_no_input_is_refused(given: Any, said: str, world: Path) -> None:
    with pytest.raises(sm.RecipeError, match=said):
        names_and_weights(given, Held())


def test_an_output_cannot_be_a_stream() -> None:
    assert path_of("inputs", "-") == "-"
    with pytest.raises(sm.RecipeError, match="cannot go to stdout"):
        path_of("out", "-")


def test_an_output_cannot_be_a_stream_that_leads_to_a_file(world: Path) -> None:
    """A shell puts a file behind ``/dev/stdout``, and nothing may be written beside that name."""
    command = [sys.executable, "-m", "streammerge", "convert", "a.pt", "-o", "/dev/stdout"]
    with Path("log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert "is a device, a pipe or a socket" in done.stderr
    assert not list(Path("/dev").glob("stdout.*"))


@pytest.mark.parametrize("out", ["/dev/null", "link.pth", "pipe.pth", "pipe"])
def test_an_output_cannot_be_a_device_or_a_pipe(out: str, world: Path, cli: Cli) -> None:
    """Nothing replaces it, and nothing is written beside it."""
    for name in ("pipe", "pipe.pth"):
        os.mkfifo(name)
    Path("link.pth").symlink_to("/dev/null")
    here = sorted(world.iterdir())
    with pytest.raises(sm.RecipeError, match="is a device, a pipe or a socket"):
        sm.convert("a.pt", out, overwrite=True)
    found = cli("convert", "a.pt", "-o", out, "--overwrite", code=2)
    assert "is a device, a pipe or a socket" in found.stderr
    assert sorted(world.iterdir()) == here
    assert Path("/dev/null").is_char_device()
    assert not Path("/dev/null.pt").exists()
