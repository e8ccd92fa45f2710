"""The zip archive of torch.save: read in place, repacked, compressed, TorchScript, damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors, trained

import streammerge as sm
from formats.suite import FormatSuite, Tensors


def test_compressed_archives_are_unpacked(tmp_path: Path) -> None:
    content = {"model": trained(3), "tied": None}
    content["model"]["again"] = content["model"]["embed.weight"]
    torch.save(content, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as source,
        zipfile.ZipFile(tmp_path / "in.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    sm.convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), dict(content["model"]))
    assert any("compressed" in note for note in sm.inspect(tmp_path / "in.pth").notes)


def test_repacked_archives_are_read_where_the_bytes_are(tmp_path: Path) -> None:
    """Another tool stores the records again without torch's padding, so predicted offsets would be wrong."""
    torch.save(trained(3), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as source, zipfile.ZipFile(tmp_path / "renamed.bin", "w") as target:
        for name in reversed(source.namelist()):
            target.writestr(name, source.read(name))
    sm.convert(tmp_path / "renamed.bin", tmp_path / "out.safetensors")
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(3))


def test_torchscript_is_read_and_not_written(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
    torch.jit.trace(module, torch.ones(2, 3)).save(tmp_path / "in.pt")
    assert sm.inspect(tmp_path / "in.pt").format == "TorchScript archive"
    sm.convert(tmp_path / "in.pt", tmp_path / "out.safetensors")
    expected = dict(module.state_dict())
    made = load_safetensors(tmp_path / "out.safetensors")
    assert_same({k: made[k] for k in expected}, expected)
    with pytest.raises(sm.RecipeError, match="TorchScript"):
        sm.convert(tmp_path / "in.pt", tmp_path / "out.pt")


@pytest.mark.parametrize("name", ["missing", "size", "expanded", "negative"])
def test_tensors_that_do_not_fit_their_storage(tmp_path: Path, name: str, edit_pickle: Callable[..., Path]) -> None:
    change = {
        "missing": (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x007"),
        "size": (b"K\x04K\x05\x86", b"K\x04K\xff\x86"),
        "expanded": (b"K\x04K\x05\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
        "negative": (b"K\x04K\x05\x86", b"K\x04J\xff\xff\xff\xff\x86"),
    }[name]
    torch.save({"w": torch.ones(4, 5)}, tmp_path / "in.pth")
    with pytest.raises(sm.FormatError, match=r"edited\.pth"):
        sm.inspect(edit_pickle(tmp_path / "in.pth", *change))


@pytest.fixture
def edit_pickle(tmp_path: Path) -> Callable[..., Path]:
    def edit(path: Path, old: bytes, new: bytes) -> Path:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "edited.pth", "w") as target:
            for name in source.namelist():
                data = source.read(name)
                if name.endswith("data.pkl"):
                    assert old in data
                    data = data.replace(old, new)
                target.writestr(name, data)
        return tmp_path / "edited.pth"

    return edit


class TestTorchZip(FormatSuite):
    DTYPES = (*FormatSuite.DTYPES, torch.float8_e4m3fn)

    def write(self, path: Path, tensors: Tensors) -> None:
        torch.save(tensors, path)


class TestCompressedTorchZip(FormatSuite):
    """Packed again by another tool."""

    def write(self, path: Path, tensors: Tensors) -> None:
        torch.save(tensors, path)
        with zipfile.ZipFile(path) as source:
            records = {name: source.read(name) for name in source.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for name, data in records.items():
                target.writestr(name, data)
