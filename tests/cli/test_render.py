"""Results as text and as JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Cli, deflate, octets
from safetensors.torch import save_file

import streammerge as sm
from streammerge.cli.render import index_json, index_text, recipe_text
from streammerge.cli.terminal import WIDTH


def test_merge_reports_in_the_promised_order(cli: Cli, tmp_path: Path, voices: tuple[Path, Path]) -> None:
    done = cli("merge", "news.pth", "audiobook.pth", "--weights", "0.6,0.4", "-o", "voice.pth")
    wrote, speed, memory = done.stdout.splitlines()
    assert wrote.startswith("wrote voice.pth (9 tensors, ")
    assert re.fullmatch(r"read [\d.]+ [kM]B, wrote [\d.]+ kB in [\d.]+ s \([\d.]+ [kM]B/s\)", speed)
    assert re.fullmatch(
        r"peak memory [\d.]+ (bytes|[KM]iB) of 512 MiB \(above the \d+ MiB start-up footprint; \d+ MiB resident in all\)",
        memory,
    )
    assert "note: left out of the output: optimizer, scheduler, scaler" in done.stderr


def test_names_from_files_are_escaped(cli: Cli, tmp_path: Path) -> None:
    torch.save({"model": {"w\x1b[31m\nred": torch.ones(2)}, "note\x1b[2J": "\x1b]0;title\x07"}, tmp_path / "in.pth")
    torch.save({"model": {"v\x1b[31m": torch.ones(2)}}, tmp_path / "other.pth")
    for done in (
        cli("inspect", "in.pth", "--tensors"),
        cli("plan", "in.pth", "-o", "x.safetensors"),
        cli("merge", "in.pth", "other.pth", "-o", "x.pth", code=4),
    ):
        assert "\x1b" not in done.stdout + done.stderr


def test_what_inspect_tells_as_json_is_what_torch_and_safetensors_load(tmp_path: Path) -> None:
    shared = torch.ones(3, 5)
    torch.save(
        {"model": {"a": shared, "b": shared, "t": shared.t(), "e": torch.empty(0, 2)}, "step": 3}, tmp_path / "x.pth"
    )
    told = index_json(sm.inspect(tmp_path / "x.pth"), tensors=True)
    loaded = torch.load(tmp_path / "x.pth")["model"]
    assert json.loads(json.dumps(told)) == told
    assert (told["tensors"], told["parameters"], told["aliases"], told["data"]) == (4, 30, {"b": "a"}, {"step": 3})
    assert (told["bytes"], told["executed"]) == ((tmp_path / "x.pth").stat().st_size, False)
    content = (tmp_path / "x.pth").read_bytes()
    for name, entry in told["entries"].items():
        assert entry["shape"] == list(loaded[name].shape)
        assert entry.get("strides") == (list(loaded[name].stride()) if name == "t" else None)
        if name == "a":
            assert content[entry["offset"] :][: entry["bytes"]] == octets(loaded[name])
    assert "entries" not in index_json(sm.inspect(tmp_path / "x.pth"), tensors=False)
    deflate(tmp_path / "x.pth", tmp_path / "y.pth")
    table = index_text(sm.inspect(tmp_path / "y.pth"), tensors=True).splitlines()
    expected = (("a", "3x5"), ("b", "3x5"), ("t", "5x3"))
    assert [line.split()[:3] for line in table[-4:-1]] == [[name, "float32", shape] for name, shape in expected]
    assert "tied to a compressed" in table[-3]


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth", "out"])
def test_the_recipe_inside_an_output_is_the_one_that_made_it(name: str, tmp_path: Path) -> None:
    for number in range(2):
        save_file({"w": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    made = sm.merge([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / name, weights=[0.25, 0.75])
    data = yaml.safe_load(recipe_text(sm.inspect(made.out)))
    assert [each["model"] for each in data["models"]] == ["0.safetensors", "1.safetensors"]
    assert [each["parameters"]["weight"] for each in data["models"]] == [0.25, 0.75]
    with pytest.raises(sm.RecipeError, match="carries no recipe"):
        recipe_text(sm.inspect(tmp_path / "0.safetensors"))


def test_a_long_value_is_cut_to_the_width(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1), "note": "x" * 500}, tmp_path / "x.pth")
    (line,) = [line for line in index_text(sm.inspect(tmp_path / "x.pth"), False).splitlines() if "note: x" in line]
    assert line.endswith("x...")
    assert len(line.split(maxsplit=1)[1]) == WIDTH
