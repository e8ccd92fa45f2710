"""NeMo archives whose weights are a distributed checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_same, load_safetensors

import streammerge as sm
from formats import dcp_maker
from formats.test_nemo import pack


def test_weights_as_a_distributed_checkpoint(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(30, 7), "b": torch.randn(5), "c": torch.randn(4, 4)}
    dcp_maker.write(tmp_path / "content" / "model_weights", tensors, dcp_maker.grid(2, 2))
    long = tmp_path / "content" / ("long" * 40)
    long.mkdir()
    (long / "vocabulary.txt").write_text("x")
    for form in ("pax", "gnu"):
        path = pack(tmp_path / f"{form}.nemo", tmp_path / "content", form)
        sm.convert(path, tmp_path / "out.safetensors", overwrite=True)
        assert_same(load_safetensors(tmp_path / "out.safetensors"), tensors)
        sm.verify(tmp_path / "out.safetensors")


def test_an_archive_of_a_folder_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    dcp_maker.write(tmp_path / "content" / "model_weights", {"a": torch.ones(4, 4)}, dcp_maker.grid(2, 2))
    (tmp_path / "content" / "model_config.yaml").write_text("target: nemo\n")
    path = pack(tmp_path / "in.nemo", tmp_path / "content")
    with pytest.raises(sm.RecipeError, match=r"is read and not written; end the name in \.safetensors or \.ckpt"):
        sm.convert(path, tmp_path / "out.nemo")
