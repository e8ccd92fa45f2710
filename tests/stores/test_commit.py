"""An output appears whole, or not at all, and replaces nothing unasked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import assert_same, load_safetensors, trained
from safetensors.torch import save_file

import streammerge as sm
from streammerge.stores.locations import parse


def test_nothing_appears_without_commit(tmp_path: Path) -> None:
    staging = parse(tmp_path / "out.bin").stage()
    file = staging.create("out.bin", 10)
    file.write_full(b"0123456789", 0)
    assert not (tmp_path / "out.bin").exists()
    staging.abort()
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_a_sentence(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    with pytest.raises(sm.RecipeError, match="File name too long"):
        sm.merge([tmp_path / "in.safetensors"], tmp_path / ("x" * 238 + ".safetensors"))


def test_a_small_file_that_came_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "extras.json").write_text("somebody's")
    with pytest.raises(sm.RecipeError, match="exists already"):
        parse(tmp_path / "extras.json").write_whole(b"new", overwrite=False)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["somebody's"]


def test_a_small_file_replaces_nothing_of_a_like_name(tmp_path: Path) -> None:
    (tmp_path / ".extras.json.part").write_text("somebody's")
    parse(tmp_path / "extras.json").write_whole(b"new", overwrite=False)
    assert (tmp_path / "extras.json").read_text() == "new"
    assert (tmp_path / ".extras.json.part").read_text() == "somebody's"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "extras.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_overwrite_replaces_a_file_whole(tmp_path: Path) -> None:
    save_file(trained(1), tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_bytes(b"old")
    sm.merge([tmp_path / "in.safetensors"], tmp_path / "out.safetensors", overwrite=True)
    assert_same(load_safetensors(tmp_path / "out.safetensors"), trained(1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]
