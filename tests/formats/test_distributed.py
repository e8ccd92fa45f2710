"""Checkpoints in parts of several ranks: refused, with the command that makes one checkpoint of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge as sm


def distributed(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    torch.save(torch.ones(3), folder / "__0_0.distcp")
    return folder


def test_the_folder_itself(tmp_path: Path) -> None:
    with pytest.raises(sm.FormatError, match=rf"format_utils dcp_to_torch {distributed(tmp_path / 'a')} model\.pth"):
        sm.inspect(tmp_path / "a")


def test_a_trainers_folder_names_the_weights_and_not_the_optimizer(tmp_path: Path) -> None:
    distributed(tmp_path / "checkpoint-9" / "optimizer_0")
    weights = distributed(tmp_path / "checkpoint-9" / "pytorch_model_fsdp_0")
    (tmp_path / "checkpoint-9" / "config.json").write_text("{}")
    with pytest.raises(sm.FormatError, match=f"accelerate merge-weights {weights} OUTPUT") as caught:
        sm.inspect(tmp_path / "checkpoint-9")
    assert "optimizer" not in str(caught.value)


def test_weights_beside_such_a_folder_are_read(tmp_path: Path) -> None:
    distributed(tmp_path / "run" / "optimizer_0")
    torch.save({"w": torch.ones(3)}, tmp_path / "run" / "pytorch_model.bin")
    assert list(sm.inspect(tmp_path / "run")) == ["w"]


def test_one_ranks_part_is_no_checkpoint(tmp_path: Path) -> None:
    """With one tensor it is a whole zip archive, which torch.load reads."""
    part = distributed(tmp_path / "a") / "__0_0.distcp"
    with pytest.raises(sm.FormatError, match=rf"one rank's part .* dcp_to_torch {part.parent} model\.pth"):
        sm.convert(part, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_deepspeed(tmp_path: Path) -> None:
    (tmp_path / "run" / "global_step9").mkdir(parents=True)
    (tmp_path / "run" / "global_step9" / "mp_rank_00_model_states.pt").touch()
    for folder in (tmp_path / "run", tmp_path / "run" / "global_step9"):
        with pytest.raises(sm.FormatError, match="zero_to_fp32"):
            sm.inspect(folder)
