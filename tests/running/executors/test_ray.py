"""Ray as an executor: asked for by name, absent, and not for everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.running.executors.ray import RayExecutor, imported
from streammerge.running.executors.registry import executors


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    for name in "ab":
        save_file({"w": torch.ones(3)}, tmp_path / f"{name}.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_it_is_known_by_name_and_imports_no_ray() -> None:
    code = (
        "import sys; from streammerge.running.executors.registry import executors as e; print([*e()], 'ray' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "['processes', 'ray', 'threads'] False\n"
    assert executors()["ray"] is RayExecutor


def test_without_ray_it_is_one_sentence(tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(sm.RecipeError, match=r"needs the package ray; install it with `pip install 'streammerge\[ray\]'`"):
        imported()
    with pytest.raises(sm.RecipeError, match="needs the package ray"):
        sm.merge(models, tmp_path / "out.safetensors", executor="ray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_other_works_are_refused(models: list[Path]) -> None:
    with pytest.raises(sm.RecipeError, match=r'`executor="ray"` makes merges and conversions only'):
        sm.diff(models[0], models[1], executor="ray")


def test_what_other_machines_cannot_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sm.RecipeError, match="in the memory of this process"):
        sm.merge([{"w": torch.ones(3)}, {"w": torch.ones(3)}], tmp_path / "out.safetensors", executor="ray")
