"""The versions in a receipt."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import save_file

import streammerge as sm
from streammerge.planning.receipt import torch_version


@pytest.fixture
def without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides torch's package metadata, as in a build from source. torch can still be imported."""

    def absent(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)


def test_the_version_of_torch_is_known_without_its_metadata(without_metadata: None, tmp_path: Path) -> None:
    assert torch_version() == torch.__version__
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    plan = sm.plan([tmp_path / "a.safetensors"] * 2)
    assert plan.layout.receipt.versions["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("written", "version"),
    [("__version__ = '2.9.0a0+git1'\ndebug = False\n", "2.9.0a0+git1"), ("x = 1\n", "unknown"), (None, "unknown")],
)
def test_what_its_version_file_may_hold(
    written: str | None, version: str, without_metadata: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if written is not None:
        (tmp_path / "version.py").write_text(written)
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert torch_version() == version


def test_a_plan_does_without_torch(without_metadata: None, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Any = None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: nothing)
    assert torch_version() == "none"
