"""Checkpoints of several ranks: found in their folder and in a trainer's folder above it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import streammerge as sm
from formats import dcp_maker


def distributed(folder: Path, name: str = "model.w") -> Path:
    return dcp_maker.write(folder, {name: torch.arange(12.0).reshape(4, 3)}, dcp_maker.sharded(0, 2), ranks=2)


def test_a_trainers_folder_has_its_weights_below(tmp_path: Path) -> None:
    distributed(tmp_path / "checkpoint-9" / "optimizer_0", "optimizer.state.w.exp_avg")
    distributed(tmp_path / "checkpoint-9" / "pytorch_model_fsdp_0")
    (tmp_path / "checkpoint-9" / "config.json").write_text("{}")
    index = sm.inspect(tmp_path / "checkpoint-9")
    assert list(index) == ["w"]
    sm.convert(tmp_path / "checkpoint-9", tmp_path / "out/")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "streammerge.json",
    ]  # fmt: skip
    sm.verify(tmp_path / "out")


def test_several_below(tmp_path: Path) -> None:
    distributed(tmp_path / "run" / "pytorch_model_fsdp_0")
    distributed(tmp_path / "run" / "pytorch_model_fsdp_1")
    with pytest.raises(sm.FormatError, match="several distributed checkpoints, pytorch_model_fsdp_0, pytorch_model_fsdp_1"):
        sm.inspect(tmp_path / "run")


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    distributed(tmp_path / "run" / "checkpoint-9" / "pytorch_model_fsdp_0")
    (tmp_path / "run" / "logs").mkdir()
    assert list(sm.inspect(tmp_path / "run")) == ["w"]
    distributed(tmp_path / "run" / "checkpoint-10" / "pytorch_model_fsdp_0")
    with pytest.raises(sm.FormatError, match="several steps, checkpoint-10, checkpoint-9; give one of them, or a pattern"):
        sm.inspect(tmp_path / "run")
    made = sm.plan([str(tmp_path / "run" / "checkpoint-*")], last=2)
    assert len(made.tasks) == 1


def test_weights_beside_such_a_folder_are_read(tmp_path: Path) -> None:
    distributed(tmp_path / "run" / "optimizer_0", "optimizer.state.w.exp_avg")
    torch.save({"w": torch.ones(3)}, tmp_path / "run" / "pytorch_model.bin")
    assert list(sm.inspect(tmp_path / "run")) == ["w"]


def test_the_last_steps_of_a_run(tmp_path: Path) -> None:
    for step in (100, 200, 1000):
        distributed(tmp_path / "run" / f"step-{step}")
    made = sm.plan([str(tmp_path / "run" / "step-*")], last=2)
    assert any("step-200" in note and "step-1000" in note and "step-100," not in note for note in made.notes)


def test_one_ranks_part_is_no_checkpoint(tmp_path: Path) -> None:
    """With one tensor it is a whole zip archive, which torch.load reads."""
    part = distributed(tmp_path / "a") / "__0_0.distcp"
    with pytest.raises(sm.FormatError, match=rf"one rank's part .* in {part.parent}; give that folder"):
        sm.convert(part, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
