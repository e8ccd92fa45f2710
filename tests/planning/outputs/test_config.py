"""The edited config.json of an output folder. The oracle is json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_the_dtype_is_edited_only_if_it_changes(tmp_path: Path, dtype: str | None) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    save_file({"a": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "torch_dtype": "float32", "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    made = sm.convert(folder, out, dtype=dtype)
    assert json.loads((out / "config.json").read_text()) == config | ({"torch_dtype": dtype} if dtype else {})
    assert ("config.json: torch_dtype is now float16 (was float32)" in made.notes) == (dtype is not None)
