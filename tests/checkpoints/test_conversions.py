"""Inputs that are converted to safetensors first, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import mean, octets, trained, voice
from safetensors.torch import save_file

import streammerge as sm


def test_convert_first_keeps_and_reuses_its_files(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    sm.merge(voices, tmp_path / "plain.pth", weights=[0.6, 0.4])
    for _ in range(2):
        sm.merge(voices, tmp_path / "out.pth", weights=[0.6, 0.4], convert_first=tmp_path / "kept", overwrite=True)
        kept = sorted((tmp_path / "kept").iterdir())
        assert len(kept) == 2
        stamps = [path.stat().st_mtime_ns for path in kept]
    assert stamps == [path.stat().st_mtime_ns for path in sorted((tmp_path / "kept").iterdir())]
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "plain.pth").read_bytes()
    torch.save(voice(7, 10, 3, 2.0), voices[0])
    sm.merge(voices, tmp_path / "new.pth", convert_first=tmp_path / "kept")
    expected = mean([trained(7)["layer.bias"], trained(2)["layer.bias"]], [1, 1])
    assert octets(torch.load(tmp_path / "new.pth")["model"]["xtts.layer.bias"]) == octets(expected)


def test_convert_first_believes_no_file_that_holds_something_else(tmp_path: Path, voices: tuple[Path, Path]) -> None:
    sm.merge(voices, tmp_path / "out.pth", convert_first=tmp_path / "kept")
    kept = sorted((tmp_path / "kept").iterdir())
    for path, content in zip(kept, ({"other": torch.ones(3)}, None), strict=True):
        before = path.read_bytes()
        save_file(content, path) if content else path.write_bytes(b"damaged")
        sm.merge(voices, tmp_path / "again.pth", convert_first=tmp_path / "kept", overwrite=True)
        assert path.read_bytes() == before
        assert (tmp_path / "again.pth").read_bytes() == (tmp_path / "out.pth").read_bytes()


def test_no_conversion_goes_into_the_folder_of_an_input(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        torch.save({"w": torch.ones(3)}, tmp_path / name / "model.pt")
    for folder in (tmp_path / "b", tmp_path / "b/new"):
        with pytest.raises(sm.RecipeError, match="is, or lies in, the folder of an input; inputs are never written"):
            sm.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out/", convert_first=folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "model.pt", "model.pt"]
