"""Inputs and outputs for the tests of verification."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import trained
from safetensors.torch import save_file

import streammerge as sm


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    (tmp_path / "in").mkdir()
    paths = [tmp_path / "in" / "a.safetensors", tmp_path / "in" / "b.safetensors"]
    for number, path in enumerate(paths):
        save_file({n: t for n, t in trained(number).items() if n != "norm.num_batches_tracked"}, path)
    return paths


@pytest.fixture
def here(tmp_path: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Inputs are named as one does, from the folder that holds them."""
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path


@pytest.fixture
def folder(pair: list[Path], here: Path) -> Path:
    """A merged folder with shards, an index and side files."""
    for name, path in (("a", pair[0]), ("b", pair[1])):
        (here / "in" / name).mkdir()
        (here / "in" / name / "config.json").write_text("{}")
        shutil.copy(path, here / "in" / name / "model.safetensors")
    sm.merge(["a", "b"], here / "out", max_shard_size="300kB")
    assert len(list((here / "out").glob("model-*"))) > 1
    return here / "out"
