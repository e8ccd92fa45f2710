"""Damage to an output is found, wherever it is, by structure and checksums."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import save_file

import streammerge as sm
from streammerge.events import Checked, Event, RunFinished, RunStarted

OUTPUTS = {"safetensors": "out.safetensors", "pickle": "out.pth"}


@pytest.mark.parametrize("container", ["safetensors", "pickle"])
def test_a_flipped_bit_is_found_wherever_it_is(pair: list[Path], here: Path, container: str) -> None:
    small = {"a": torch.randn(33), "b": torch.arange(5), "e": torch.empty(0)}
    for name in ("a.safetensors", "b.safetensors"):
        save_file(small, name)
    out = here / OUTPUTS[container]
    sm.merge(["a.safetensors", "b.safetensors"], out)
    good = out.read_bytes()
    for at in range(0, len(good), 5):
        out.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
        with pytest.raises(sm.VerifyError):
            sm.verify(out, sample=0)
    for other in (good[:-1], good + b"\0", b"", good[: len(good) // 2]):
        out.write_bytes(other)
        with pytest.raises(sm.VerifyError):
            sm.verify(out, sample=0)
    out.write_bytes(good)
    sm.verify(out, sample="100%")


def test_an_archive_that_was_packed_again_is_another(voices: tuple[Path, Path], tmp_path: Path) -> None:
    """With every checksum of its own right: compressed, with a record more, with another recipe."""
    sm.merge(voices, tmp_path / "out.pth", integers="first")
    with zipfile.ZipFile(tmp_path / "out.pth") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    step = records["archive/data.pkl"].replace(b"step", b"stEp")
    recipe = records["archive/streammerge.yaml"].replace(b"linear", b"median")
    for changed, packing in (
        ({"archive/data/0": bytes(len(records["archive/data/0"]))}, zipfile.ZIP_DEFLATED),
        ({"archive/data.pkl": step}, zipfile.ZIP_DEFLATED),
        ({"archive/data.pkl": step}, zipfile.ZIP_STORED),
        ({"archive/streammerge.yaml": recipe}, zipfile.ZIP_STORED),
        ({"archive/code/evil.py": b"1"}, zipfile.ZIP_STORED),
        ({}, zipfile.ZIP_STORED),
    ):
        with zipfile.ZipFile(tmp_path / "other.pth", "w", packing) as archive:
            for name, content in {**records, **changed}.items():
                archive.writestr(name, content)
        with pytest.raises(sm.VerifyError):
            sm.verify(tmp_path / "other.pth", sample=0)


def test_damage_names_the_tensor(pair: list[Path], here: Path, cli: Cli) -> None:
    out = here / "out.safetensors"
    sm.merge(pair, out)
    content = bytearray(out.read_bytes())
    content[sm.inspect(out).entries["layer.bias"].offset] ^= 1
    out.write_bytes(content)
    said = cli("verify", "out.safetensors", code=3).stderr
    assert said == "error: out.safetensors is not as it was written: tensor layer.bias\n"


def test_every_file_of_a_folder_counts(folder: Path) -> None:
    assert sm.verify(folder, sample="100%").files == len(list(folder.iterdir())) - 1
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()
        for at in (len(good) // 3, len(good) - 2):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(sm.VerifyError):
                sm.verify(folder, sample=0)
        path.unlink()
        with pytest.raises(sm.VerifyError):
            sm.verify(folder, sample=0)
        path.write_bytes(good)
    for name in ("modeling_evil.py", "pytorch_model.bin"):
        (folder / name).write_text("1")
        with pytest.raises(sm.VerifyError, match=f"{name} does not belong"):
            sm.verify(folder, sample=0)
        (folder / name).unlink()
    (folder / "NOTES.md").write_text("mine")
    assert any("NOTES.md came later" in note for note in sm.verify(folder).notes)
    (folder / "model-00009-of-00009.safetensors").write_bytes((folder.parent / "in" / "a.safetensors").read_bytes())
    with pytest.raises(sm.VerifyError, match="does not belong"):
        sm.verify(folder, sample=0)


def test_a_folder_of_the_hubs_cache_verifies(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--me--merged" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--me--merged" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert sm.verify(snapshot, sample=0).files > 4


def test_progress_of_a_verification_counts_what_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checksums first: all bytes of the tensors and side files. Then the values: the bytes of the inputs."""
    events: list[Event] = []
    sm.verify(folder, sample="100%", listener=events.append, progress=True)
    starts = [at for at, event in enumerate(events) if isinstance(event, RunStarted)]
    assert len(starts) == 2
    for start, stop in ((starts[0], starts[1]), (starts[1], len(events))):
        read = [event.read_bytes for event in events[start:stop] if isinstance(event, Checked)]
        assert sum(read) == events[start].read_bytes > 0  # type: ignore[union-attr]
        assert sum(isinstance(event, RunFinished) for event in events[start:stop]) == 1
    assert "%" in capsys.readouterr().err
    with pytest.raises(sm.RecipeError, match="`progress` takes True or False"):
        sm.verify(folder, progress="perhaps")  # type: ignore[arg-type]


def test_a_side_file_that_became_empty_is_found(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"")
    with pytest.raises(sm.VerifyError, match=r"is not as it was written: config\.json"):
        sm.verify(folder, sample=0)
