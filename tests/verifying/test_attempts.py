"""Where verify looks for inputs, and what it says if it finds none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output beside its inputs; the current folder is another one."""
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        save_file({"w": torch.full((7, 5), float(number))}, name)
    sm.merge(["a.safetensors", "b.safetensors"], "out.safetensors")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "in" / "out.safetensors"


def test_inputs_are_found_beside_the_output_here_or_where_it_is_said(made: Path, tmp_path: Path) -> None:
    assert sm.verify(made, sample="100%").recomputed, "beside the output"
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "in" / name).rename(tmp_path / "elsewhere" / name)
    assert sm.verify(made, sample="100%").recomputed, "in the current folder"
    (tmp_path / "third").mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / "elsewhere" / name).rename(tmp_path / "third" / name)
    assert "values were not computed again" in sm.verify(made).notes[0]
    for asked in ({"sample": "5%"}, {"inputs": tmp_path / "elsewhere"}):
        with pytest.raises(sm.VerifyError, match="is as it was written, but its values were not computed again"):
            sm.verify(made, **asked)  # type: ignore[arg-type]
    assert sm.verify(made, inputs=tmp_path / "third").recomputed


def test_a_wrong_value_counts_more_than_an_absent_input(made: Path) -> None:
    content = bytearray(made.read_bytes())
    content[-1] ^= 0x40
    made.write_bytes(content)
    with pytest.raises(sm.VerifyError):
        sm.verify(made)
