"""Files of llama.cpp as any format: plain numbers in them are kept to the bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import streammerge as sm
from formats.gguf_samples import TORCH, plain, write
from formats.suite import FormatSuite, Tensors
from streammerge.cli.arguments import output_name
from streammerge.formats.gguf import matches


class TestGguf(FormatSuite):
    DTYPES: ClassVar[tuple[torch.dtype, ...]] = tuple(getattr(torch, name) for name in TORCH)
    NAME = "in.gguf"

    def write(self, path: Path, tensors: Tensors) -> None:
        write(path, {"general.name": "x"}, {name: plain(tensor) for name, tensor in tensors.items()})


def test_its_reader_is_imported_for_its_files_only(tmp_path: Path) -> None:
    assert matches(b"GGUF\3\0\0\0", 64)
    assert not matches(b"GGML", 64)
    TestGguf().write(tmp_path / "x.gguf", {"w": torch.ones(3)})
    sm.convert(tmp_path / "x.gguf", tmp_path / "x.safetensors")
    for name, there in (("x.gguf", True), ("x.safetensors", False)):
        code = f"import sys, streammerge; streammerge.inspect({str(tmp_path / name)!r})\n"
        code += "print('streammerge.formats.gguf_file' in sys.modules)"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.strip() == str(there)


def test_it_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TestGguf().write(tmp_path / "x.gguf", {"w": torch.ones(3)})
    told: list[object] = []
    assert output_name("out", ["x.gguf"], None, told.append) == "out.safetensors"
    assert told == ["note: out is written as out.safetensors, since GGUF is not written; out/ would be a folder"]
    with pytest.raises(sm.RecipeError, match=r"y\.gguf: GGUF is read and not written; end the name in / for a folder"):
        sm.convert(tmp_path / "x.gguf", tmp_path / "y.gguf")


def test_a_folder_may_hold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g").mkdir()
    TestGguf().write(Path("g/x.gguf"), {"w": torch.ones(3)})
    Path("g/config.json").write_text("{}")
    sm.convert("g", "out/")
    assert sorted(file.name for file in Path("out").iterdir() if file.suffix != ".md") == [
        "config.json",
        "model.safetensors",
        "streammerge.json",
    ]
    for number in (1, 2):
        TestGguf().write(Path(f"g/y-0000{number}-of-00002.gguf"), {f"w{number}": torch.ones(3)})
    with pytest.raises(sm.FormatError, match=r"g holds several checkpoints \(x\.gguf, y-00001-of-00002\.gguf\)"):
        sm.inspect("g")
    Path("g/x.gguf").unlink()
    assert set(sm.inspect("g")) == {"w1", "w2"}
