"""The check of a finished output by our readers and by the safetensors library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running import readback
from streammerge.running.readback import check_by_library, check_structure, receipt_of
from streammerge.stores.locations import parse

TENSORS = {"w": torch.arange(12.0).reshape(3, 4), "s": torch.tensor(1.0), "e": torch.empty(0, 2), "one": torch.ones(1)}


@pytest.fixture(params=["out.safetensors", "out.pth", "out"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> sm.Result:
    save_file(TENSORS, tmp_path / "in.safetensors")
    return sm.convert(tmp_path / "in.safetensors", tmp_path / request.param)


def folder_of(made: sm.Result) -> Path:
    return Path(str(made.out)) if made.plan.layout.as_folder else Path(str(made.out)).parent


def test_an_output_that_is_as_planned_passes_and_a_cut_one_does_not(made: sm.Result) -> None:
    layout, folder = made.plan.layout, folder_of(made)
    check_structure(parse(folder), layout)
    (held,) = [file for file in layout.files if file.offsets]
    data = (folder / held.name).read_bytes()
    (folder / held.name).write_bytes(data[: len(data) // 2])
    with pytest.raises(sm.VerifyError, match="nothing was written"):
        check_structure(parse(folder), layout)


def test_tensors_at_other_places_than_planned_are_found(made: sm.Result) -> None:
    layout = made.plan.layout
    moved = [f._replace(offsets={n: at + 8 for n, at in f.offsets.items()}) for f in layout.files]
    with pytest.raises(sm.VerifyError, match="at other places than planned"):
        check_structure(parse(folder_of(made)), layout._replace(files=tuple(moved)))


def test_an_unforeseen_error_of_the_check_is_told_apart(made: sm.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readback, "open_checkpoint", lambda path: {}[path])
    with pytest.raises(sm.UncheckedError, match="KeyError"):
        check_structure(parse(folder_of(made)), made.plan.layout)


def test_the_library_must_find_these_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    check_by_library(parse(path), set(TENSORS))
    for names in (set(TENSORS) - {"e"}, {*TENSORS, "more"}, set()):
        with pytest.raises(sm.VerifyError, match="finds other tensors"):
            check_by_library(parse(path), names)
    path.write_bytes(b"\x05" + path.read_bytes()[1:])
    with pytest.raises(sm.VerifyError, match=r"x\.safetensors: the safetensors library refuses it"):
        check_by_library(parse(path), set(TENSORS))


def test_the_receipt_is_found_in_every_container(made: sm.Result, tmp_path: Path) -> None:
    assert receipt_of(parse(made.out)).digest == sm.verify(made.out, sample=0).digest
    with pytest.raises(sm.VerifyError, match="has no receipt"):
        receipt_of(parse(tmp_path / "in.safetensors"))
    with pytest.raises(sm.RecipeError, match="does not exist"):
        receipt_of(parse(tmp_path / "absent.safetensors"))


@pytest.mark.parametrize("command", ["merge", "convert"])
def test_a_missing_numpy_costs_no_output(voices: tuple[Path, Path], tmp_path: Path, command: str) -> None:
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "numpy.py").write_text("raise ModuleNotFoundError('No module named numpy', name='numpy')")
    words = [sys.executable, "-m", "streammerge", command, "news.pth", "-o", "out.safetensors"]
    paths = os.pathsep.join([str(tmp_path / "block"), *sys.path])
    done = subprocess.run(words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sm.verify(tmp_path / "out.safetensors", sample=0)
